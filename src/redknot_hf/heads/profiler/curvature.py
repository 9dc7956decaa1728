"""What the loss feels of a head map: a quadratic model of KL(full || map) with all heads together.

Around full attention, KL is 1/2 of a quadratic form in the logits' change, and the logits' change is linear in the
heads' output changes (full minus windowed). A random cotangent of the softmax's Fisher matrix, sent backwards once,
meets the output change of every head and every window at once, so one backward pass gives one row d of a matrix with
KL(map) ~ 1/2 E[(sum of d over the local heads)^2]. Cancellations between heads are in it; what is not: anything beyond
second order, so prompts whose answer flips (needles) need the gates as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .context import ContextCache, gradients, run_suffix
from .intercept import AttentionCall
from .scores import HeadScores, RingOutputs, ring_attention
from .tasks import Batch
from .visibility import visible_attention

__all__ = ["score_batch"]


def score_batch(
    model: Any,
    cache: ContextCache,
    batch: Batch,
    scores: HeadScores,
    *,
    sketches: int,
    seed: int,
    windows: Sequence[int],
    sink: int,
    step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add a batch to the head scores and return its rows of the quadratic model.

    Args:
        model: the decoder; its parameters must not require gradients.
        cache: full-attention KV of the contexts.
        batch: of one kind.
        scores: sums to add to.
        sketches: random backward passes.
        seed: of the cotangents.
        windows, sink: tokens.
        step: called after every pass (progress).

    Returns:
        fp32 `[batch * sketches, layers, heads, windows]` on the CPU: change along each head's window, scaled so that
        the mean over rows of 1/2 (sum over heads)^2 is KL per target token in nats.
    """
    kind = "text" if batch.kinds[0] == "text" else "needle"
    changes: dict[int, Tensor] = {}
    probes: dict[int, Tensor] = {}

    def handler(call: AttentionCall) -> Tensor:
        detached = AttentionCall(
            call.layer, call.query.detach(), call.key.detach(), call.value.detach(),
            call.scaling, call.model_window, call.softcap, call.sink_logits,
        )  # fmt: skip
        rings: RingOutputs = ring_attention(detached, sink, windows)
        scores.add(kind, detached, rings, batch.target, batch.needle)
        out = visible_attention(call)
        if sketches:
            changes[call.layer] = rings.windowed - rings.full
            probes[call.layer] = torch.zeros_like(out, requires_grad=True)
            out = out + probes[call.layer]
        return out

    shape = (len(batch), sketches, scores.layers, scores.heads, len(windows))
    rows = torch.zeros(shape, device=batch.context.device)
    with torch.set_grad_enabled(sketches > 0):
        logits = run_suffix(model, cache, batch.suffix, handler)
    step()
    if not sketches:
        return rows.reshape(0, *shape[2:]).cpu()
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    layers = sorted(probes)
    target = batch.target
    picked = logits[target].float()  # [targets, vocabulary]
    with torch.no_grad():
        probability = picked.softmax(-1)
        root = probability.sqrt()
        weight = target.sum(1).double().rsqrt().float()[:, None].expand(target.shape)[target][:, None]
    for s in range(sketches):
        with torch.no_grad():
            sign = torch.randint(0, 2, picked.shape, generator=generator, dtype=torch.int8, device=picked.device)
            noise = root * (2 * sign - 1)  # random signs: its covariance through the softmax is the Fisher matrix
            cotangent = weight * (noise - probability * noise.sum(-1, keepdim=True))
        found = gradients(picked, [probes[layer] for layer in layers], cotangent, retain_graph=s + 1 < sketches)
        for layer, gradient in zip(layers, found, strict=True):
            # [windows, batch, query_heads, rows, dim] . [batch, query_heads, rows, dim] -> [windows, batch,
            # query_heads]
            along = torch.einsum("wbhrd,bhrd->wbh", changes[layer], gradient)
            rows[:, s, layer] = along.reshape(len(windows), len(batch), scores.heads, -1).sum(-1).permute(1, 2, 0)
        step()
    return rows.reshape(-1, *shape[2:]).cpu()
