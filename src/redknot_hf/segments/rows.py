"""Which rows of a prompt a forward computes, and attention of such rows over linear storage.

A splice computes some rows of a prompt and takes the rest from stored segments. The rows have increasing positions
with gaps between them. Storage is linear: the key of position ``p`` lies in slot ``p``. A row at position ``p`` of a
head with ``sink`` and ``window`` sees

    {j <= p} & ({j < sink} | {j > p - window}),  each key once,

intersected with the model's own sliding window. Rows are taken in blocks: a block of a head that keeps everything
reads the keys up to its last row, a block of a local head the sinks and the keys from its first row's window on, so
that a local row costs O(window) and not O(prompt).

This module knows nothing of segments or models. On NVIDIA GPUs the operator ``segpaged_attention.prefill_positions``
serves the same function.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import segpaged_attention
import torch
from torch.nn.functional import scaled_dot_product_attention

from ..paging import torch_attention
from ..paging.pages import KEEP_ALL
from ..paging.torch_attention import AttentionSpec

__all__ = ["PAGE", "RowSet", "attend_rows", "attention_weights", "kinds", "packed_weights"]

# Slots are padded to whole pages, so that the kernel can read linear storage as pages: as large as the blocks of keys
# that it multiplies best with, whatever the size of the pages is that the storage lies in.
PAGE = 128
# Rows of one masked call. A block reads the keys up to its last row: small ones waste less, large ones are fewer.
CPU_BLOCK, GPU_BLOCK = 64, 1024
CPU_TILE = 64  # query rows that torch's attention gives to one thread at a time
MASK_ELEMENTS = 1 << 27  # masks above this are made for each layer anew instead of being kept for the forward


class Block(NamedTuple):
    """Rows [start, stop) over the first ``sinks`` keys and the keys [low, high); mask [1, 1, group * rows, keys]."""

    start: int
    stop: int
    sinks: int
    low: int
    high: int
    mask: torch.Tensor


class RowSet:
    """The rows of one forward, the same in every row of the batch.

    Args:
        positions: int64 ``[n]`` on the host, strictly increasing request positions.
        device: where the forward runs.
        partial: bool ``[n]``: rows whose new keys and values replace stored ones only in some heads (see
            `SpliceCache.partial_heads`). None: every row replaces in every head.
    """

    def __init__(self, positions: np.ndarray, device: torch.device | str, partial: np.ndarray | None = None):
        self.host = np.asarray(positions, np.int64)
        self.device = torch.device(device)
        self.partial = partial if partial is not None and partial.any() else None
        self._masks: dict[tuple[int, int, int, int, torch.dtype | None], list[Block]] = {}
        self.uploaded: dict[tuple[torch.Size, bytes, bytes], tuple[torch.Tensor, ...]] = {}
        self.unseen: dict[tuple[int, bytes, bytes, int], tuple[int, torch.Tensor | None]] = {}

    def __len__(self) -> int:
        return len(self.host)

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[n]`` on the device."""
        return torch.from_numpy(self.host).to(self.device)

    @functools.cached_property
    def whole(self) -> torch.Tensor:
        """int64: which of the rows replace stored keys in every head."""
        chosen = np.arange(len(self)) if self.partial is None else np.flatnonzero(~self.partial)
        return torch.from_numpy(chosen).to(self.device)

    @functools.cached_property
    def contiguous(self) -> bool:
        return len(self) > 0 and int(self.host[-1] - self.host[0]) == len(self) - 1

    def take(self, index: np.ndarray) -> RowSet:
        """Some of the rows, by ascending index into these."""
        return RowSet(self.host[index], self.device, None if self.partial is None else self.partial[index])

    def blocks(
        self, sink: int, window: int, model_window: int, heads: int, group: int, plain: bool, like: torch.Tensor
    ) -> list[Block]:
        """The calls that heads of one sink and window take; masks are kept for the next layer while they are small.

        Args:
            heads: KV heads of the call.
            group: query heads per KV head; the rows of a mask are repeated that often.
            plain: masks may be additive, of the dtype of ``like``; otherwise they are bool.
        """
        additive = like.dtype if plain and like.device.type == "cpu" else None  # sdpa would convert them in every layer
        key = (sink, window, model_window, group, additive)
        if key not in self._masks:
            plan = list(self._plan(sink, window, heads, group))
            blocks = [self._block(*place, *key) for place in plan]
            if sum(block.mask.numel() for block in blocks) > MASK_ELEMENTS:
                return blocks
            self._masks[key] = blocks
        return self._masks[key]

    def _plan(self, sink: int, window: int, heads: int, group: int) -> Iterator[tuple[int, int, int, int, int]]:
        rows = balanced_rows(heads, group, torch.get_num_threads()) if self.device.type == "cpu" else GPU_BLOCK
        edges = np.arange(0, len(self), rows)
        if window < KEEP_ALL:  # a gap that no window reaches across would only add keys that nobody sees
            edges = np.union1d(edges, np.flatnonzero(np.diff(self.host) > max(window // 2, 32)) + 1)
        for start, stop in zip(edges, [*edges[1:], len(self)], strict=True):
            first, last = int(self.host[start]), int(self.host[stop - 1])
            low = max(0, first - window + 1) if window < KEEP_ALL else 0
            if low <= sink:
                yield int(start), int(stop), 0, 0, last + 1
            else:
                yield int(start), int(stop), sink, low, last + 1

    def _block(
        self,
        start: int,
        stop: int,
        sinks: int,
        low: int,
        high: int,
        sink: int,
        window: int,
        model_window: int,
        group: int,
        additive: torch.dtype | None,
    ) -> Block:
        query = self.positions[start:stop, None]
        keys = torch.arange(low, high, device=self.device)
        key = torch.cat([torch.arange(sinks, device=self.device), keys]) if sinks else keys
        seen = key <= query
        if window < KEEP_ALL:
            seen &= (key < sink) | (key > query - window)
        if model_window:
            seen &= key > query - model_window
        mask = seen.repeat(group, 1)
        if additive is not None:
            mask = torch.zeros(mask.shape, dtype=additive).masked_fill_(~mask, float("-inf"))
        return Block(start, stop, sinks, low, high, mask[None, None])


@functools.lru_cache
def balanced_rows(heads: int, group: int, threads: int) -> int:
    """Rows of a call of ``heads`` KV heads whose tiles come out even for so many threads, `CPU_BLOCK` to twice that."""

    def idle(rows: int) -> float:
        tiles = heads * -(-group * rows // CPU_TILE)
        return -(-tiles // threads) * threads * CPU_TILE / (heads * group * rows)

    sizes = range(CPU_BLOCK, 2 * CPU_BLOCK + 1)
    best = min(map(idle, sizes))
    return next(rows for rows in sizes if idle(rows) <= best + 0.02)


def attend_rows(
    q: torch.Tensor,
    rows: RowSet,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: np.ndarray,
    window: np.ndarray,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of the rows over everything at or before each, under the heads' rule.

    Args:
        q: ``[batch, q_heads, n, dim]``.
        k, v: ``[batch, kv_heads, slots, dim]``, contiguous, ``slots`` a multiple of `PAGE`; the rows' own keys are
            already there. Slots that are not stored must be finite.
        sink, window: int ``[kv_heads]``; ``window >= KEEP_ALL`` for heads that see everything.

    Returns:
        ``[batch, n, q_heads, value_dim]``.
    """
    if not len(rows):
        return q.new_empty(q.shape[0], 0, q.shape[1], v.shape[3])
    if _kernel_serves(q, k, v):
        return _attend_by_kernel(q, rows, k, v, sink, window, spec)
    num_heads = k.shape[1]
    grouped = q.unflatten(1, (num_heads, -1))
    parts = []
    for s, w, heads in kinds(sink, window):
        keys, values, mine = _heads(k, heads), _heads(v, heads), _heads(grouped, heads)
        if w >= KEEP_ALL and spec.plain and not spec.model_window and rows.contiguous and rows.host[0] == 0:
            n = len(rows)
            out = scaled_dot_product_attention(
                mine.flatten(1, 2),
                keys[:, :, :n],
                values[:, :, :n],
                is_causal=n > 1,
                scale=spec.scale,
                enable_gqa=mine.shape[2] > 1,
            )
            parts.append((heads, out.unflatten(1, (len(heads), -1))))
            continue
        outs = []
        group = mine.shape[2]
        for block in rows.blocks(s, w, spec.model_window, len(heads), group, spec.plain, q):
            near_k, near_v = keys[:, :, block.low : block.high], values[:, :, block.low : block.high]
            if block.sinks:
                near_k = torch.cat([keys[:, :, : block.sinks], near_k], 2)
                near_v = torch.cat([values[:, :, : block.sinks], near_v], 2)
            part = mine[:, :, :, block.start : block.stop].flatten(2, 3)
            out = torch_attention._attend(part, near_k, near_v, block.mask, spec, heads, group)
            outs.append(out.unflatten(2, (group, -1)))
        parts.append((heads, torch.cat(outs, 3) if len(outs) > 1 else outs[0]))
    return torch_attention._join(parts, num_heads).flatten(1, 2).transpose(1, 2).contiguous()


def attention_weights(
    q: torch.Tensor, rows: RowSet, k: torch.Tensor, sink: np.ndarray, window: np.ndarray, spec: AttentionSpec
) -> torch.Tensor:
    """The probabilities that `attend_rows` uses, fp32 ``[batch, kv_heads, group, n, slots]``: for a few rows only."""
    return packed_weights(q, rows, k, sink, window, spec).unflatten(2, (-1, len(rows)))


def packed_weights(
    q: torch.Tensor, rows: RowSet, k: torch.Tensor, sink: np.ndarray, window: np.ndarray, spec: AttentionSpec
) -> torch.Tensor:
    """`attention_weights` with a group's query heads behind each other, fp32 ``[batch, kv_heads, group * n, slots]``.

    The form in which they are computed and multiplied with the values. A pass over few rows is mostly the host's time,
    so what is the same in every layer is made once for ``rows``, and nothing is converted twice.
    """
    batch, heads = k.shape[:2]
    packed = (q * spec.scale).reshape(batch, heads, -1, q.shape[3])
    scores = packed.to(k.dtype) @ k.transpose(2, 3)
    if spec.softcap:
        scores = torch.tanh(scores.float() / spec.softcap) * spec.softcap
    behind, unseen = _unseen(rows, k.shape[2], sink, window, spec.model_window)
    if unseen is not None:
        by_row = scores.unflatten(2, (-1, len(rows)))
        (by_row[..., behind:] if behind else by_row).masked_fill_(unseen, float("-inf"))
    if spec.s_aux is not None:
        extra = spec.s_aux.float().view(1, heads, -1, 1).expand(batch, -1, -1, len(rows)).reshape(batch, heads, -1, 1)
        return torch.cat([scores.float(), extra], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1, dtype=torch.float32)


def _unseen(
    rows: RowSet, slots: int, sink: np.ndarray, window: np.ndarray, model_window: int
) -> tuple[int, torch.Tensor | None]:
    """What each row does not see of the slots from ``behind`` on, which is returned, too; everybody sees those before.

    Bool ``[n, slots - behind]``, or ``[1, kv_heads, 1, n, slots]`` where heads differ; None if nothing is hidden.
    """
    sink, window = np.asarray(sink, np.int64), np.asarray(window, np.int64)
    key = (slots, sink.tobytes(), window.tobytes(), model_window)
    if key not in rows.unseen:
        query = rows.positions[:, None]
        if (window >= KEEP_ALL).all() and not model_window:
            behind = min(int(rows.host[0]) + 1, slots)
            hidden = torch.arange(behind, slots, device=rows.device) > query
            rows.unseen[key] = behind, hidden if slots > int(rows.host[0]) + 1 else None
        else:
            at = torch.arange(slots, device=rows.device)
            causal = at <= query
            if model_window:
                causal &= at > query - model_window
            s, w = (torch.tensor(x, dtype=torch.int64, device=rows.device)[:, None, None] for x in (sink, window))
            seen = causal & ((at < s) | (at > query - w))
            rows.unseen[key] = 0, ~seen[None, :, None]
    return rows.unseen[key]


def kinds(sink: np.ndarray, window: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(sink, window, heads) of heads of equal sink and window, int64; remembered, as every layer asks for few answers."""
    found = _kinds(np.asarray(sink, np.int64).tobytes(), np.asarray(window, np.int64).tobytes())
    return [(s, w, heads.copy()) for s, w, heads in found]  # torch warns when it is given an array that is read-only


@functools.lru_cache(maxsize=4096)
def _kinds(sink: bytes, window: bytes) -> list[tuple[int, int, np.ndarray]]:
    pairs = np.stack([np.frombuffer(sink, np.int64), np.frombuffer(window, np.int64)], 1)
    return [(int(kind[0]), int(kind[1]), np.flatnonzero((pairs == kind).all(1))) for kind in np.unique(pairs, axis=0)]


def _heads(x: torch.Tensor, heads: np.ndarray) -> torch.Tensor:
    """``x[:, heads]``, as a view where the heads are neighbours."""
    if heads[-1] - heads[0] == len(heads) - 1:
        return x[:, int(heads[0]) : int(heads[-1]) + 1]
    return x.index_select(1, torch.from_numpy(heads).to(x.device))


# ---------------------------------------------------------------------------------------------------------------------
# the kernel
# ---------------------------------------------------------------------------------------------------------------------


def _kernel_serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    if not q.is_cuda or q.dtype != k.dtype or not segpaged_attention.is_available(q.device):
        return False
    group = q.shape[1] // k.shape[1]
    return all(segpaged_attention.supported(x.shape[3], x.dtype, PAGE, group) is None for x in (k, v))


def _attend_by_kernel(
    q: torch.Tensor,
    rows: RowSet,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: np.ndarray,
    window: np.ndarray,
    spec: AttentionSpec,
) -> torch.Tensor:
    key = (k.shape, sink.tobytes(), window.tobytes())
    if key not in rows.uploaded:  # the same for every layer of a kind
        batch, heads, slots, _ = k.shape
        pages = slots // PAGE
        rows.uploaded[key] = (
            rows.positions.to(torch.int32).expand(batch, -1).contiguous(),
            torch.arange(batch * heads * pages, dtype=torch.int32, device=q.device).view(batch, heads, pages),
            torch.full((batch,), slots, dtype=torch.int32, device=q.device),  # rows are causal: nothing behind is read
            torch.from_numpy(np.asarray(sink, np.int32)).to(q.device),
            torch.from_numpy(np.asarray(window, np.int32)).to(q.device),
        )
    positions, table, lens, sinks, windows = rows.uploaded[key]
    return segpaged_attention.prefill_positions(
        q,
        positions,
        k.view(-1, PAGE, k.shape[3]),
        v.view(-1, PAGE, v.shape[3]),
        table,
        lens,
        sinks,
        windows,
        spec.scale,
        spec.softcap,
        None if spec.s_aux is None else spec.s_aux.float(),
        spec.model_window,
    )
