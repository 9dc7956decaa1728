"""Attention that rows receive from the last queries of a forward.

The attention function shows every call to its observers before it runs; `attention_call_mass` computes from such a call
the probabilities of the last queries over all keys that they see. That costs one small product per layer,
``queries * keys * dim``, and no pass of the model. `splice_call_mass` does the same for rows computed over stored ones.

Visibility is that of the call: causal or the given mask, padding, the sinks and windows of local heads, the model's own
sliding window, softcap and attention sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..attention import HANDLE
from ..masks import RedKnotMask
from ..paging.pages import KEEP_ALL
from ..paging.pool import upload
from ..segments.rows import RowSet, attention_weights

__all__ = ["Geometry", "attention_call_mass", "last_rows", "received_mass", "splice_call_mass"]

SCORES = {
    "cpu": 1 << 20,
    "cuda": 1 << 26,
}  # elements of one fp32 score matrix: what stays in a CPU's cache, a GPU's memory


class Geometry:
    """Positions and visibility that the layers of one forward share, by what they follow from."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def of(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returned for this key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def received_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    seen: torch.Tensor,
    counts: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    open_keys: int = 0,
) -> torch.Tensor:
    """Softmax of ``q k^T`` over the keys that each query sees, summed over queries and heads.

    Args:
        q: ``[batch, q_heads, n, dim]``.
        k: ``[batch, kv_heads, keys, dim]``.
        seen: bool, broadcastable to ``[batch, kv_heads, n, keys]``.
        counts: bool ``[batch, n]``, queries that count; None for all.
        scale, softcap, s_aux: of the attention call.
        open_keys: so many keys, from the first, are known to be seen by every query of every sequence.

    Returns:
        fp32 ``[batch, keys]``.
    """
    batch, kv_heads, keys, dim = k.shape
    # scores from 16-bit products are rounded once more, which ranks rows no worse than the model's own rounding
    dtype = q.dtype if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) else torch.float32
    grouped = q.to(dtype).unflatten(1, (kv_heads, -1))
    group, n = grouped.shape[2:4]
    all_ask = counts is None and open_keys > 0
    asks = None if all_ask else _asking(seen, counts).expand(batch, -1, group, -1).float()
    hidden = ~seen[..., open_keys:]
    at_once = max(1, SCORES.get(q.device.type, 1 << 26) // max(1, batch * group * n * keys))
    total = q.new_zeros(batch, keys, dtype=torch.float32)
    for first in range(0, kv_heads, at_once):
        heads = slice(first, first + at_once)
        some, other = grouped[:, heads].reshape(-1, group * n, dim), k[:, heads].to(dtype).reshape(-1, keys, dim)
        if dtype == torch.float32:
            scores = (some * scale) @ other.transpose(1, 2)  # baddbmm takes twice as long on a CPU
        else:  # scaled before it is rounded
            scores = torch.baddbmm(some.new_empty(1), some, other.transpose(1, 2), beta=0, alpha=scale)
        scores = scores.view(batch, -1, group, n, keys)
        if softcap:
            scores = torch.tanh(scores.float() / softcap) * softcap
        if hidden.shape[-1]:
            mine = (hidden if hidden.shape[1] == 1 else hidden[:, heads])[:, :, None]
            # not -inf: a query that sees nothing must not become NaN
            scores[..., open_keys:].masked_fill_(mine, torch.finfo(scores.dtype).min)
        if s_aux is not None:
            extra = s_aux.float().view(1, kv_heads, group, 1, 1)[:, heads].expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores.float(), extra], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1, dtype=torch.float32)  # reads 16-bit scores as they are
        if asks is None:
            total += weights.flatten(1, 3).sum(1)
        else:
            mine = asks if asks.shape[1] == 1 else asks[:, heads]
            mine = mine.expand(-1, weights.shape[1], -1, -1)
            # a product instead of a sum: one pass over the weights
            total += (mine.reshape(batch, 1, -1) @ weights.reshape(batch, -1, keys))[:, 0]
    return total


def _asking(seen: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """bool ``[batch or 1, kv_heads or 1, 1, n]``: queries that count. One that sees nothing is padding."""
    asks = seen.any(-1)
    if counts is not None:
        asks = asks & counts[:, None]
    return asks[:, :, None]


def last_rows(count: int, rows: int, real: torch.Tensor | None) -> tuple[torch.Tensor | slice, torch.Tensor | None]:
    """The last ``count`` real rows of every sequence.

    Args:
        real: bool ``[batch, rows]``, False for padding; None without.

    Returns:
        A slice and None without padding; else int64 ``[batch, count]`` and bool ``[batch, count]``: which are real.
    """
    count = min(count, rows)
    if real is None:
        return slice(rows - count, rows), None
    order = torch.argsort(real.byte(), dim=1, stable=True)[:, rows - count :]  # padding first, then the real ones
    return order, real.gather(1, order)


def attention_call_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    scale: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    sliding_window: int | None,
    real: torch.Tensor | None,
    count: int,
    past: int,
    geometry: Geometry | None = None,
) -> torch.Tensor | None:
    """Mass that this forward's rows receive from its last queries, from one call of the attention function.

    Args:
        query: ``[batch, q_heads, n, dim]``; key: as the cache returned it.
        mask: what the attention function gets.
        real: bool ``[batch, n]``, or None without padding.
        count: queries that count, from the end.
        past: tokens (padding counted) that the cache held before this forward.
        geometry: of the forward, if several of its layers are asked.

    Returns:
        fp32 ``[batch, n]``; None where the call does not tell (keys of another sequence, cold pages).
    """
    n = query.shape[2]
    rows, counts = last_rows(count, n, real)
    last = query[:, :, rows] if isinstance(rows, slice) else _take_rows(query, rows)
    handle = getattr(key, HANDLE, None)
    if handle is not None:
        found = _paged(handle, key, mask, sliding_window, rows, real, geometry or Geometry())
        if found is None:
            return None
        keys, seen, open_keys = found
    else:
        keys = key
        visible = _ordinary(key, mask, n, rows, past)
        if visible is None:
            return None
        seen, open_keys = visible, 0
        if mask is None and isinstance(rows, slice):
            open_keys = past + rows.start + 1
    total = received_mass(last, keys, seen, counts, scale, softcap, s_aux, open_keys)
    start = keys.shape[2] - n if handle is not None or keys.shape[2] < past + n else past
    return total[:, start : start + n]


def _take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _ordinary(key: torch.Tensor, mask: Any, n: int, rows: torch.Tensor | slice, past: int) -> torch.Tensor | None:
    """bool ``[batch or 1, 1 or heads, count, keys]`` for a call over plain tensors."""
    keys = key.shape[2]
    if keys < n:
        return None  # attention over another sequence
    if isinstance(mask, RedKnotMask):
        mask = mask.dense()
    if mask is None:
        index = torch.arange(n, device=key.device)
        index = index[rows][None] if isinstance(rows, slice) else rows
        # no mask: plain causal. Keys of a static cache go on behind the last query, so the ends do not line up
        return (torch.arange(keys, device=key.device) <= index[..., None] + past)[:, None]
    if mask.shape[2] != n or mask.shape[1] != 1:
        return None
    mask = mask[..., :keys]
    if isinstance(rows, slice):
        chosen = mask[:, :, rows]
    else:
        chosen = mask.expand(key.shape[0], -1, -1, -1).gather(
            2, rows[:, None, :, None].expand(-1, 1, -1, mask.shape[3])
        )
    return chosen if chosen.dtype == torch.bool else chosen > torch.finfo(chosen.dtype).min / 2


def _paged(
    handle: Any,
    key: torch.Tensor,
    mask: Any,
    sliding_window: int | None,
    rows: torch.Tensor | slice,
    real: torch.Tensor | None,
    geometry: Geometry,
) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """Keys (stored ones, then the chunk's), visibility ``[batch, kv_heads, count, keys]``, and how many keys, from the
    first, all queries see for sure, for a `RedKnotCache`."""
    layer = handle.layer
    step = getattr(handle, "step", None)
    if step is None:
        return None
    batch, heads, n, _ = key.shape
    pages, device = layer.pages, key.device
    past = np.zeros(batch, np.int64) if pages is None else pages.lens
    longest = int(past.max())
    if longest and layer.cache.tier is not None:
        return None  # far keys may be cold
    keys = key
    if longest:
        keys = torch.cat([pages.gather(np.arange(longest), np.arange(heads))[0].to(key.dtype), key], 2)

    def positions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        held = torch.arange(longest, device=device)
        if real is None and (past == longest).all():
            old: Any = torch.full((1,), longest, device=device)  # one line of positions for all sequences
        else:
            old = upload(past, device)
        if real is None:
            fresh = old[:, None] + torch.arange(n, device=device)
        else:
            fresh = torch.where(real, old[:, None] + real.cumsum(1) - 1, -1)
        position = torch.cat([torch.where(held < old[:, None], held, -1), fresh], 1).int()  # of every key, -1 for none
        mine = (fresh[:, rows] if isinstance(rows, slice) else fresh.gather(1, rows)).int()
        p, j = mine[:, None, :, None], position[:, None, None]
        seen = j <= p
        return p, j, seen & (j >= 0) if real is not None or longest else seen

    place = (device, n, past.tobytes())
    p, j, seen = geometry.of(place, positions)
    open_keys = longest + rows.start + 1 if isinstance(rows, slice) and (past == longest).all() else 0
    sink, window = np.asarray(layer.sink, np.int64), np.asarray(layer.window, np.int64)
    if (window < KEEP_ALL).any() and not (layer.cache.prefill == "full" and step.start == 0):

        def windowed() -> torch.Tensor:
            s = upload(sink.astype(np.int32), device)[:, None, None]
            w = upload(window.astype(np.int32), device)[:, None, None]
            return seen & ((j < s) | (j > p - w))

        seen, open_keys = geometry.of((*place, sink.tobytes(), window.tobytes()), windowed), 0
    model_window = sliding_window or layer.model_window
    if model_window:
        seen, open_keys = seen & (j > p - model_window), 0
    if mask is not None and not (isinstance(mask, RedKnotMask) and mask.is_causal):
        pattern = _ordinary(key, mask, n, rows, 0)
        if pattern is None or longest:
            return None
        seen, open_keys = seen & pattern, 0
    return keys, seen, open_keys


def splice_call_mass(
    query: torch.Tensor, rows: RowSet, layer: Any, spec: Any, queries: np.ndarray, length: int
) -> torch.Tensor:
    """Mass that computed rows receive from some of them, over the stored and computed keys of a splice.

    Args:
        query: ``[batch, q_heads, n, dim]`` of the rows.
        layer: the `SpliceLayer`, the rows' keys already in place.
        queries: int64, which of the rows ask.
        length: tokens of the prompt.

    Returns:
        fp32 ``[batch, n]``.
    """
    index = torch.from_numpy(queries).to(query.device)
    some = query.index_select(2, index)
    weights = attention_weights(some, rows.take(queries), layer.k[:, :, :length], layer.sink, layer.window, spec)
    return weights.sum((1, 2, 3)).index_select(1, rows.positions)
