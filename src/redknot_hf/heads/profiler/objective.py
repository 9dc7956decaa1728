"""What a search over head maps minimises: KL on text, KL at answers, and answers that are about to be lost.

KL alone does not see how close an answer is to flipping: a map may cost 0.01 nats per answer token and lose one answer
in ten. So every retrieval prompt also counts as a soft miss: a sigmoid of the smallest margin (log-probability of the
true token over the best other one) among its answer tokens. It falls to the share of wrong greedy answers as the
temperature goes to zero, and has a gradient where that share has none. What is answered better than by the full cache
counts too: counting only losses, twice as heavily, made both text and answers worse on held-out prompts of a 135M model.
All terms are means over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ...errors import RedKnotError, shorten
from .tasks import Batch

__all__ = ["TERMS", "Objective", "prompt_terms"]

TERMS = ("text_kl", "needle_kl", "needle_misses")


@dataclass(frozen=True)
class Objective:
    """Weights of the terms.

    Attributes:
        text_kl: of the KL on text, nats per token.
        needle_kl: of the KL at answers, nats per token.
        needle_misses: of the share of answers missed. 0.25: four per cent of the answers are worth 0.01 nats on text.
    """

    text_kl: float = 1.0
    needle_kl: float = 0.5
    needle_misses: float = 0.25

    @classmethod
    def weighted(cls, needle_weight: float) -> Objective:
        """The default weights, those of answers times `needle_weight`; refuses what is no finite number from 0 on."""
        if (
            isinstance(needle_weight, bool)
            or not isinstance(needle_weight, (int, float))
            or not 0 <= needle_weight < inf
        ):
            raise RedKnotError(f"needle_weight is {shorten(needle_weight)}; expected a number of at least 0")
        return cls(needle_kl=cls.needle_kl * needle_weight, needle_misses=cls.needle_misses * needle_weight)

    def total(self, terms: Tensor) -> Tensor:
        """`[..., 3]` terms in the order of `TERMS` to `[...]`."""
        weights = torch.tensor([self.text_kl, self.needle_kl, self.needle_misses], dtype=terms.dtype)
        return (terms * weights.to(terms.device)).sum(-1)


def prompt_terms(log_probs: Tensor, reference: Tensor, batch: Batch, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """KL and soft miss of every prompt of a batch; differentiable.

    Args:
        log_probs: `[targets, vocabulary]` of a map at the batch's target rows, row-major over (prompt, row).
        reference: the same of the full cache.
        batch: the prompts.
        temperature: of the soft miss, nats.

    Returns:
        `[prompts]` KL in nats per target token, and `[prompts]` soft misses in [0, 1] (0 for text).
    """
    owner = batch.target.nonzero()[:, 0]
    count = batch.target.sum(1)
    kl = (reference.exp() * (reference - log_probs)).sum(-1)
    zeros = torch.zeros(len(batch), dtype=kl.dtype, device=kl.device)
    kl = zeros.index_add(0, owner, kl) / count
    if batch.kinds[0] == "text":
        return kl, zeros
    truth = batch.next_ids[batch.target][:, None]
    right = log_probs.gather(1, truth)[:, 0]
    best_other = log_probs.scatter(1, truth, float("-inf")).amax(-1)
    margin = zeros.scatter_reduce(0, owner, right - best_other, "amin", include_self=False)
    return kl, torch.sigmoid(-margin / temperature)
