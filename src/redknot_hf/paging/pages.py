"""Which page holds which token: the page tables of one attention layer.

Every (row, KV head) has its own list of pages. A head that keeps everything stores position ``p`` in slot ``p``. A local
head keeps its ``sink`` first tokens and a ring of ``ring = window + rollback`` recent ones:

    slot(p) = p                                   while p < sink + ring
    slot(p) = sink + (p - sink) % ring            afterwards

Slot and position determine each other, so no positions are stored. Positions count real tokens only: padding is never
stored. This module does host-side bookkeeping (numpy) and moves rows of memory; it knows nothing of attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import PoolExhausted, RollbackExceeded
from .pool import PagePool, upload

KEEP_ALL = 1 << 30  # window and ring length of a head that keeps every token
ROOM_FOR_GROWTH = 8  # a contiguous run gets one spare page per eight


class LayerPages:
    """The page tables of one layer.

    Args:
        pool: where the pages come from; it may serve many layers and caches.
        sink, window: int32 ``[kv_heads]``; ``window == KEEP_ALL`` for heads that keep everything.
        batch_size: rows.
        rollback: extra ring slots, so that up to this many tokens can be cropped after eviction.
        contiguous: lay the pages of heads that keep everything side by side, so that the torch path reads them as
            views. The Triton kernels do not need it.

    Attributes:
        table: int32 ``[batch, kv_heads, max_pages]``, zero where a head has no page.
        lens: int64 ``[batch]``, tokens stored so far (evicted ones included): the next token's position.
        ring: int32 ``[kv_heads]``.
        oldest: int64 ``[batch, kv_heads]``, the first position behind the sinks that has not been overwritten.
        shared: whether another table may hold some of these pages.
        far: the retrieval heads whose far pages are cold (`tiers.FarHeads`), or None; here they are rings.
    """

    far: Any = None
    _room: int
    _releases: int
    quantised = False  # whether some pages are not in the pool, and not in its dtype (`frozen.FrozenPages`)
    needs_pool = False  # whoever attends reads the pool alone (the Triton kernels)

    def __init__(
        self,
        pool: PagePool,
        sink: np.ndarray,
        window: np.ndarray,
        batch_size: int,
        rollback: int = 0,
        contiguous: bool = True,
    ):
        self.pool, self.sink, self.window = pool, sink.astype(np.int32), window.astype(np.int32)
        self.rollback, self.contiguous = rollback, contiguous
        self.ring = np.where(window >= KEEP_ALL, KEEP_ALL, window + rollback).astype(np.int32)
        self.full_heads = np.flatnonzero(self.window >= KEEP_ALL)
        self.ring_heads = np.flatnonzero(self.window < KEEP_ALL)
        self.table = np.zeros((batch_size, len(sink), 1), np.int32)
        self._lens = np.zeros(batch_size, np.int64)
        self._oldest = self.sink.astype(np.int64)[None].repeat(batch_size, 0)
        self._ahead = 0  # tokens that every row has got since lens and oldest were last looked at
        self.shared = False
        self._changed()

    # ------------------------------------------------------------------------------------------------- lengths
    @property
    def lens(self) -> np.ndarray:
        self._catch_up()
        return self._lens

    @lens.setter
    def lens(self, lens: np.ndarray) -> None:
        self._catch_up()
        self._lens = lens

    @property
    def oldest(self) -> np.ndarray:
        self._catch_up()
        return self._oldest

    @oldest.setter
    def oldest(self, oldest: np.ndarray) -> None:
        self._catch_up()
        self._oldest = oldest

    def _catch_up(self) -> None:
        if self._ahead:
            ahead, self._ahead = self._ahead, 0
            self._lens = self._lens + ahead
            self._oldest = np.maximum(self._oldest, self._lens[:, None] - self.ring)

    @property
    def started(self) -> bool:
        """Whether every row holds a token."""
        return self._ahead > 0 or bool(self._lens.all())

    def take_one(self) -> bool:
        """Whether every row has room for one more token without `prepare`; then count it with `count_one`."""
        if self._room < 1:
            return False
        self._room -= 1
        return True

    def count_one(self) -> None:
        """Count one written token for every row: ``advance`` by one, at next to no cost."""
        self._ahead += 1

    # ------------------------------------------------------------------------------------------------- geometry
    @property
    def batch_size(self) -> int:
        return len(self._lens)

    @property
    def num_heads(self) -> int:
        return len(self.sink)

    def stored(self, lens: np.ndarray | None = None) -> np.ndarray:
        """Slots in use after ``lens`` tokens, int64 ``[batch, kv_heads]``."""
        lens = self.lens if lens is None else lens
        return np.minimum(lens[:, None], self.sink.astype(np.int64) + self.ring)

    def pages_for(self, lens: np.ndarray) -> np.ndarray:
        """Pages in use after ``lens`` tokens, int64 ``[batch, kv_heads]``."""
        return -(-self.stored(lens) // self.pool.page_size)

    def slots(self, positions: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Slot of every position. positions ``[batch, n]`` (or ``[n]``); heads ``[h]`` -> int64 ``[batch, h, n]``."""
        positions = np.atleast_2d(positions)[:, None]
        sink, ring = self.sink[heads][:, None].astype(np.int64), self.ring[heads][:, None].astype(np.int64)
        return np.where(positions < sink + ring, positions, sink + (positions - sink) % ring)

    def rows(self, positions: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Row of every position in the flattened slab ``[num_pages * page_size, dim]``; int64 ``[batch, h, n]``.

        Positions that are not stored give some row in bounds: mask them.
        """
        slot = np.maximum(self.slots(positions, heads), 0)
        index = np.minimum(slot // self.pool.page_size, self.table.shape[2] - 1)
        batch = np.arange(self.batch_size)[:, None, None]
        return self.table[batch, heads[None, :, None], index].astype(np.int64) * self.pool.page_size + (
            slot % self.pool.page_size
        )

    # ---------------------------------------------------------------------------------------------------- grow
    def pages_wanted(self, new: np.ndarray) -> int:
        """Upper bound of the pages that ``prepare(new)`` takes on an empty table, spare room of runs included."""
        need = self.pages_for(self.lens + new)
        wanted = int(need[:, self.ring_heads].sum())
        if len(self.full_heads):
            longest = int(need[:, self.full_heads].max())
            wanted += self.batch_size * len(self.full_heads) * self._stride(longest)
        return wanted

    def prepare(self, new: np.ndarray) -> None:
        """Give every head the pages for ``new`` (int64 ``[batch]``) more tokens, each page held by this table alone.

        Raises:
            PoolExhausted: the pool has too few pages; nothing has changed then that a later call could notice.
        """
        most = int(new.max(initial=0))
        if most <= self._room:
            self._room -= most
            return
        total = self.lens + new
        need = self.pages_for(total)
        # pages that were prepared and not written to yet are here, too
        have = np.maximum(self.pages_for(self.lens), (self.table > 0).sum(2))
        if (need > have).any():
            self._grow(have, need)
        if self._guarded:
            self._own(self._touched(new))
            self._look_for_sharers()
        size, kept = self.pool.page_size, self.sink.astype(np.int64) + self.ring
        if self._guarded:  # the pages written to now are this table's own, the next ones have to be looked at first
            last = self.slots(total[:, None] - 1, np.arange(self.num_heads))[..., 0]
            free_slots = np.minimum(size - 1 - last % size, kept - 1 - last)
            self._room = int(free_slots.min()) if (new > 0).all() else 0
        else:
            stored = self.stored(total)
            self._room = int(np.where(stored >= kept, KEEP_ALL, need * size - stored).min())

    def _look_for_sharers(self) -> None:
        """Notice when nobody else holds any of these pages any more."""
        if self.shared and self._releases != self.pool.releases:
            with self.pool.lock:
                self._releases = self.pool.releases
                self.shared = bool((self.pool.refs[self.table[self.table > 0]] > 1).any())

    def _grow(self, have: np.ndarray, need: np.ndarray) -> None:
        if need.max() > self.table.shape[2]:
            wider = np.zeros((*self.table.shape[:2], int(need.max())), np.int32)
            wider[:, :, : self.table.shape[2]] = self.table
            self.table = wider
        full, ring = self.full_heads, self.ring_heads
        runs = self.contiguous and not self.shared and len(full) > 0
        if runs and (need[:, full] > have[:, full]).any():
            try:
                self._grow_runs(have[:, full], need[:, full])
            except PoolExhausted:  # no room to move them to: then the next pages lie elsewhere
                runs = False
        heads = ring if runs else np.arange(self.num_heads)
        if len(heads):
            more = (need - have)[:, heads]
            row, head = np.nonzero(more > 0)
            count, head = more[row, head], heads[head]
            pages = self.pool.alloc(int(count.sum()))
            first = have[row, head] - (np.cumsum(count) - count)
            column = np.repeat(first, count) + np.arange(len(pages))
            self.table[np.repeat(row, count), np.repeat(head, count), column] = pages
        self._changed()

    def _grow_runs(self, have: np.ndarray, need: np.ndarray) -> None:
        """Extend the runs of the heads that keep everything, in place where the next pages are free."""
        full, batch = self.full_heads, self.batch_size
        part = self.table[:, full]
        if have.all():
            column = np.arange(part.shape[2])
            broken = (np.diff(part, axis=2) != 1) & (
                column[1:] < have[..., None]
            )  # by copies made while others shared pages
            missing = (column >= have[..., None]) & (column < need[..., None])
            last = np.take_along_axis(part, have[..., None] - 1, axis=2)
            wanted = (last + 1 + column - have[..., None])[missing]
            if not broken.any() and self.pool.alloc_exact(wanted):
                part[missing] = wanted
                self.table[:, full] = part
                return
        longest = int(need.max())
        pages = self.pool.alloc_runs(batch * len(full), longest, self._stride(longest))
        pages = pages.reshape(batch, len(full), longest)
        column = np.arange(longest)
        surplus = column >= need[..., None]
        if surplus.any():  # rows of a ragged batch are not all that long
            self.pool.release(pages[surplus])
        if have.any():
            moved = (column < have[..., None]) & (part[:, :, :longest] > 0)
            self.pool.copy(part[:, :, :longest][moved], pages[moved])
            self.pool.release(part[:, :, :longest][moved])
        pages[surplus] = 0
        part[:] = 0
        part[:, :, :longest] = pages
        self.table[:, full] = part

    def _stride(self, pages: int) -> int:
        return pages + max(2, -(-pages // ROOM_FOR_GROWTH)) if self.contiguous else pages

    @property
    def _guarded(self) -> bool:
        """Whether pages must be looked at before they are written to."""
        return self.shared

    def _touched(self, new: np.ndarray, columns: int | None = None) -> np.ndarray:
        """Which pages the next ``new`` (int64 ``[batch]``) tokens are written to: bool, shaped like the table, or with
        another number of ``columns`` before the table has grown."""
        touched = np.zeros((*self.table.shape[:2], columns or self.table.shape[2]), bool)
        heads = np.arange(self.num_heads)
        for row in np.flatnonzero(new > 0):
            first = max(int(self.lens[row]), int(self.lens[row] + new[row]) - int(self.ring.max(initial=0)))
            positions = np.arange(first, int(self.lens[row] + new[row]))
            head_sinks = np.arange(int(self.lens[row]), min(int(self.sink.max(initial=0)), first))
            slot = self.slots(np.concatenate([head_sinks, positions]), heads)[0] // self.pool.page_size
            np.put_along_axis(touched[row], slot, True, axis=1)
        return touched

    def _own(self, touched: np.ndarray) -> None:
        """Copy on write: replace those of these pages (bool, shaped like the table) that others hold too."""
        with self.pool.lock:
            copied = touched & (self.table > 0) & (self.pool.refs[self.table] > 1)
            if copied.any():
                fresh = self.pool.alloc(int(copied.sum()))
                self.pool.copy(self.table[copied], fresh)
                self.pool.release(self.table[copied])
                self.table[copied] = fresh
                self._changed()

    def advance(self, new: np.ndarray) -> None:
        """Count ``new`` (int64 ``[batch]``) written tokens."""
        self.lens = self.lens + new
        self.oldest = np.maximum(self.oldest, self.lens[:, None] - self.ring)

    # -------------------------------------------------------------------------------------------- write and read
    def write(self, k: torch.Tensor, v: torch.Tensor, new: np.ndarray) -> None:
        """Store a chunk after ``prepare(new)`` and before ``advance(new)``.

        Args:
            k, v: ``[batch, kv_heads, n, dim]``; row ``b`` holds ``new[b]`` real tokens in its first columns.
        """
        with self.pool.lock:
            if k.shape[2] == 1 and new.all():
                every = np.arange(self.num_heads)
                self._scatter(self.rows(self.lens[:, None], every), k, v)
                return
            total = self.lens + new
            if len(self.full_heads):
                self._write_full(k, v, new)
            if len(self.ring_heads):
                heads = self.ring_heads
                last_sink, longest = int(self.sink[heads].max()), int(self.ring[heads].max())
                # only what survives the chunk is written: the sinks and the last `ring` tokens
                start, end = int(self.lens.min()), int(total.max())
                tail = max(start, last_sink, int(total.min()) - longest)
                positions = np.concatenate([np.arange(start, min(last_sink, end)), np.arange(tail, end)])
                here = (positions >= self.lens[:, None]) & (positions < total[:, None])
                sink, ring = self.sink[heads][:, None], self.ring[heads][:, None]
                survives = (positions < sink)[None] | (positions >= total[:, None, None] - ring)
                self._scatter_chunk(k, v, heads, positions, here[:, None] & survives)

    def _write_full(self, k: torch.Tensor, v: torch.Tensor, new: np.ndarray) -> None:
        heads, start = self.full_heads, int(self.lens[0])
        views = self.full_views() if (new == new[0]).all() and (self.lens == start).all() else None
        if views is not None and start + k.shape[2] <= views[0].shape[2]:
            whole = len(heads) == self.num_heads
            for view, chunk in zip(views, (k, v), strict=True):
                view[:, :, start : start + k.shape[2]] = chunk if whole else chunk[:, torch.from_numpy(heads)]
            return
        start, end = int(self.lens.min()), int((self.lens + new).max())
        positions = np.arange(start, end)
        here = (positions >= self.lens[:, None]) & (positions < (self.lens + new)[:, None])
        self._scatter_chunk(k, v, heads, positions, np.repeat(here[:, None], len(heads), axis=1))

    def _scatter_chunk(
        self, k: torch.Tensor, v: torch.Tensor, heads: np.ndarray, positions: np.ndarray, keep: np.ndarray
    ) -> None:
        """Write the kept (row, head, position) triples; column = position - lens of the row."""
        batch, head, column = np.nonzero(keep)
        rows = self.rows(np.broadcast_to(positions, (self.batch_size, len(positions))), heads)[keep]
        source = (
            torch.from_numpy(batch),
            torch.from_numpy(heads[head]),
            torch.from_numpy(positions[column] - self.lens[batch]),
        )
        index = upload(rows, self.pool.k.device)
        for slab, chunk in ((self.pool.k, k), (self.pool.v, v)):
            slab.view(-1, slab.shape[2]).index_copy_(0, index, chunk[source].to(slab.dtype))

    def _scatter(self, rows: np.ndarray, k: torch.Tensor, v: torch.Tensor) -> None:
        index = upload(rows.ravel(), self.pool.k.device)
        for slab, chunk in ((self.pool.k, k), (self.pool.v, v)):
            slab.view(-1, slab.shape[2]).index_copy_(0, index, chunk.reshape(-1, slab.shape[2]).to(slab.dtype))

    def gather(self, positions: np.ndarray, heads: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at ``positions`` (``[batch, n]``) of ``heads``: two ``[batch, h, n, dim]`` copies."""
        rows = self.rows(positions, heads)
        index = upload(rows.ravel(), self.pool.k.device)
        shape = (*rows.shape, -1)
        return (
            self.pool.k.view(-1, self.pool.k.shape[2]).index_select(0, index).view(shape),
            self.pool.v.view(-1, self.pool.v.shape[2]).index_select(0, index).view(shape),
        )

    def ring_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots of the local heads: two ``[batch, h, slots, dim]``, ``slots`` a multiple of the page size.

        Slot ``s`` of a head is real if ``s < stored()``; the rest is finite (zero or old) and must be masked. Views where
        the pages lie side by side, else copies.
        """
        found = self._runs_of(self.ring_heads, "ring", slice(None))
        if found is not None:
            return self._strided(found, self.batch_size, len(self.ring_heads))
        return self.copies(self.ring_heads, int(self.pages_for(self.lens)[:, self.ring_heads].max(initial=0)))

    def copies(self, heads: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``count`` pages of ``heads``: two ``[batch, h, count * page_size, dim]`` copies.

        What a head has no page for is finite and must be masked.
        """
        index = self._index(heads, count, self.table)
        shape = (self.batch_size, len(heads), count * self.pool.page_size, -1)
        return self.pool.k.index_select(0, index).view(shape), self.pool.v.index_select(0, index).view(shape)

    def _index(self, heads: np.ndarray, count: int, table: np.ndarray) -> torch.Tensor:
        """The entries of the first ``count`` columns on the device; kept until the table changes."""
        key = (heads.tobytes(), count)
        if key not in self._indices:
            self._indices.clear()  # lengths grow: what was read before will not be read again
            index = torch.from_numpy(table[:, heads, :count].astype(np.int64).ravel())
            self._indices[key] = index.to(self.pool.k.device)
        return self._indices[key]

    def full_views(self, row: int | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The heads that keep everything as two views ``[batch, h, slots, dim]`` without copying, if their pages allow.

        ``None`` when the runs are not equally spaced or (with ``row=None``) rows have different lengths: slots behind
        the end of a shorter row may belong to somebody else. With ``row`` the views cover that row alone.
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        found = self._runs_of(self.full_heads, row, rows)
        batch = self.batch_size if row is None else 1
        return None if found is None else self._strided(found, batch, len(self.full_heads))

    def _strided(self, found: tuple[int, int, int], batch: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, stride, pages = found
        size = self.pool.page_size
        views = []
        for slab in (self.pool.k, self.pool.v):
            dim = slab.shape[2]
            step = stride * size * dim
            views.append(
                slab.as_strided((batch, heads, pages * size, dim), (heads * step, step, dim, 1), first * size * dim)
            )
        return views[0], views[1]

    def _runs_of(self, heads: np.ndarray, key: int | str | None, rows: slice) -> tuple[int, int, int] | None:
        """First page, distance and length of the runs of ``heads``, or None; kept until the table changes."""
        if key not in self._runs:
            self._runs[key] = self._find_runs(self.table[rows][:, heads])
        return self._runs[key]

    @staticmethod
    def _find_runs(part: np.ndarray) -> tuple[int, int, int] | None:
        counts = (part > 0).sum(2)
        pages = int(counts.max(initial=0))
        if pages == 0 or (counts != pages).any():
            return None
        part = part[:, :, :pages].reshape(-1, pages).astype(np.int64)
        if (np.diff(part, axis=1) != 1).any():
            return None
        steps = np.diff(part[:, 0])
        if len(steps) and ((steps != steps[0]).any() or steps[0] <= 0):
            return None
        return int(part[0, 0]), int(steps[0]) if len(steps) else pages, pages

    def _changed(self) -> None:
        """The table was edited: forget what was derived from it."""
        self._room = 0
        self._releases = -1
        self._runs: dict[int | str | None, tuple[int, int, int] | None] = {}
        self._indices: dict[tuple[bytes, int], torch.Tensor] = {}
        self.version = getattr(self, "version", 0) + 1

    def head_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of the pages of each head, and of its tokens without page rounding: two int64 ``[kv_heads]``.

        Summed over the rows; what rows share counts for each of them.
        """
        token = self.pool.page_bytes // self.pool.page_size
        return (self.table > 0).sum((0, 2)) * self.pool.page_bytes, self.stored().sum(0) * token

    # ------------------------------------------------------------------------------------- rows of the batch, forks
    def select(self, indices: np.ndarray) -> None:
        """Keep the rows ``indices`` in that order; rows may repeat and then share their pages."""
        table = self.table[indices]
        self.pool.share(table)
        self.pool.release(self.table)
        self.table, self.lens, self.oldest = table, self.lens[indices], self.oldest[indices]
        self.shared = True
        self._changed()

    def fork(self) -> LayerPages:
        """A second table that shares every page; both copy on write."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.table = self.table.copy()
        self.pool.share(self.table)
        for half in (self, twin):
            half.shared = True
            half._changed()
        return twin

    def free(self) -> None:
        """Give all pages back; the table is empty afterwards."""
        self.pool.release(self.table)
        self.table = np.zeros((self.batch_size, self.num_heads, 1), np.int32)
        self.lens = np.zeros_like(self.lens)
        self.oldest = np.broadcast_to(self.sink.astype(np.int64), self.oldest.shape).copy()
        self.shared = False
        self._changed()

    def _drop(self, heads: np.ndarray) -> None:
        """Give the pages of ``heads`` back."""
        self.pool.release(self.table[:, heads])
        self.table[:, heads] = 0

    # ------------------------------------------------------------------------------------------------- crop
    def check_crop(self, removed: np.ndarray) -> None:
        """Raise unless the last ``removed`` (int64 ``[batch]``) tokens of each row can be taken back.

        Raises:
            RollbackExceeded: a local head has already evicted a token that would become visible again.
        """
        if (removed > self.lens).any():
            raise RollbackExceeded(f"cannot crop {int(removed.max())} tokens: only {int(self.lens.min())} are stored")
        heads = self.ring_heads
        needed = np.maximum(self.sink[heads], (self.lens - removed)[:, None] - self.window[heads] + 1)
        if (self.oldest[:, heads] > needed).any():
            raise RollbackExceeded(
                f"cannot crop {int(removed.max())} tokens: local heads have evicted tokens that would be visible again "
                f"(rollback={self.rollback}). Build the cache with rollback={int(removed.max())} or more, or call "
                "activate_past_recording() before the tokens are fed"
            )

    def crop(self, removed: np.ndarray) -> None:
        """Take back the last ``removed`` tokens of each row after ``check_crop(removed)``; their pages are freed."""
        self.lens = self.lens - removed
        keep = self.pages_for(self.lens)
        surplus = (np.arange(self.table.shape[2]) >= keep[..., None]) & (self.table > 0)
        if surplus.any():
            self.pool.release(self.table[surplus])
            self.table[surplus] = 0
        self._changed()
        if removed.any():
            self._blank(removed)

    def _blank(self, removed: np.ndarray) -> None:
        """Zero the slots of cropped tokens that share a page with others, as slots are that were never written.

        Attention gives hidden slots a weight of zero, and zero times a NaN would be NaN.
        """
        if self._guarded:
            self._own(self._touched(removed))
        column = np.arange(int(removed.max()))
        rows = self.rows(self.lens[:, None] + column, np.arange(self.num_heads))
        rows = rows[np.broadcast_to((column < removed[:, None])[:, None], rows.shape)]
        rows = rows[rows >= self.pool.page_size]  # the others' pages have been given back
        if len(rows):
            index = upload(np.unique(rows), self.pool.k.device)
            with self.pool.lock:
                for slab in (self.pool.k, self.pool.v):
                    slab.view(-1, slab.shape[2]).index_fill_(0, index, 0)

    def set_rollback(self, rollback: int) -> None:
        """Change the number of extra ring slots, moving what the local heads hold into the new ring."""
        if rollback == self.rollback:
            return
        heads = self.ring_heads
        ring = np.where(self.window >= KEEP_ALL, KEEP_ALL, self.window + rollback).astype(np.int32)
        if len(heads) and self.lens.any():
            self._move_rings(heads, ring)
        self.rollback, self.ring = rollback, ring
        self._changed()

    def _move_rings(self, heads: np.ndarray, ring: np.ndarray) -> None:
        last_sink = int(self.sink[heads].max())
        longest = int(np.minimum(self.ring[heads], ring[heads]).max())
        recent = self.lens[:, None] - longest + np.arange(longest)
        first = np.broadcast_to(np.arange(last_sink), (self.batch_size, last_sink))
        positions = np.concatenate([first, recent], axis=1)
        is_recent = np.arange(positions.shape[1]) >= last_sink
        k, v = self.gather(positions, heads)
        self._drop(heads)
        self.oldest = np.maximum(self.oldest, self.lens[:, None] - ring)
        self.ring = ring
        need = self.pages_for(self.lens)
        have = need.copy()
        have[:, heads] = 0
        self._grow(have, need)
        at = positions[:, None]
        keep = np.where(is_recent, at >= self.oldest[:, heads, None], at < self.sink[heads][:, None])
        keep &= at < self.lens[:, None, None]
        index = upload(self.rows(positions, heads)[keep], self.pool.k.device)
        chosen = upload(keep, self.pool.k.device)
        with self.pool.lock:
            for slab, rows in ((self.pool.k, k), (self.pool.v, v)):
                slab.view(-1, slab.shape[2]).index_copy_(0, index, rows[chosen])


def live_slots(pages: LayerPages, table: np.ndarray, lens: np.ndarray, oldest: np.ndarray) -> np.ndarray:
    """Which slots hold a token that has not been overwritten, bool ``[batch, kv_heads, max_pages * page_size]``.

    Args:
        pages: gives sink, ring and page size; its own table is not looked at.
        table: int32 ``[batch, kv_heads, max_pages]``.
        lens, oldest: as in `LayerPages`.
    """
    slot = np.arange(table.shape[2] * pages.pool.page_size)
    sink = pages.sink.astype(np.int64)[:, None]
    ring = pages.ring.astype(np.int64)[:, None]
    last = lens[:, None, None] - 1
    newest = last - (last - slot) % ring  # the newest position that falls into this slot
    position = np.where((slot < sink) | (last < sink + ring), slot, newest)
    live = (slot <= last) & (slot < sink + ring)
    return live & ((position < sink) | (position >= oldest[:, :, None]))
