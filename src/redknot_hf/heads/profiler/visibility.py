"""The one visibility rule as plain torch: per-head sinks and windows, in memory linear in the context.

A query at position p sees the keys j <= p with j < sink or j > p - window, intersected with the model's own sliding
window. Heads of a layer that share (sink, window) are served together; a windowed head reads only the keys its rows can
see. This is the profiler's stand-in for the deployed kernels: same rule, no pages, differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .intercept import AttentionCall, Handler

__all__ = ["KEEP_ALL", "HeadMap", "attend", "visible_attention", "windowed_handler"]

KEEP_ALL = 2**30
"""Window of a head that keeps every token."""

_QUERY_BLOCK = 512


@dataclass(frozen=True)
class HeadMap:
    """Sink and window of every (layer, KV head); `KEEP_ALL` marks heads that evict nothing.

    Attributes:
        sink: `[layers][heads]` tokens.
        window: `[layers][heads]` tokens, counting the current one.
    """

    sink: tuple[tuple[int, ...], ...]
    window: tuple[tuple[int, ...], ...]

    @classmethod
    def uniform(cls, layers: int, heads: int, sink: int, window: int, keep: Any = ()) -> HeadMap:
        """One sink and window for all heads but those in `keep`, a collection of `(layer, head)`."""
        keep = set(keep)
        rows = range(layers)
        windows = tuple(tuple(KEEP_ALL if (l, h) in keep else window for h in range(heads)) for l in rows)
        sinks = tuple(tuple(0 if (l, h) in keep else sink for h in range(heads)) for l in rows)
        return cls(sinks, windows)

    @classmethod
    def from_profile(cls, profile: Any) -> HeadMap:
        """The map of a `HeadProfile`: only heads of class "local" have a window."""
        local = [[name == "local" for name in row] for row in profile.head_class]
        rows = range(profile.num_layers)
        heads = range(profile.num_kv_heads)
        return cls(
            tuple(tuple(profile.sink[l][h] if local[l][h] else 0 for h in heads) for l in rows),
            tuple(tuple(profile.window[l][h] if local[l][h] else KEEP_ALL for h in heads) for l in rows),
        )


def windowed_handler(head_map: HeadMap) -> Handler:
    """A handler for `intercept` that applies a head map."""

    def handler(call: AttentionCall) -> Tensor:
        return visible_attention(call, head_map.sink[call.layer], head_map.window[call.layer])

    return handler


def visible_attention(
    call: AttentionCall, sink: tuple[int, ...] | None = None, window: tuple[int, ...] | None = None
) -> Tensor:
    """Attention of one layer under per-head sinks and windows (default: every head keeps all).

    Args:
        call: the layer's inputs.
        sink: `[kv_heads]` tokens.
        window: `[kv_heads]` tokens.

    Returns:
        `[batch, query_heads, rows, value_dim]`, in the dtype of `call.value`.
    """
    heads = call.key.shape[1]
    total = call.key.shape[2]
    if window is None or sink is None:
        return _group_attention(call, 0, KEEP_ALL)
    groups: dict[tuple[int, int], list[int]] = {}
    for head in range(heads):
        # A window that covers the whole context is no window: fewer, larger groups.
        key = (sink[head], window[head]) if window[head] < total else (0, KEEP_ALL)
        groups.setdefault(key, []).append(head)
    if len(groups) == 1:
        return _group_attention(call, *next(iter(groups)))

    order: list[int] = []
    outputs = []
    device = call.query.device
    for (s, w), members in groups.items():
        rows = [head * call.groups + g for head in members for g in range(call.groups)]
        pick, pick_rows = _index(tuple(members), device), _index(tuple(rows), device)
        part = AttentionCall(
            call.layer,
            call.query.index_select(1, pick_rows),
            call.key.index_select(1, pick),
            call.value.index_select(1, pick),
            call.scaling,
            call.model_window,
            call.softcap,
            None if call.sink_logits is None else call.sink_logits[pick_rows],
        )
        outputs.append(_group_attention(part, s, w))
        order += rows
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(outputs, dim=1).index_select(1, _index(tuple(inverse), device))


@lru_cache(maxsize=1024)
def _index(entries: tuple[int, ...], device: torch.device) -> Tensor:
    """Head indices on the device; kept, because every copy to it makes Python wait for all work before."""
    with torch.inference_mode(False):
        return torch.tensor(entries, device=device)


def _group_attention(call: AttentionCall, sink: int, window: int) -> Tensor:
    rows, total, offset = call.query.shape[2], call.key.shape[2], call.offset
    span = min(window, call.model_window) if call.model_window else window
    if span >= total and call.softcap is None and call.sink_logits is None and (offset == 0 or rows == 1):
        key = call.key.repeat_interleave(call.groups, dim=1)
        value = call.value.repeat_interleave(call.groups, dim=1)
        return F.scaled_dot_product_attention(call.query, key, value, is_causal=offset == 0, scale=call.scaling)
    device = call.query.device
    outputs = []
    for start in range(0, rows, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, rows)
        first, end = offset + start, offset + stop
        low = max(0, first - span + 1)
        if low <= sink:
            keys = torch.arange(end, device=device)
            key, value = call.key[:, :, :end], call.value[:, :, :end]
        else:
            keys = torch.cat([torch.arange(sink, device=device), torch.arange(low, end, device=device)])
            key = torch.cat([call.key[:, :, :sink], call.key[:, :, low:end]], dim=2)
            value = torch.cat([call.value[:, :, :sink], call.value[:, :, low:end]], dim=2)
        positions = torch.arange(first, end, device=device)[:, None]
        visible = (keys <= positions) & ((keys < sink) | (keys > positions - span))
        if call.model_window:
            visible &= keys > positions - call.model_window
        outputs.append(attend(call, call.query[:, :, start:stop], key, value, visible))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def attend(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Masked attention of some rows over some keys.

    Args:
        call: where scaling, softcap and sink logits come from.
        query: `[batch, query_heads, rows, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`; value likewise.
        visible: bool `[rows, keys]`.

    Returns:
        `[batch, query_heads, rows, value_dim]`.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # Query heads of a group become rows of one KV head: the keys are never copied per query head.
    folded = query.reshape(batch, kv_heads, groups * rows, dim)
    if call.softcap is None and call.sink_logits is None:
        mask = visible if groups == 1 else visible.repeat(groups, 1)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=call.scaling)
        return out.reshape(batch, heads, rows, value.shape[3])
    scores = (folded @ key.transpose(2, 3)).float() * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.reshape(batch, heads, rows, -1).masked_fill(~visible, float("-inf"))
    if call.sink_logits is not None:
        extra = call.sink_logits.float().reshape(1, heads, 1, 1).expand(batch, heads, rows, 1)
        weights = torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights.to(value.dtype).reshape(batch, kv_heads, groups * rows, -1) @ value
    return out.reshape(batch, heads, rows, value.shape[3])
