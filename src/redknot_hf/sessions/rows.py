"""The live rows of a page table: what has to be kept to continue, without page rounding and without padding.

A page table knows which slots hold tokens that may still be seen or cropped back to. `PageState.of` lists them once per
page, however many rows of the batch share the page; `PageState.place` gives an empty table the same content and the
same sharing, in whatever pages its pool has. Keys and values themselves travel as flat ``[rows, dim]`` tensors in the
order of the state.

Which slots are live follows from the table, the lengths and the geometry, so nothing about it is stored, and a state
that came from a file is checked against the number of rows that came with it before a page is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CacheError, shorten
from ..paging.frozen import FrozenPages
from ..paging.pages import LayerPages, live_slots

__all__ = ["PageState", "check_places", "frozen_entries", "read_rows", "write_rows"]

MAX_TOKENS = 1 << 40
PIECE_BYTES = 16 << 20  # of rows gathered at a time: bounds the copy, not the result


@dataclass
class PageState:
    """One `LayerPages`, apart from its keys and values.

    Attributes:
        table: int32 ``[batch, kv_heads, max_pages]``; pages are numbered from 1 within this state, 0 means none.
        lens: int64 ``[batch]``; oldest: int64 ``[batch, kv_heads]``: as in `LayerPages`.
        live: bool ``[pages, page_size]``, which slots of each page are kept.
        shared: some page is held by more than one entry of the table, or some entries are frozen pages and so not here.
    """

    table: np.ndarray
    lens: np.ndarray
    oldest: np.ndarray
    live: np.ndarray
    shared: bool

    @property
    def num_rows(self) -> int:
        """Tokens of one head kept, each counted once; the first dimension of the keys and of the values."""
        return int(self.live.sum())

    @classmethod
    def of(cls, pages: LayerPages) -> tuple[PageState, np.ndarray]:
        """The state of ``pages``, and the slab row (int64 ``[num_rows]``) where each of its rows lies now."""
        used = pages.pages_for(pages.lens)
        width = max(1, int(used.max(initial=0)))
        table = np.where(np.arange(width) < used[..., None], pages.table[:, :, :width], 0)
        held, local = np.unique(table[table > 0], return_inverse=True)
        numbered = np.zeros_like(table)
        numbered[table > 0] = local + 1
        state = cls.checked(
            pages, numbered, pages.lens.copy(), pages.oldest.copy(), frozen=frozen_entries(pages, width)
        )
        size = pages.pool.page_size
        rows = (held.astype(np.int64)[:, None] * size + np.arange(size))[state.live]
        return state, rows

    @classmethod
    def checked(
        cls,
        pages: LayerPages,
        table: np.ndarray,
        lens: np.ndarray,
        oldest: np.ndarray,
        max_pages: int | None = None,
        frozen: np.ndarray | None = None,
    ) -> PageState:
        """A state from arrays that may come from anywhere, for the geometry of ``pages``.

        Args:
            max_pages: refuse more distinct pages than that before anything of their size is made.
            frozen: int32, shaped like ``table``, not 0 for entries that are frozen pages and so not in ``table``.

        Raises:
            CacheError: the arrays contradict each other or the geometry.
        """
        if (lens < 0).any() or (lens >= MAX_TOKENS).any():
            raise CacheError(f"impossible lengths {shorten(lens.tolist())}")
        low = pages.sink.astype(np.int64)
        if (oldest < np.maximum(low, lens[:, None] - pages.ring)).any():
            raise CacheError("the oldest positions are older than sinks and windows allow")
        if (oldest > np.maximum(low, lens[:, None] - pages.window.astype(np.int64) + 1)).any():
            raise CacheError("a head lacks tokens that its window shows")
        used = pages.pages_for(lens)
        if table.shape[2] != max(1, int(used.max(initial=0))) or (table < 0).any():
            raise CacheError("the page tables do not fit the lengths")
        present = np.arange(table.shape[2]) < used[..., None]
        if frozen is not None:
            if frozen.shape != table.shape or (frozen < 0).any() or ((frozen > 0) & ~present).any():
                raise CacheError("the frozen pages do not fit the lengths")
            present &= frozen == 0
        if ((table > 0) != present).any():
            raise CacheError("the page tables do not fit the lengths")
        entries = table[present]
        count = int(entries.max(initial=0))
        if count > len(entries) or (np.bincount(entries, minlength=count + 1)[1:] == 0).any():
            raise CacheError("the page tables name pages that are not there")
        check_places(table)
        if max_pages is not None and count > max_pages:
            raise CacheError(f"{count:,} pages are more than the {max_pages:,} that its size allows")
        size = pages.pool.page_size
        live = np.zeros((count, size), bool)
        for row in range(len(lens)):  # row by row: bounds the temporaries
            of_row = slice(row, row + 1)
            slots = live_slots(pages, table[of_row], lens[of_row], oldest[of_row]).reshape(*table[of_row].shape, size)
            live[table[of_row][present[of_row]] - 1] |= slots[present[of_row]]
        return cls(table, lens, oldest, live, count < len(entries) or bool(frozen is not None and frozen.any()))

    def pages_wanted(self, pages: LayerPages) -> int:
        """Pages that `place` takes from the pool, at most."""
        return len(self.live) if self.shared else pages.pages_wanted(self.lens)

    def place(self, pages: LayerPages) -> np.ndarray:
        """Give the empty ``pages`` this content; returns the slab row (int64 ``[num_rows]``) where each row belongs.

        Raises:
            PoolExhausted: the pool has too few pages; ``pages`` is still empty then.
        """
        size = pages.pool.page_size
        placed = np.zeros(len(self.live) + 1, np.int32)
        if self.shared:
            placed[1:] = pages.pool.alloc(len(self.live))
            pages.table = placed[self.table]
            pages.pool.share(pages.table)
            pages.pool.release(placed)
            pages.shared = True
        else:
            LayerPages.prepare(pages, self.lens)  # not the archive behind it
            width = min(self.table.shape[2], pages.table.shape[2])
            placed[self.table[:, :, :width]] = pages.table[:, :, :width]
        pages.lens, pages.oldest = self.lens.copy(), self.oldest.copy()
        pages._changed()
        return (placed[1:].astype(np.int64)[:, None] * size + np.arange(size))[self.live]


def check_places(table: np.ndarray) -> None:
    """Raise unless every page of ``table [batch, kv_heads, pages]`` belongs to one head and one place there.

    Raises:
        CacheError: attention would read tokens of another head or position.
    """
    present = table > 0
    entries = table[present]
    column = np.arange(table.shape[2])
    place = np.broadcast_to(np.arange(table.shape[1])[:, None] * table.shape[2] + column, table.shape)
    owner = np.zeros(int(entries.max(initial=0)) + 1, np.int64)
    owner[entries] = place[present]
    if (owner[entries] != place[present]).any():
        raise CacheError("a page is shared by other heads or at another place than in the other rows")


def frozen_entries(pages: LayerPages, width: int) -> np.ndarray | None:
    """Which entries of the table are frozen pages, int32 ``[batch, kv_heads, width]``; None if there are none."""
    if not isinstance(pages, FrozenPages):
        return None
    missing = max(0, width - pages.frozen.shape[2])
    return np.pad(pages.frozen, ((0, 0), (0, 0), (0, missing)))[:, :, :width]


def read_rows(slab: torch.Tensor, rows: np.ndarray) -> Iterator[torch.Tensor]:
    """Rows of a slab ``[num_pages, page_size, dim]``, as consecutive ``[n, dim]`` copies on the slab's device."""
    flat = slab.view(-1, slab.shape[2])
    step = max(1, PIECE_BYTES // (slab.shape[2] * slab.element_size()))
    for begin in range(0, len(rows), step):
        yield flat.index_select(0, torch.from_numpy(rows[begin : begin + step]).to(slab.device))


def write_rows(slab: torch.Tensor, rows: np.ndarray, values: torch.Tensor) -> None:
    """The inverse of `read_rows`: put ``values [n, dim]`` (on any device) into rows of a slab."""
    flat = slab.view(-1, slab.shape[2])
    step = max(1, PIECE_BYTES // (slab.shape[2] * slab.element_size()))
    for begin in range(0, len(rows), step):
        index = torch.from_numpy(rows[begin : begin + step]).to(slab.device)
        piece = values[begin : begin + step]
        flat.index_copy_(0, index, piece.to(slab.device, non_blocking=piece.is_pinned()))
