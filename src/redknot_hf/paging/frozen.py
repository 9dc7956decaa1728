"""Frozen pages: tokens that were written once and are read many times, in exactly the rows they need.

A prefix that many requests share is read by all of them and written to by none. `freeze` takes such pages out of the
pool and lays their tokens end to end: without the empty slots behind the last token of a page and, if a ``kv_dtype`` is
given, in one byte per channel. Two forms:

- ``kv_dtype`` None: the partly filled pages of local heads alone are packed, in the dtype of the model. Nothing changes
  in value. 4 + 256 tokens take 260 rows instead of five pages of 64.
- ``torch.float8_e4m3fn`` or ``torch.int8``: every page is quantised, with one float32 scale for its keys and one for
  its values: scale = largest magnitude / largest number of the dtype. This is approximate, once: what is frozen again
  without having been written to is not quantised again.

`FrozenPages` is a page table in which an entry is a page of the pool or a frozen one. New tokens go to ordinary pages.
A frozen page that is about to be written to is thawed, that is copied into an ordinary page of this table alone; the
others, and forks, go on reading the frozen one. Reading makes a copy in the model's dtype of what one layer reads,
for as long as that layer attends. The Triton kernels do not know frozen pages: packed ones are thawed when a
kernel comes to read them, quantised ones are read by the torch path.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import RedKnotError, shorten
from .pages import LayerPages
from .pool import upload

__all__ = ["KV_DTYPES", "FrozenPages", "FrozenRows", "kv_dtype_of", "ranges", "raw_rows"]

KV_DTYPES = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # the largest number of each
_SPELLINGS = {"fp8": torch.float8_e4m3fn, "float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}
PIECE_PAGES = 1024  # pages that are quantised at a time: bounds the float32 copy


def kv_dtype_of(given: Any) -> torch.dtype | None:
    """The dtype of frozen pages that an argument names, None for that of the model.

    Raises:
        RedKnotError: no such dtype.
    """
    found = _SPELLINGS.get(given) if isinstance(given, str) else given
    if given is None or (isinstance(found, torch.dtype) and found in KV_DTYPES):
        return found
    raise RedKnotError(
        f"kv_dtype={shorten(given)}: expected 'fp8' (torch.float8_e4m3fn), 'int8' (torch.int8), or None for the dtype of "
        "the model"
    )


class FrozenRows:
    """Keys and values of frozen pages; never changed, shared by every table that reads them.

    Pages are numbered from 1; those that are full come first, so that they can be read page by page.

    Args:
        k: ``[rows, key_dim]``; v: ``[rows, value_dim]``: in ``kv_dtype``, or in the dtype of the model.
        start: int64 ``[pages + 1]`` on the host: page ``p`` is rows ``start[p - 1]`` to ``start[p]``.
        k_scale, v_scale: float32 ``[pages]``, what a page's numbers are multiplied with; None in the model's dtype.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        start: np.ndarray,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ):
        self.k, self.v, self.start, self.k_scale, self.v_scale = k, v, start, k_scale, v_scale

    @property
    def num_pages(self) -> int:
        return len(self.start) - 1

    @property
    def nbytes(self) -> int:
        """Keys, values, scales and the table of rows."""
        halves = [self.k, self.v, self.k_scale, self.v_scale]
        return sum(half.nbytes for half in halves if half is not None) + self.start.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, key and value."""
        return self.k.shape[1] * self.k.element_size() + self.v.shape[1] * self.v.element_size()

    def empty(self) -> FrozenRows:
        """No pages, in the same form."""
        none = [None if half is None else half.new_empty(0, *half.shape[1:]) for half in (self.k_scale, self.v_scale)]
        k, v = (half.new_empty(0, half.shape[1]) for half in (self.k, self.v))
        return FrozenRows(k, v, np.zeros(1, np.int64), *none)

    def part(self, numbers: np.ndarray) -> FrozenRows:
        """Some of the pages (increasing ``numbers``), numbered anew; shares memory if they are all."""
        if len(numbers) == self.num_pages:
            return self
        counts = self.counts(numbers)
        rows = ranges(self.start[numbers - 1], counts, self.k.device)
        which = upload(numbers.astype(np.int64) - 1, self.k.device)
        halves = [raw_rows(half)[rows].view(half.dtype) for half in (self.k, self.v)]
        scales = [None if scale is None else scale[which] for scale in (self.k_scale, self.v_scale)]
        start = np.concatenate([[0], np.cumsum(counts)])
        return FrozenRows(halves[0], halves[1], start, scales[0], scales[1])

    def counts(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of each page; 0 for number 0."""
        return np.concatenate([[0], np.diff(self.start)])[numbers]

    def to(self, device: torch.device | str, pinned: bool = False) -> FrozenRows:
        """The same rows on another device; page-locked there if ``pinned``. Shares what is there already."""
        halves: list[Any] = []
        for half in (self.k, self.v, self.k_scale, self.v_scale):
            if half is not None and half.device != torch.device(device):
                target = torch.empty(half.shape, dtype=half.dtype, device=device, pin_memory=pinned)
                half = target.copy_(half, non_blocking=half.is_pinned())
            halves.append(half)
        return FrozenRows(halves[0], halves[1], self.start, halves[2], halves[3])

    def read(self, numbers: np.ndarray, page_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages ``numbers`` (int ``[n]``, each 1 or more) in ``dtype``: two ``[n, page_size, dim]``, zero behind their rows."""
        counts = self.counts(numbers)
        whole = bool((counts == page_size).all())
        first = self.start[numbers - 1]
        if not whole:
            offset = np.arange(page_size)
            inside = upload(offset < counts[:, None], self.k.device)[..., None]
            rows = torch.from_numpy((first[:, None] + np.minimum(offset, counts[:, None] - 1)).ravel())
        else:
            rows = torch.from_numpy(first // page_size)  # full pages come first: they are aligned
        rows, which = rows.to(self.k.device), upload(numbers - 1, self.k.device)
        halves = []
        for half, scale in ((self.k, self.k_scale), (self.v, self.v_scale)):
            raw = raw_rows(half)
            if whole:
                full = int(numbers.max(initial=0))
                found = raw[: full * page_size].view(full, page_size, -1).index_select(0, rows)
            else:
                found = raw.index_select(0, rows).view(len(numbers), page_size, -1)
            if scale is not None:
                found = found.view(half.dtype).float().mul_(scale.index_select(0, which)[:, None, None])
            found = found.to(dtype)
            halves.append(found if whole else found.masked_fill(~inside, 0))
        return halves[0], halves[1]

    def rows(self, numbers: np.ndarray, offsets: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Single tokens: slots ``offsets`` of pages ``numbers`` (int ``[n]``) in ``dtype``, two ``[n, dim]``.

        A slot behind a page's rows gives its last row: mask it.
        """
        row = self.start[numbers - 1] + np.minimum(offsets, self.counts(numbers) - 1)
        index, which = (upload(part, self.k.device) for part in (row, numbers - 1))
        halves = []
        for half, scale in ((self.k, self.k_scale), (self.v, self.v_scale)):
            raw = raw_rows(half)
            found = raw.index_select(0, index)
            if scale is not None:
                found = found.view(half.dtype).float().mul_(scale.index_select(0, which)[:, None])
            halves.append(found.to(dtype))
        return halves[0], halves[1]


class FrozenPages(LayerPages):
    """A page table whose entries are pages of the pool or frozen ones; made by `freeze`.

    Attributes:
        frozen: int32, shaped like ``table``: the number of a frozen page in ``store``, 0 for none. Where it is not 0,
            ``table`` is 0.
        store: the frozen pages, shared with forks.
    """

    frozen: np.ndarray
    store: FrozenRows

    @classmethod
    def around(cls, pages: LayerPages, frozen: np.ndarray, store: FrozenRows) -> FrozenPages:
        """``pages`` (which is used up) with some of its entries frozen."""
        made = object.__new__(cls)
        made.__dict__.update(pages.__dict__)
        made.frozen, made.store = frozen, store
        # runs of whole heads are read as views: only where nothing of such a head is frozen
        made.contiguous = made.contiguous and not frozen[:, made.full_heads].any()
        made._changed()
        return made

    @property
    def quantised(self) -> bool:  # type: ignore[override]
        return self.store.k_scale is not None

    @property
    def _guarded(self) -> bool:
        return self.shared or bool(self.frozen.any())

    # ---------------------------------------------------------------------------------------------------- grow
    def pages_wanted(self, new: np.ndarray) -> int:
        stays = self.frozen > 0  # and so takes no page of the pool
        if self.needs_pool:
            stays[:] = False
        elif stays.any():
            columns = max(stays.shape[2], int(self.pages_for(self.lens + new).max(initial=0)))
            stays &= ~self._touched(new, columns)[:, :, : stays.shape[2]]
        return super().pages_wanted(new) - int(stays.sum())

    def prepare(self, new: np.ndarray) -> None:
        if self.needs_pool and self.frozen.any():
            self._own(self.frozen > 0)
        super().prepare(new)

    def _changed(self) -> None:
        super()._changed()
        columns = self.table.shape[2]
        if self.frozen.shape[2] != columns:
            missing = max(0, columns - self.frozen.shape[2])
            self.frozen = np.pad(self.frozen, ((0, 0), (0, 0), (0, missing)))[:, :, :columns]

    def _own(self, touched: np.ndarray) -> None:
        """Thaw those of these pages that are frozen; then copy those that others hold too."""
        cold = touched & (self.frozen > 0)
        if cold.any():
            with self.pool.lock:
                fresh = self.pool.alloc(int(cold.sum()))
                self._fill(fresh, self.frozen[cold].astype(np.int64))
                self.table[cold] = fresh
                self.frozen[cold] = 0
                self._changed()
        if self.shared:
            super()._own(touched)

    def _fill(self, pages: np.ndarray, numbers: np.ndarray) -> None:
        for begin in range(0, len(pages), PIECE_PAGES):
            part = slice(begin, begin + PIECE_PAGES)
            index = upload(pages[part].astype(np.int64), self.pool.k.device)
            k, v = self.store.read(numbers[part], self.pool.page_size, self.pool.k.dtype)
            self.pool.k.index_copy_(0, index, k)
            self.pool.v.index_copy_(0, index, v)

    def thawed(self) -> LayerPages:
        """An ordinary table with the same content, in pages of its own or shared with this one; free it after use."""
        twin = self.fork()
        twin._own(twin.frozen > 0)
        plain = object.__new__(LayerPages)
        plain.__dict__.update({name: value for name, value in twin.__dict__.items() if name not in ("frozen", "store")})
        return plain

    # ---------------------------------------------------------------------------------------------------- read
    def gather(self, positions: np.ndarray, heads: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().gather(positions, heads)
        slot = np.maximum(self.slots(positions, heads), 0)
        size = self.pool.page_size
        column = np.minimum(slot // size, self.frozen.shape[2] - 1)
        numbers = self.frozen[np.arange(self.batch_size)[:, None, None], heads[None, :, None], column]
        if numbers.any():
            where = np.flatnonzero(numbers)
            offsets = np.broadcast_to(slot % size, numbers.shape).ravel()[where]
            found = self.store.rows(numbers.ravel()[where].astype(np.int64), offsets, k.dtype)
            index = upload(where, k.device)
            for half, rows in zip((k, v), found, strict=True):
                half.view(-1, half.shape[3]).index_copy_(0, index, rows)
        return k, v

    def copies(self, heads: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = np.zeros((self.batch_size, len(heads), count), np.int64)
        width = min(count, self.frozen.shape[2])
        part[:, :, :width] = self.frozen[:, heads, :width]
        numbers = part.ravel()
        if not numbers.any():
            return super().copies(heads, count)
        pool, size, cold = self.pool, self.pool.page_size, np.flatnonzero(numbers)
        halves = self.store.read(numbers[cold], size, pool.k.dtype)
        if len(cold) < len(numbers):
            hot = np.flatnonzero(numbers == 0)
            own = upload(self.table[:, heads, :count].ravel()[hot].astype(np.int64), pool.k.device)
            into_hot, into_cold = (upload(index, pool.k.device) for index in (hot, cold))
            mixed = []
            for slab, found in zip((pool.k, pool.v), halves, strict=True):
                whole = slab.new_empty(len(numbers), *slab.shape[1:])
                whole.index_copy_(0, into_cold, found)
                mixed.append(whole.index_copy_(0, into_hot, slab.index_select(0, own)))
            halves = mixed[0], mixed[1]
        shape = (self.batch_size, len(heads), count * size, -1)
        return halves[0].view(shape), halves[1].view(shape)

    def _runs_of(self, heads: np.ndarray, key: int | str | None, rows: slice) -> tuple[int, int, int] | None:
        if key not in self._runs and self.frozen[rows][:, heads].any():
            self._runs[key] = None
        return super()._runs_of(heads, key, rows)

    def head_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        live, ideal = super().head_bytes()
        rows = self.store.counts(self.frozen).sum((0, 2))
        scales = 0 if self.store.k_scale is None else 8 * (self.frozen > 0).sum((0, 2))
        token = self.pool.page_bytes // self.pool.page_size
        return live + rows * self.store.token_bytes + scales, self.frozen_bytes(ideal, token)

    def frozen_bytes(self, ideal: np.ndarray, token: int) -> np.ndarray:
        """Bytes of each head's tokens when frozen ones count as they are kept; ``token``: bytes of one that is not."""
        return ideal + self.store.counts(self.frozen).sum((0, 2)) * (self.store.token_bytes - token)

    def melt(self) -> None:
        """Let go of the frozen pages."""
        self.frozen = np.zeros_like(self.table)
        self.store = self.store.empty()

    # ------------------------------------------------------------------------------------- rows of the batch, forks
    def select(self, indices: np.ndarray) -> None:
        frozen = self.frozen[indices]
        super().select(indices)
        self.frozen = frozen

    def fork(self) -> FrozenPages:
        twin = super().fork()
        assert isinstance(twin, FrozenPages)
        twin.frozen = self.frozen.copy()
        return twin

    def free(self) -> None:
        super().free()
        self.melt()

    def _drop(self, heads: np.ndarray) -> None:
        super()._drop(heads)
        self.frozen[:, heads] = 0

    def crop(self, removed: np.ndarray) -> None:
        keep = self.pages_for(self.lens - removed)
        self.frozen[np.arange(self.frozen.shape[2]) >= keep[..., None]] = 0
        super().crop(removed)


def raw_rows(rows: torch.Tensor) -> torch.Tensor:
    """Bytes for dtypes of one byte: torch has no kernels that pick rows of float8."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def ranges(first: np.ndarray, counts: np.ndarray, device: torch.device) -> torch.Tensor:
    """The numbers ``first[i] ... first[i] + counts[i] - 1`` of every i, one after the other."""
    ends = np.cumsum(counts)
    steps = np.arange(int(ends[-1]) if len(ends) else 0)
    return upload(np.repeat(first - (ends - counts), counts) + steps, device)
