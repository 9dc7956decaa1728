"""Taking pages out of the pool: `freeze` packs or quantises what a page table holds; `frozen` says how it is read then.

A page that is frozen already keeps its bytes, whatever is frozen beside it.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import CacheError
from .frozen import KV_DTYPES, FrozenPages, FrozenRows, ranges, raw_rows
from .pages import LayerPages, live_slots
from .pool import upload

__all__ = ["filled_slots", "freeze"]

PIECE_PAGES = 1024  # pages that are quantised at a time: bounds the float32 copy


def freeze(pages: LayerPages, kv_dtype: torch.dtype | None, name: str) -> LayerPages:
    """The table with what it holds now frozen; ``pages`` is used up, and its pages are given back to the pool.

    Args:
        pages: of one layer.
        kv_dtype: one of `KV_DTYPES`, or None to pack only; see the module.
        name: of the layer, for errors.

    Raises:
        CacheError: keys or values are not finite, so that no scale can be found. Nothing has changed then.
    """
    size = pages.pool.page_size
    used = pages.pages_for(pages.lens)
    width = max(1, int(used.max(initial=0)))
    inside = np.arange(width) < used[..., None]
    table = np.where(inside, pages.table[:, :, :width], 0)
    old = np.zeros_like(table)
    store = None
    if isinstance(pages, FrozenPages):
        store, old = pages.store, np.where(inside, pages.frozen[:, :, :width], 0)
        if store.k_scale is None and kv_dtype is not None:  # packed ones have to be quantised: through the pool
            plain = pages.thawed()
            try:
                made = freeze(plain, kv_dtype, name)
            except CacheError:
                plain.free()
                raise
            pages.free()
            return made
        if kv_dtype is None and store.k_scale is not None:
            kv_dtype = store.k.dtype
    filled = np.maximum(1, filled_slots(pages, table, pages.lens, pages.oldest))
    chosen = table > 0
    if kv_dtype is None:
        local = np.zeros(table.shape, bool)
        local[:, pages.ring_heads] = True
        chosen &= local & (filled < size)
    held, local_number = np.unique(table[chosen], return_inverse=True)
    counts = np.zeros(len(held), np.int64)
    np.maximum.at(counts, local_number, filled[chosen])  # rows of the batch that share a page may see more of it
    kept, kept_number = np.unique(old[old > 0], return_inverse=True)
    if not len(held) and (store is None or len(kept) == store.num_pages):
        return pages  # nothing to freeze that is not frozen
    all_counts = counts if store is None else np.concatenate([store.counts(kept), counts])
    order = np.argsort(all_counts < size, kind="stable")  # full pages first
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    frozen = np.zeros(table.shape, np.int32)
    frozen[chosen] = place[len(kept) + local_number] + 1
    if len(kept):
        frozen[old > 0] = place[kept_number] + 1
    start = np.concatenate([[0], np.cumsum(all_counts[order])])
    fresh = _store(pages, held, counts, store, kept, order, start, kv_dtype, name)
    rest = np.where(chosen, 0, pages.table[:, :, :width])
    pages.pool.release(table[chosen])
    pages.table = rest
    return FrozenPages.around(pages, frozen, fresh)


def filled_slots(pages: LayerPages, table: np.ndarray, lens: np.ndarray, oldest: np.ndarray) -> np.ndarray:
    """Slots of every page up to its last live one, int64 ``[batch, kv_heads, pages]``; arguments as for `live_slots`."""
    size = pages.pool.page_size
    filled = np.zeros(table.shape, np.int64)
    for row in range(len(lens)):  # row by row: bounds the temporaries
        of_row = slice(row, row + 1)
        live = live_slots(pages, table[of_row], lens[of_row], oldest[of_row]).reshape(*table[of_row].shape, size)
        filled[of_row] = np.where(live.any(3), size - live[..., ::-1].argmax(3), 0)
    return filled


def _store(
    pages: LayerPages,
    held: np.ndarray,
    counts: np.ndarray,
    old: FrozenRows | None,
    kept: np.ndarray,
    order: np.ndarray,
    start: np.ndarray,
    kv_dtype: torch.dtype | None,
    name: str,
) -> FrozenRows:
    """Rows of the ``kept`` pages of ``old``, as they are, and of the pool's pages ``held``, in ``order``."""
    pool, device = pages.pool, pages.pool.k.device
    stored = pool.k.dtype if kv_dtype is None else kv_dtype
    number_of = np.empty(len(order), np.int64)  # of each page, kept ones first
    number_of[order] = np.arange(len(order))
    halves: list[torch.Tensor] = []
    scales: list[torch.Tensor | None] = []
    for which, slab in enumerate((pool.k, pool.v)):
        rows = torch.empty(int(start[-1]), slab.shape[2], dtype=stored, device=device)
        scale = None if kv_dtype is None else torch.empty(len(order), device=device)
        raw = raw_rows(rows)
        if old is not None and len(kept):
            source = (old.k, old.v)[which]
            flat = raw_rows(source)
            number = old.counts(kept)
            raw[ranges(start[number_of[: len(kept)]], number, device)] = flat[
                ranges(old.start[kept - 1], number, device)
            ]
            if scale is not None:
                old_scale = (old.k_scale, old.v_scale)[which]
                assert old_scale is not None
                scale[upload(number_of[: len(kept)], device)] = old_scale[upload(kept - 1, device)]
        for begin in range(0, len(held), PIECE_PAGES):
            part = slice(begin, begin + PIECE_PAGES)
            into = number_of[len(kept) :][part]
            chunk = slab.index_select(0, upload(held[part].astype(np.int64), device))
            inside = upload(np.arange(pool.page_size) < counts[part][:, None], device)
            if kv_dtype is not None:
                chunk, found = quantised(chunk.float(), inside, kv_dtype)
                if not bool(torch.isfinite(found).all()):
                    raise CacheError(
                        f"{name}: some {('keys', 'values')[which]} are not finite, so they cannot be kept in {kv_dtype}"
                    )
                assert scale is not None
                scale[upload(into, device)] = found
            raw[ranges(start[into], counts[part], device)] = chunk[inside]
        halves.append(rows)
        scales.append(scale)
    return FrozenRows(halves[0], halves[1], start, scales[0], scales[1])


def quantised(x: torch.Tensor, inside: torch.Tensor, kv_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 pages ``[n, page_size, dim]`` -> their bytes (uint8, same shape) and scales, float32 ``[n]``."""
    x = x.masked_fill(~inside[..., None], 0)
    largest = KV_DTYPES[kv_dtype]
    scale = x.abs().amax((1, 2)) / largest
    x = x / torch.where(scale > 0, scale, 1.0)[:, None, None]
    if not kv_dtype.is_floating_point:
        x = x.round_()
    return x.clamp_(-largest, largest).to(kv_dtype).view(torch.uint8), scale
