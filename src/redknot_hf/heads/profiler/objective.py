"""What a search over head maps minimises: KL on text, KL at answers, and answers that are about to be lost.

KL alone does not see how close an answer is to flipping: a map may cost 0.01 nats per answer token and lose one answer
in ten. So every retrieval prompt also counts as a soft miss: a sigmoid of the smallest margin (log-probability of the
true token over the best other one) among its answer tokens. It falls to the share of wrong greedy answers as the
temperature goes to zero, and has a gradient where that share has none. Two counts exist. Misses: answering better than
the full cache is a gain, and text pays for it. Losses, the default: only what the full cache answers better counts. All
terms are means over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .tasks import Batch

__all__ = ["TERMS", "Objective", "prompt_terms"]

TERMS = ("text_kl", "needle_kl", "needle_misses", "needle_losses")


@dataclass(frozen=True)
class Objective:
    """Weights of the terms.

    Attributes:
        text_kl: of the KL on text, nats per token.
        needle_kl: of the KL at answers, nats per token.
        needle_misses: of the share of answers missed, also those that the full cache misses.
        needle_losses: of the share of answers missed beyond the full cache's, prompt by prompt. 0.4: two and a half per cent
            of the answers are worth 0.01 nats on text.
    """

    text_kl: float = 1.0
    needle_kl: float = 0.2
    needle_misses: float = 0.0
    needle_losses: float = 0.4

    def total(self, terms: Tensor) -> Tensor:
        """`[..., 4]` terms in the order of `TERMS` to `[...]`."""
        weights = torch.tensor([getattr(self, name) for name in TERMS], dtype=terms.dtype)
        return (terms * weights.to(terms.device)).sum(-1)


def prompt_terms(
    log_probs: Tensor, reference: Tensor, batch: Batch, temperature: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, soft miss and soft loss of every prompt of a batch; differentiable.

    Args:
        log_probs: `[targets, vocabulary]` of a map at the batch's target rows, row-major over (prompt, row).
        reference: the same of the full cache.
        batch: the prompts.
        temperature: of the soft miss, nats.

    Returns:
        `[prompts]` KL in nats per target token; `[prompts]` soft misses in [0, 1] and by how much they exceed the full
        cache's (both 0 for text).
    """
    owner = batch.target.nonzero()[:, 0]
    count = batch.target.sum(1)
    kl = (reference.exp() * (reference - log_probs)).sum(-1)
    zeros = torch.zeros(len(batch), dtype=kl.dtype, device=kl.device)
    kl = zeros.index_add(0, owner, kl) / count
    if batch.kinds[0] == "text":
        return kl, zeros, zeros
    truth = batch.next_ids[batch.target][:, None]

    def soft_miss(answer: Tensor) -> Tensor:
        right = answer.gather(1, truth)[:, 0]
        best_other = answer.scatter(1, truth, float("-inf")).amax(-1)
        margin = zeros.scatter_reduce(0, owner, right - best_other, "amin", include_self=False)
        return torch.sigmoid(-margin / temperature)

    miss = soft_miss(log_probs)
    return kl, miss, (miss - soft_miss(reference)).clamp_min(0)
