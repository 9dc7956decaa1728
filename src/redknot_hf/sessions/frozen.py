"""The frozen pages of one layer in a session file: their bytes as they are, so that nothing is quantised twice.

Only pages that the table names are written, numbered anew in the order in which they lie in their store: full ones first. A file is
checked before anything is made of it: every page has between one row and a page of them, belongs to one head and one
place, and holds all that its head shows.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import CacheError
from ..paging.freezing import filled_slots
from ..paging.frozen import KV_DTYPES, FrozenPages, FrozenRows
from ..paging.pages import LayerPages
from .container import Source
from .rows import check_places, frozen_entries

__all__ = ["capture_frozen", "check_filled", "restore_frozen"]


def capture_frozen(prefix: str, pages: FrozenPages, width: int) -> list[Source]:
    """What is written of the frozen pages that a table of ``width`` columns names; nothing if it names none."""
    table = frozen_entries(pages, width)
    assert table is not None
    held, local = np.unique(table[table > 0], return_inverse=True)
    if not len(held):
        return []
    numbered = np.zeros_like(table)
    numbered[table > 0] = local + 1
    store = pages.store.part(held)
    parts = {"k": store.k, "v": store.v, "k_scale": store.k_scale, "v_scale": store.v_scale}
    found = [
        Source.of(f"{prefix}.frozen.table", torch.from_numpy(numbered)),
        Source.of(f"{prefix}.frozen.start", torch.from_numpy(store.start)),
    ]
    return found + [Source.of(f"{prefix}.frozen.{name}", part) for name, part in parts.items() if part is not None]


def restore_frozen(tensors: dict[str, torch.Tensor], pages: LayerPages) -> FrozenPages:
    """The empty ``pages`` with the frozen ones that `capture_frozen` wrote; what they hold is checked by `check_filled`.

    Args:
        tensors: by the part of their name behind ``frozen.``; views of a file, which are copied.

    Raises:
        CacheError: the tensors contradict each other or the layer.
    """
    pool = pages.pool
    names = {"table", "start", "k", "v"}
    quantised = "k_scale" in tensors or "v_scale" in tensors
    if set(tensors) != (names | {"k_scale", "v_scale"} if quantised else names):
        raise CacheError(f"frozen pages come with {sorted(tensors)}")
    table, start = tensors["table"], tensors["start"]
    if table.dtype != torch.int32 or table.ndim != 3 or tuple(table.shape[:2]) != (pages.batch_size, pages.num_heads):
        raise CacheError(f"the table of frozen pages is {table.dtype} {list(table.shape)}")
    if start.dtype != torch.int64 or start.ndim != 1 or len(start) < 2:
        raise CacheError(f"the rows of frozen pages are {start.dtype} {list(start.shape)}")
    count, first = len(start) - 1, start.numpy().copy()
    rows = np.diff(first)
    if first[0] != 0 or (rows < 1).any() or (rows > pool.page_size).any():
        raise CacheError("frozen pages have rows that are no rows of pages")
    full = rows == pool.page_size
    if (full[1:] > full[:-1]).any():
        raise CacheError("the rows of frozen pages are not those of pages, full ones first")
    entries = table.numpy().copy()
    if (entries < 0).any() or set(np.unique(entries[entries > 0]).tolist()) != set(range(1, count + 1)):
        raise CacheError("the table of frozen pages names pages that are not there")
    check_places(entries)
    for name, dim in (("k", pool.k.shape[2]), ("v", pool.v.shape[2])):
        part = tensors[name]
        kinds = KV_DTYPES if quantised else (pool.k.dtype,)
        if part.dtype not in kinds or part.dtype != tensors["k"].dtype or tuple(part.shape) != (int(first[-1]), dim):
            raise CacheError(f"frozen {name} is {part.dtype} {list(part.shape)}, expected [{int(first[-1])}, {dim}]")
        if quantised:
            scale = tensors[f"{name}_scale"]
            if scale.dtype != torch.float32 or tuple(scale.shape) != (count,):
                raise CacheError(f"frozen {name}_scale is {scale.dtype} {list(scale.shape)}, expected [{count}]")
            if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
                raise CacheError(f"frozen {name}_scale has values that are no scales")
    device, pages.table = pool.k.device, np.zeros_like(entries)
    halves = [tensors[name].to(device, copy=True) for name in ("k", "v")]
    scales = [tensors[name].to(device, copy=True) if quantised else None for name in ("k_scale", "v_scale")]
    return FrozenPages.around(pages, entries, FrozenRows(halves[0], halves[1], first, scales[0], scales[1]))


def check_filled(pages: FrozenPages, lens: np.ndarray, oldest: np.ndarray) -> None:
    """Raise unless every slot that the lengths make visible has a row in its frozen page.

    Raises:
        CacheError: attention would read what is not there.
    """
    needed = filled_slots(pages, pages.frozen, lens, oldest)
    if ((pages.frozen > 0) & (needed > pages.store.counts(pages.frozen))).any():
        raise CacheError("a frozen page holds fewer tokens than its head shows")
