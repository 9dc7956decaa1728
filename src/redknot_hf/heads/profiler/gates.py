"""Gates in DuoAttention's manner: which heads must see far, found by gradient descent (arXiv 2410.10819, section 2.2).

Every head's output becomes a * full + (1 - a) * local on the suffix, the contexts' KV staying as they are; the gates a
minimise weight * KL(full || gated) + mean a over needle prompts and text. Heads that retrieve keep their gate, the rest
falls to zero. Here gates are per KV head, the targets' KL replaces the paper's hidden-state distance, and the contexts'
KV is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import ContextCache, gradients, run_suffix
from .intercept import AttentionCall, Handler
from .tasks import Batch
from .visibility import visible_attention

__all__ = ["gated_handler", "optimise_gates"]


def gated_handler(gates: Tensor, sink: int, window: int) -> Handler:
    """A handler that mixes full and windowed attention.

    Args:
        gates: `[layers, heads]` in [0, 1]; may require gradients.
        sink, window: tokens.
    """

    def handler(call: AttentionCall) -> Tensor:
        heads = call.key.shape[1]
        full = visible_attention(call)
        local = visible_attention(call, (sink,) * heads, (window,) * heads)
        gate = gates[call.layer].repeat_interleave(call.groups)[None, :, None, None]
        return (gate * full + (1 - gate) * local).to(full.dtype)  # mixed in fp32: the gates' gradient is a long sum

    return handler


def optimise_gates(
    model: Any,
    prompts: Sequence[tuple[ContextCache, Batch, Tensor]],
    shape: tuple[int, int],
    *,
    sink: int,
    window: int,
    steps: int,
    weight: float = 5.0,
    learning_rate: float | None = None,
    start: dict[str, Any] | None = None,
    step: Callable[[dict[str, Any]], None] = lambda state: None,
) -> Tensor:
    """Optimise one gate per (layer, KV head).

    Args:
        model: the decoder; its parameters must not require gradients.
        prompts: cache, batch and full-attention log-probabilities `[targets, vocabulary]`; one per step, in turn.
        shape: layers, heads.
        sink, window: tokens of the local branch.
        steps: of Adam.
        weight: of the KL against the mean gate. 5 is where a 135M model kept 13 of 90 gates above a half.
        learning_rate: Adam's; None for 0.03, or what takes a gate from 1 to 0 in the steps there are.
        start: a state handed to `step` before, to go on from.
        step: called after every step with the state.

    Returns:
        fp32 `[layers, heads]` gates in [0, 1] on the CPU.
    """
    if learning_rate is None:
        learning_rate = max(0.03, 1.0 / max(steps, 1))
    device = prompts[0][1].context.device
    gates = torch.ones(shape, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([gates], lr=learning_rate)
    done = 0
    if start is not None:
        with torch.no_grad():
            gates.copy_(start["gates"])
        moments = {"exp_avg": start["exp_avg"].to(device), "exp_avg_sq": start["exp_avg_sq"].to(device)}
        done = int(start["steps"])
        optimiser.state[gates] = {"step": torch.tensor(float(done)), **moments}
    for i in range(done, steps):
        cache, batch, reference = prompts[i % len(prompts)]
        with torch.enable_grad():
            logits = run_suffix(model, cache, batch.suffix, gated_handler(gates, sink, window))
            log_probs = logits[batch.target].float().log_softmax(-1)
            divergence = F.kl_div(log_probs, reference.float(), log_target=True, reduction="none").sum(-1).mean()
            (gates.grad,) = gradients(weight * divergence + gates.mean(), [gates], dtype=logits.dtype)
        optimiser.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
        state = optimiser.state[gates]
        step(
            {
                "gates": gates.detach().cpu(),
                "exp_avg": state["exp_avg"].cpu(),
                "exp_avg_sq": state["exp_avg_sq"].cpu(),
                "steps": i + 1,
            }
        )
    return gates.detach().float().cpu()
