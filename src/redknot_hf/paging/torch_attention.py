"""Attention over pages in plain PyTorch: the path of CPUs and of GPUs that the Triton kernels do not serve.

Every function obeys the visibility rule

    a query at position p sees  {j <= p} & ({j < sink} | {j > p - window}),  each key once,

intersected with the model's own sliding window. Heads with the same sink and window go through one call. Heads that
keep everything are read as views of the pool where their pages lie side by side; local heads cost O(tokens * window).

Shapes: ``q [batch, q_heads, n, dim]``, ``k, v [batch, kv_heads, n, dim]``; outputs ``[batch, n, q_heads, value_dim]``.
Chunks are compact: row ``b`` holds ``new[b]`` real tokens in its first columns, what follows is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from .pages import KEEP_ALL, LayerPages
from .pool import upload
from .varying_sdpa import varying_sdpa

BLOCK_ROWS = 1024  # query rows of one masked call: bounds the mask, not the result
BAND_TOKENS = 16384  # query rows of one banded call: bounds the copies of keys and values
SCORE_ELEMENTS = 1 << 26  # elements of one explicit score matrix (softcap, attention sinks)


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer's attention is, apart from its keys.

    Args:
        scale: factor of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        s_aux: fp32 ``[q_heads]``, the logit of an attention sink that takes probability and gives no value, or None.
        model_window: the model's own sliding window (tokens, the current one counted); 0 for none.
    """

    scale: float
    softcap: float = 0.0
    s_aux: torch.Tensor | None = None
    model_window: int = 0

    @property
    def plain(self) -> bool:
        return self.softcap == 0.0 and self.s_aux is None


def decode(pages: LayerPages, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """One query per row, at the position of the row's last stored token. ``q [batch, q_heads, 1, dim]``."""
    batch, q_heads, _, dim = q.shape
    group = q_heads // pages.num_heads
    packed = q.reshape(batch, pages.num_heads, group, dim)
    parts = []
    if len(pages.full_heads):
        heads = pages.full_heads
        parts.append((heads, _decode_full(pages, _pick(packed, heads, pages.num_heads), spec, heads)))
    if len(pages.ring_heads) and (pages.far is None or len(pages.far.heads) < len(pages.ring_heads)):
        heads = pages.ring_heads
        parts.append((heads, _decode_ring(pages, _pick(packed, heads, pages.num_heads), spec, heads)))
    if pages.far is not None:  # overrides what the rings of near tokens gave for these heads
        parts.append((pages.far.heads, pages.far.decode(_pick(packed, pages.far.heads, pages.num_heads), spec)))
    return _join(parts, pages.num_heads).reshape(batch, 1, q_heads, -1)


def _decode_full(pages: LayerPages, q: torch.Tensor, spec: AttentionSpec, heads: np.ndarray) -> torch.Tensor:
    length = int(pages.lens[0])
    if (pages.lens == length).all():
        views = pages.full_views()
        k, v = views if views is not None else _full_copies(pages, heads, length)
        return _attend(q, k[:, :, :length], v[:, :, :length], None, spec, heads, q.shape[2])
    # row by row over its own tokens, wherever its pages lie: a fork moves pages and must not change a bit
    copies: tuple[torch.Tensor, torch.Tensor] | None = None
    outs = []
    for row, end in enumerate(pages.lens.tolist()):
        views = pages.full_views(row)
        if views is None:
            copies = copies or _full_copies(pages, heads, int(pages.lens.max()))
            views = copies[0][row : row + 1], copies[1][row : row + 1]
        k, v = views
        outs.append(_attend(q[row : row + 1], k[:, :, :end], v[:, :, :end], None, spec, heads, q.shape[2]))
    return torch.cat(outs)


def _full_copies(pages: LayerPages, heads: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = pages.copies(heads, -(-length // pages.pool.page_size))
    return k[:, :, :length], v[:, :, :length]


def _decode_ring(pages: LayerPages, q: torch.Tensor, spec: AttentionSpec, heads: np.ndarray) -> torch.Tensor:
    k, v = pages.ring_slots()
    stored = pages.stored()[:, heads]
    count = int(stored[0, 0])
    # a ring of exactly `window` slots holds nothing invisible, so its order does not matter
    if pages.rollback == 0 and not spec.model_window and (stored == count).all():
        return _attend(q, k[:, :, :count], v[:, :, :count], None, spec, heads, q.shape[2])
    slot = np.arange(k.shape[2])
    sink, ring = pages.sink[heads][:, None], pages.ring[heads][:, None].astype(np.int64)
    last = pages.lens[:, None, None] - 1
    wrapped = last - (last - slot) % ring  # the newest position that falls into this slot
    position = np.where((slot < sink) | (last < sink + ring), slot, wrapped)
    seen = (slot < stored[..., None]) & visible(last, position, sink, pages.window[heads][:, None], spec.model_window)
    if pages.rollback or spec.model_window:
        # what is kept without being seen may hold anything, and a weight of zero would not keep a NaN out
        hidden = upload(~seen, q.device)[..., None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return _attend(q, k, v, upload(seen[:, :, None], q.device), spec, heads, q.shape[2])


def visible(query: np.ndarray, key: np.ndarray, sink: np.ndarray, window: np.ndarray, model_window: int) -> np.ndarray:
    """The visibility rule on positions of any shapes that broadcast; negative keys are never visible."""
    seen = (key >= 0) & (key <= query) & ((key < sink) | (key > query - window))
    return seen & (key > query - model_window) if model_window else seen


def prefill(
    pages: LayerPages,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    new: np.ndarray,
    spec: AttentionSpec,
    unwindowed: bool = False,
    commit: bool = True,
) -> torch.Tensor:
    """A chunk of queries over the stored past and over its own keys; stores the chunk if ``commit``.

    ``pages.prepare(new)`` must have been called. ``unwindowed`` lets local heads see the whole chunk (full-attention
    prefill; eviction still follows).
    """
    batch, q_heads, length, _ = q.shape
    group = q_heads // pages.num_heads
    grouped = q.unflatten(1, (pages.num_heads, group))
    parts = []
    for heads in _same_window(pages):
        mine = _pick(grouped, heads, pages.num_heads)
        parts.append((heads, _prefill_ring(pages, mine, k, v, new, spec, heads, unwindowed)))
    if pages.far is not None:
        heads = pages.far.heads
        parts.append((heads, pages.far.prefill(_pick(grouped, heads, pages.num_heads), k, v, new, spec)))
    past = pages.lens
    if commit:
        pages.write(k, v, new)
        pages.advance(new)
    if len(pages.full_heads):
        heads = pages.full_heads
        mine = _pick(grouped, heads, pages.num_heads)
        parts.append((heads, _prefill_full(pages, mine, k, v, past, new, spec, heads, commit)))
    return _join(parts, pages.num_heads).flatten(1, 2).transpose(1, 2).contiguous()


def _same_window(pages: LayerPages) -> Iterator[np.ndarray]:
    heads = pages.ring_heads if pages.far is None else np.setdiff1d(pages.ring_heads, pages.far.heads)
    kinds = np.stack([pages.sink[heads], pages.window[heads]], 1)
    for kind in np.unique(kinds, axis=0):
        yield heads[(kinds == kind).all(1)]


def _prefill_full(
    pages: LayerPages,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: np.ndarray,
    new: np.ndarray,
    spec: AttentionSpec,
    heads: np.ndarray,
    stored: bool,
) -> torch.Tensor:
    length, start = q.shape[3], int(past[0])
    uniform = (past == start).all() and (new == length).all()
    if uniform and start == 0 and spec.plain and length > 1:
        keys, values = _pick(k, heads, pages.num_heads), _pick(v, heads, pages.num_heads)
        out = scaled_dot_product_attention(
            q.flatten(1, 2), keys, values, is_causal=True, scale=spec.scale, enable_gqa=q.shape[2] > 1
        )
        return out.unflatten(1, (len(heads), q.shape[2]))
    longest = int(past.max())
    if stored and uniform:
        views = pages.full_views()
        keys, values = views if views is not None else _full_copies(pages, heads, start + length)
        key_pos = np.arange(start + length)[None]
        keys, values = keys[:, :, : start + length], values[:, :, : start + length]
    else:
        keys, values = _pick(k, heads, pages.num_heads), _pick(v, heads, pages.num_heads)
        key_pos = past[:, None] + np.arange(length)
        if longest:
            old_k, old_v = _full_copies(pages, heads, longest)
            keys, values = torch.cat([old_k, keys], 2), torch.cat([old_v, values], 2)
            old = np.broadcast_to(np.arange(longest), (len(past), longest))
            key_pos = np.concatenate([np.where(old < past[:, None], old, -1), key_pos], 1)
        if uniform:
            key_pos = key_pos[:1]
    query_pos = (past[:1] if uniform else past)[:, None] + np.arange(length)
    everything = np.array(KEEP_ALL)
    outs = []
    for begin in range(0, length, BLOCK_ROWS):
        block = slice(begin, min(begin + BLOCK_ROWS, length))
        reach = start + block.stop if uniform else keys.shape[2]
        seen = visible(query_pos[:, block, None], key_pos[:, None, :reach], np.array(0), everything, 0)
        mask = upload(seen[:, None], q.device)
        outs.append(_attend_grouped(q[:, :, :, block], keys[:, :, :reach], values[:, :, :reach], mask, spec, heads))
    return torch.cat(outs, 3) if len(outs) > 1 else outs[0]


def _prefill_ring(
    pages: LayerPages,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    new: np.ndarray,
    spec: AttentionSpec,
    heads: np.ndarray,
    unwindowed: bool,
) -> torch.Tensor:
    """Local heads of one (sink, window): the last ``window - 1`` stored tokens, the sinks and the chunk."""
    past, length = pages.lens, q.shape[3]
    sink, window = int(pages.sink[heads[0]]), int(pages.window[heads[0]])
    index = upload(heads, k.device)
    k, v = k.index_select(1, index), v.index_select(1, index)
    reach = min(window - 1, int(past.max()))
    recent = past[:, None] - reach + np.arange(reach)
    sinks = np.broadcast_to(np.arange(sink), (len(past), sink))
    key_pos = np.concatenate([recent, past[:, None] + np.arange(length)], 1)
    key_pos = np.where(key_pos >= sink, key_pos, -1)  # the sinks are seen apart, and once
    if reach:
        old_k, old_v = pages.gather(recent, heads)
        if (recent < 0).any():  # rows with a shorter past: whatever was read there must at least be finite
            gone = upload(recent < 0, k.device)[:, None, :, None]
            old_k, old_v = old_k.masked_fill(gone, 0), old_v.masked_fill(gone, 0)
        keys, values = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
    else:
        keys, values = k, v
    sink_k, sink_v, sink_pos = _sink_keys(pages, k, v, sinks, past, new, heads)
    query_pos = past[:, None] + np.arange(length)
    if (past == past[0]).all() and (new == new[0]).all():
        key_pos, query_pos, sink_pos = key_pos[:1], query_pos[:1], sink_pos[:1]
    if unwindowed:
        window = KEEP_ALL
    block = int(min(max(64, 1 << (window - 1).bit_length()), 256))
    if unwindowed or length <= 2 * block:
        outs = []
        for begin in range(0, length, BLOCK_ROWS):
            rows = slice(begin, min(begin + BLOCK_ROWS, length))
            end = reach + rows.stop
            positions = np.concatenate([sink_pos, key_pos[:, :end]], 1)[:, None]
            seen = visible(query_pos[:, rows, None], positions, np.array(sink), np.array(window), spec.model_window)
            mask = upload(seen[:, None], q.device)
            both_k, both_v = torch.cat([sink_k, keys[:, :, :end]], 2), torch.cat([sink_v, values[:, :, :end]], 2)
            outs.append(_attend_grouped(q[:, :, :, rows], both_k, both_v, mask, spec, heads))
        return torch.cat(outs, 3) if len(outs) > 1 else outs[0]
    return _banded(q, keys, values, sink_k, sink_v, query_pos, key_pos, sink_pos, window, block, reach, spec, heads)


def _sink_keys(
    pages: LayerPages,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: np.ndarray,
    past: np.ndarray,
    new: np.ndarray,
    heads: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Keys, values and positions of the sinks, from the pages where stored and else from the chunk; -1 if not yet seen."""
    stored = sinks < past[:, None]
    column = np.clip(sinks - past[:, None], 0, k.shape[2] - 1)
    where = upload(column, k.device)[:, None, :, None]
    fresh_k = k.gather(2, where.expand(-1, k.shape[1], -1, k.shape[3]))
    fresh_v = v.gather(2, where.expand(-1, v.shape[1], -1, v.shape[3]))
    position = np.where(sinks < (past + new)[:, None], sinks, -1)
    if stored.any():
        old_k, old_v = pages.gather(sinks, heads)
        old = upload(stored, k.device)[:, None, :, None]
        fresh_k, fresh_v = torch.where(old, old_k, fresh_k), torch.where(old, old_v, fresh_v)
    return fresh_k, fresh_v, position


def _banded(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    query_pos: np.ndarray,
    key_pos: np.ndarray,
    sink_pos: np.ndarray,
    window: int,
    block: int,
    reach: int,
    spec: AttentionSpec,
    heads: np.ndarray,
) -> torch.Tensor:
    """Blocks of queries, each over the sinks and the ``window - 1 + block`` keys before its end."""
    batch, kv_heads, group, length, _ = q.shape
    span = window - 1 + block
    lead = window - 1 - reach  # keys that would lie before the first one there is
    blocks = -(-length // block)
    trail = blocks * block - length
    keys = torch.nn.functional.pad(keys, (0, 0, lead, trail))
    values = torch.nn.functional.pad(values, (0, 0, lead, trail))
    q = torch.nn.functional.pad(q, (0, 0, 0, trail))
    key_pos = np.pad(key_pos, ((0, 0), (lead, trail)), constant_values=-1)
    query_pos = np.pad(query_pos, ((0, 0), (0, trail)), constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(key_pos, span, axis=1)[:, ::block]
    spec_rows, outs = sink_pos.shape[1], []
    step = max(1, BAND_TOKENS // block)
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        part = slice(first * block, (first + count) * block)
        band_k = keys[:, :, first * block : (first + count) * block + window - 1].unfold(2, span, block)
        band_v = values[:, :, first * block : (first + count) * block + window - 1].unfold(2, span, block)
        # [batch, count, kv_heads, sinks + span, dim]
        band_k = torch.cat([_spread(sink_k, count), band_k.permute(0, 2, 1, 4, 3)], 3)
        band_v = torch.cat([_spread(sink_v, count), band_v.permute(0, 2, 1, 4, 3)], 3)
        near = windows[:, first : first + count]
        far = np.broadcast_to(sink_pos[:, None], (len(sink_pos), count, spec_rows))
        positions = np.concatenate([far, near], 2)[:, :, None]
        rows = query_pos[:, part].reshape(len(query_pos), count, block, 1)
        seen = visible(rows, positions, np.array(spec_rows), np.array(window), spec.model_window)
        mask = upload(seen, q.device)
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        tile = q[:, :, :, part].unflatten(3, (count, block)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        out = _attend_grouped(tile, band_k.flatten(0, 1), band_v.flatten(0, 1), mask, spec, heads)
        outs.append(out.unflatten(0, (batch, count)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4))
    return (torch.cat(outs, 3) if len(outs) > 1 else outs[0])[:, :, :, :length]


def _spread(x: torch.Tensor, count: int) -> torch.Tensor:
    return x[:, None].expand(-1, count, -1, -1, -1)


def masked(
    pages: LayerPages,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: torch.Tensor,
    positions: np.ndarray,
    spec: AttentionSpec,
) -> torch.Tensor:
    """A first chunk under a mask that is not causal, intersected with what each head may see.

    Args:
        q, k, v: the chunk as it came, padding included.
        pattern: bool ``[batch|1, 1, n, n]``, True where the model lets a query see a key.
        positions: ``[batch, n]``, the request position of every column (padding: any).
    """
    grouped = q.unflatten(1, (pages.num_heads, q.shape[1] // pages.num_heads))
    parts = []
    everything = pages.full_heads if pages.far is None else np.union1d(pages.full_heads, pages.far.heads)
    for heads in [*_same_window(pages), everything]:
        if not len(heads):
            continue
        key, query = positions[:, None], positions[:, :, None]
        window = KEEP_ALL if heads is everything else int(pages.window[heads[0]])
        seen = (key < pages.sink[heads[0]]) | (key > query - window)
        if spec.model_window:
            seen &= key > query - spec.model_window
        mine = _pick(grouped, heads, pages.num_heads)
        keys, values = _pick(k, heads, pages.num_heads), _pick(v, heads, pages.num_heads)
        mask = pattern & upload(seen[:, None], pattern.device)
        parts.append((heads, _attend_grouped(mine, keys, values, mask, spec, heads)))
    return _join(parts, pages.num_heads).flatten(1, 2).transpose(1, 2).contiguous()


def _attend_grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, spec: AttentionSpec, heads: np.ndarray
) -> torch.Tensor:
    """``q [batch, heads, group, n, dim]``, ``mask [batch|1, 1, n, keys]``: the group rides along as query rows."""
    group = q.shape[2]
    if group > 1:
        mask = mask.repeat(1, 1, group, 1)
    out = _attend(q.flatten(2, 3), k, v, mask, spec, heads, group)
    return out.unflatten(2, (group, -1))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    spec: AttentionSpec,
    heads: np.ndarray,
    group: int,
) -> torch.Tensor:
    """``q [batch, heads, group * n, dim]`` over ``k, v``; ``mask`` is True where seen. Rows that see nothing give 0."""
    if spec.plain:
        return varying_sdpa(q, k, v, mask, spec.scale)
    aux = None
    if spec.s_aux is not None:
        index = upload(heads, spec.s_aux.device)
        aux = spec.s_aux.float().view(-1, group)[index].to(q.device).repeat_interleave(q.shape[2] // group, 1)
    step = max(1, SCORE_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    keys, values = k.float().transpose(2, 3), v.float()
    outs = []
    for begin in range(0, q.shape[2], step):
        rows = slice(begin, begin + step)
        scores = q[:, :, rows].float() @ keys * spec.scale
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        if mask is not None:
            # one row of a mask may stand for all query rows
            hidden = ~(mask[:, :, rows] if mask.shape[2] > 1 else mask)
            scores = scores.masked_fill(hidden, float("-inf"))
        top = scores.amax(-1, keepdim=True)
        if aux is not None:
            top = torch.maximum(top, aux[None, :, rows, None])
        top = top.masked_fill(top == float("-inf"), 0.0)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if aux is not None:
            total = total + torch.exp(aux[None, :, rows, None] - top)
        outs.append((weights @ values / total.clamp_min(torch.finfo(torch.float32).tiny)).to(q.dtype))
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def _pick(x: torch.Tensor, heads: np.ndarray, num_heads: int) -> torch.Tensor:
    return x if len(heads) == num_heads else x.index_select(1, upload(heads, x.device))


def _join(parts: list[tuple[np.ndarray, torch.Tensor]], num_heads: int) -> torch.Tensor:
    """Put the results of groups of heads, ``[batch, heads, ...]``, back into the order of the heads."""
    if len(parts) == 1 and len(parts[0][0]) == num_heads:
        return parts[0][1]
    first = parts[0][1]
    out = first.new_empty((first.shape[0], num_heads, *first.shape[2:]))
    for heads, part in parts:
        out.index_copy_(1, upload(heads, out.device), part)
    return out
