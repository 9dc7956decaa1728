"""Page tables with a cold tier: what leaves the compute device is kept on the host or in files, not lost.

A `TieredPages` is a `LayerPages` whose local and retrieval heads also write every token to an archive: a second page
table, on host memory (page-locked next to a GPU) or on a mapped file, in which these heads keep everything. So

- a local head can be given a longer window later (`regrown`), or be cropped further than its ring reaches;
- a retrieval head keeps only its recent tokens on the device and reads far pages from the archive, all of them
  (exactly a global head) or those that `bounds` picks.

Both tables share pages between rows and forks in the same way, so forks, beams and crops need nothing special.

On CUDA tokens travel to the archive on a stream of their own, into page-locked memory; the host does not wait for them.
They are entered into the archive's pages when somebody asks for the archive, or when so many have come that it is worth it. A
decode step needs no token that is still under way: far pages end before them. Far pages that were picked stay on the device
for a while and likely ones are fetched ahead (`resident`), so that a step fetches what nobody expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CacheError
from .bounds import PageBounds
from .cold_pools import FilePool, HostPool, side_stream
from .pages import KEEP_ALL, LayerPages
from .pool import PagePool, upload
from .retrieval import FarHeads

__all__ = ["ColdTier", "FarHeads", "FilePool", "HostPool", "TieredPages", "lost_tokens", "regrown", "rehoused"]

MOST_UNDER_WAY = 64  # tokens of a row that wait to be entered into the archive's pages, all at once
NEAR_TOKENS = 256  # recent tokens that retrieval heads keep on the device


@dataclass
class _Arriving:
    """A chunk on its way to the archive: keys and values ``[batch, heads, n, dim]`` on the host once ``copied``.

    Attributes:
        tray, place: where a single token of each row lies, beside others.
    """

    k: torch.Tensor
    v: torch.Tensor
    new: np.ndarray
    copied: torch.cuda.Event | None
    tray: _Tray | None = None
    place: int = 0


class _Tray:
    """Page-locked memory for tokens that come one by one: to lock a page takes longer than a step of a layer.

    Attributes:
        k, v: ``[tokens, batch, heads, 1, dim]``: copies from a GPU need each token in one piece. used: tokens that are given
            away; one that was is never given away again.
    """

    @torch.inference_mode(False)  # steps of any mode write into it
    def __init__(self, tokens: int, k: torch.Tensor, v: torch.Tensor, pinned: bool = True):
        self.k, self.v = (torch.empty((tokens, *x.shape), dtype=x.dtype, pin_memory=pinned) for x in (k, v))
        self.used = 0

    def side_by_side(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``first`` to ``last`` as ``[batch, heads, tokens, dim]``."""
        k, v = (half[first : last + 1].squeeze(3).permute(1, 2, 0, 3) for half in (self.k, self.v))
        return k, v


def _side_by_side(chunks: list[_Arriving]) -> int:
    """How many of the first chunks can be entered as one: those without padding, before any with."""
    for index, chunk in enumerate(chunks):
        if (chunk.new != chunk.k.shape[2]).any():
            return max(index, 1)
    return len(chunks)


class TieredPages(LayerPages):
    """The page tables of one layer and the archive behind them.

    Args:
        pool: of the compute device; cold_pool: of the archive.
        sink, window: int ``[kv_heads]``; ``KEEP_ALL`` for heads that keep everything on the device.
        retrieval: int64, heads that keep everything, but far pages in the archive alone.
        near: recent tokens that retrieval heads keep on the device, at least a page.
        bounds: of the cold pool's pages; needed with retrieval heads.
        pick: how retrieval heads choose far pages: `bounds.pick_pages`.
        budget: far pages that each retrieval head keeps on the device: `retrieval.FarHeads`.

    Attributes:
        archived: int64, the local and the retrieval heads, in order: the heads of ``archive``.
        archive: their page table on the cold pool, complete.
        far: the retrieval heads, or None.
        lag: tokens that a decode step does not need in the archive: far pages end before them.
    """

    def __init__(
        self,
        pool: PagePool,
        cold_pool: PagePool,
        sink: np.ndarray,
        window: np.ndarray,
        batch_size: int,
        rollback: int,
        retrieval: np.ndarray,
        near: int = NEAR_TOKENS,
        bounds: PageBounds | None = None,
        pick: int | float | None = None,
        budget: int | None = None,
        contiguous: bool = True,
    ):
        sink, window = np.array(sink, np.int64), np.array(window, np.int64)
        sink[retrieval], window[retrieval] = 0, max(near, pool.page_size)  # the last page is always here
        super().__init__(pool, sink, window, batch_size, rollback, contiguous)
        self.archived = self.ring_heads
        keeps = np.full(len(self.archived), KEEP_ALL)
        self._archive = LayerPages(cold_pool, np.zeros(len(keeps), np.int64), keeps, batch_size, contiguous=False)
        self._start_arrivals()
        self._archived_on: torch.Tensor | None = None  # the same on the device
        if len(retrieval):
            assert bounds is not None
            self.far = FarHeads(self, retrieval, bounds, pick, budget)
        self.local_heads = np.setdiff1d(self.ring_heads, retrieval)
        behind = int(self.window[retrieval].min(initial=KEEP_ALL)) - pool.page_size
        self.lag = min(MOST_UNDER_WAY, max(1, behind))

    @property
    def archive(self) -> LayerPages:
        return self.settled()

    def _start_arrivals(self) -> None:
        self._arriving: list[_Arriving] = []
        self._under_way = np.zeros(self._archive.batch_size, np.int64)  # tokens in these chunks
        self._promised = 0  # tokens beyond them for which the archive has pages
        self._tray: _Tray | None = None

    def settled(self, lag: int = 0) -> LayerPages:
        """The archive, with all tokens entered but at most the latest ``lag`` ones of every row."""
        if len(self._arriving) and (lag == 0 or int(self._under_way.max()) > lag):
            # not the latest chunk, if it may wait: it may be on its way still
            keep = 1 if lag and int(self._arriving[-1].new.max(initial=0)) <= lag else 0
            chunks = self._arriving[: len(self._arriving) - keep]
            self._arriving = self._arriving[len(chunks) :]
            while chunks:
                alike = _side_by_side(chunks)
                self._enter(chunks[:alike])
                chunks = chunks[alike:]
        return self._archive

    def _enter(self, chunks: list[_Arriving]) -> None:
        last = chunks[-1].copied
        if last is not None:
            last.synchronize()  # copies of one stream: the others have arrived, too
        k, v, tray, place = chunks[0].k, chunks[0].v, chunks[0].tray, chunks[0].place
        if tray is not None and all(chunk.tray is tray for chunk in chunks):
            k, v = tray.side_by_side(place, chunks[-1].place)
        elif len(chunks) > 1:
            k, v = (torch.cat([getattr(chunk, name) for chunk in chunks], 2) for name in ("k", "v"))
        new = sum((chunk.new for chunk in chunks[1:]), chunks[0].new)
        self._archive.write(k, v, new)
        self._under_way = self._under_way - new
        self.count_archive(new)

    def count_archive(self, new: np.ndarray) -> None:
        """Count ``new`` (int64 ``[batch]``) tokens that were copied into the archive's pages from elsewhere."""
        before = self._archive.lens
        self._archive.advance(new)
        if self.far is not None:
            self.far.bounds.update(self._archive, before)

    def prepare(self, new: np.ndarray) -> None:
        super().prepare(new)
        most = int(new.max(initial=0))
        if most > self._promised:
            # pages for what is under way and for what comes: entering them later takes no memory, so it cannot fail
            self._archive.prepare(self._under_way + new)
            self._promised, self._archive._room = most + self._archive._room, 0
        self._promised -= most

    def write(self, k: torch.Tensor, v: torch.Tensor, new: np.ndarray) -> None:
        super().write(k, v, new)
        if self._archived_on is None or self._archived_on.device != k.device:
            self._archived_on = upload(self.archived, k.device)
        index = self._archived_on
        parts = [half.index_select(1, index) for half in (k, v)]
        self.settled(self.lag)
        self._under_way = self._under_way + new
        if k.device.type != "cuda":
            self._arriving.append(_Arriving(parts[0], parts[1], new, None))
            return
        tray, place, halves = None, 0, []
        if k.shape[2] == 1:
            if self._tray is None or self._tray.used == len(self._tray.k):
                self._tray = _Tray(self.lag, parts[0], parts[1])
            tray = self._tray
            place, tray.used = tray.used, tray.used + 1
            halves = [tray.k[place], tray.v[place]]
        else:
            halves = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts]
        with side_stream(k.device, wait_after=False):
            side = torch.cuda.current_stream(k.device)
            for part, host in zip(parts, halves, strict=True):
                part.record_stream(side)  # nobody waits: its memory must not be given away before it has been copied
                host.copy_(part, non_blocking=True)
            copied = side.record_event()
        self._arriving.append(_Arriving(halves[0], halves[1], new, copied, tray, place))

    # ------------------------------------------------------------------------------------- rows of the batch, forks
    def one_row(self, row: int) -> LayerPages:
        """A view of one row, for reading."""
        view = object.__new__(LayerPages)
        view.__dict__.update(self.__dict__)
        view.table, view.lens, view.oldest = (
            self.table[row : row + 1],
            self.lens[row : row + 1],
            self.oldest[row : row + 1],
        )
        return view

    def select(self, indices: np.ndarray) -> None:
        super().select(indices)
        self.archive.select(indices)
        self._start_arrivals()
        if self.far is not None:
            self.far.select(indices)

    def fork(self) -> TieredPages:
        twin = super().fork()
        assert isinstance(twin, TieredPages)
        twin._archive = self.archive.fork()
        self._start_arrivals()
        twin._start_arrivals()
        if self.far is not None:
            twin.far = FarHeads(twin, self.far.heads, self.far.bounds, self.far.pick, self.far.budget)
        return twin

    def free(self) -> None:
        super().free()
        self._archive.free()
        self._start_arrivals()
        if self.far is not None:
            self.far.resident = []

    # ------------------------------------------------------------------------------------------------- crop
    def check_crop(self, removed: np.ndarray) -> None:
        """Every token is in the archive, so only the length limits what can be taken back."""
        if (removed > self.lens).any():
            raise CacheError(f"cannot crop {int(removed.max())} tokens: only {int(self.lens.min())} are stored")

    def crop(self, removed: np.ndarray) -> None:
        """Take back the last ``removed`` tokens of each row; rings are filled up again from the archive."""
        super().crop(removed)
        self.archive.crop(removed)
        self._start_arrivals()
        if self.far is not None:
            self.far.forget_from(int(self.lens.min(initial=0)))
        self._refill()

    def _own_slots(self, heads: np.ndarray, positions: np.ndarray, keep: np.ndarray) -> None:
        """Copy on write for the pages of these slots."""
        if not self.shared:
            return
        page = self.slots(positions, heads) // self.pool.page_size
        touched = np.zeros(self.table.shape, bool)
        batch, head, column = np.nonzero(keep)
        touched[batch, heads[head], page[batch, head, column]] = True
        self._own(touched)

    def _refill(self) -> None:
        heads = self.ring_heads
        if not len(heads):
            return
        low = np.maximum(self.sink.astype(np.int64), self.lens[:, None] - self.ring)
        missing = np.minimum(self.oldest, self.lens[:, None]) - low
        most = int(missing[:, heads].max(initial=0))
        if most > 0:
            positions = np.broadcast_to(np.arange(int(self.lens.max())), (self.batch_size, int(self.lens.max())))
            # usually a few tokens behind a ring; a whole ring when the crop went further back than that
            lowest = int(low[:, heads].min())
            positions = positions[:, lowest:]
            keep = (positions[:, None] >= low[:, heads, None]) & (positions[:, None] < self.lens[:, None, None])
            keep &= positions[:, None] < np.maximum(self.oldest, low)[:, heads, None]
            self._own_slots(heads, positions, keep)
            fill_slots(self, heads, positions, keep, self.archive, np.arange(len(heads)))
        self.oldest = self.oldest.copy()  # a fork may have the same array
        self.oldest[:, heads] = low[:, heads]
        self._changed()


def rehoused(old: LayerPages, pool: PagePool) -> LayerPages:
    """An empty table of the geometry of ``old`` on another pool, in front of the same archive."""
    fresh = object.__new__(type(old))
    fresh.__dict__.update(old.__dict__)
    fresh.pool, fresh.shared = pool, False
    fresh.table = np.zeros_like(old.table)
    fresh.lens = np.zeros_like(old.lens)
    fresh.oldest = np.broadcast_to(old.sink.astype(np.int64), old.oldest.shape).copy()
    fresh._changed()
    if isinstance(fresh, TieredPages) and fresh.far is not None:
        fresh.far = fresh.far.moved_to(fresh)
    return fresh


def fill_slots(
    target: LayerPages,
    heads: np.ndarray,
    positions: np.ndarray,
    keep: np.ndarray,
    source: LayerPages,
    source_heads: np.ndarray,
) -> None:
    """Copy tokens between tables: ``positions [batch, n]`` of ``source_heads`` into ``heads``, where ``keep``
    (bool ``[batch, heads, n]``)."""
    if not keep.any():
        return
    rows = source.rows(positions, source_heads)[keep]
    index = upload(rows, source.pool.k.device)
    into = upload(target.rows(positions, heads)[keep], target.pool.k.device)
    with target.pool.lock:
        for slab, from_slab in ((target.pool.k, source.pool.k), (target.pool.v, source.pool.v)):
            found = from_slab.view(-1, from_slab.shape[2]).index_select(0, index)
            slab.view(-1, slab.shape[2]).index_copy_(0, into, found.to(slab.device))


def lost_tokens(pages: LayerPages) -> np.ndarray:
    """Tokens of each head that are kept nowhere, int64 ``[batch, kv_heads]``."""
    lost = np.maximum(pages.oldest - pages.sink, 0)
    if isinstance(pages, TieredPages):
        lost[:, pages.archived] = 0
    return lost


def regrown(old: LayerPages, fresh: LayerPages, name: str) -> LayerPages:
    """Fill the empty table ``fresh``, of another geometry, with the tokens of ``old``; ``old`` keeps its pages.

    Args:
        name: of the layer, for errors.

    Raises:
        CacheError: a head would have to show tokens that are kept nowhere. Nothing has been taken from the pools then.
    """
    lens, heads = old.lens, np.arange(old.num_heads)
    length = int(lens.max(initial=0))
    positions = np.broadcast_to(np.arange(length), (len(lens), length))
    at = positions[:, None]

    def holds(pages: LayerPages) -> np.ndarray:
        return (at < pages.sink[:, None]) | (at >= pages.oldest[:, :, None])

    there = holds(old)
    if isinstance(old, TieredPages):
        there[:, old.archived] = True
    real = at < lens[:, None, None]
    needs = (at < fresh.sink[:, None]) | (at > lens[:, None, None] - fresh.window[:, None].astype(np.int64))
    missing = needs & real & ~there
    if missing.any():
        row, head, position = (int(x) for x in np.argwhere(missing)[0])
        raise CacheError(
            f"{name}: head {head} would have to show token {position} of row {row}, which it has dropped "
            f"({int(missing[row, head].sum())} tokens are missing). Build the cache with cold='cpu' or 'disk' to be "
            "able to give heads longer windows later, or call cache.reset() and feed the prompt again"
        )
    archived = fresh.archived if isinstance(fresh, TieredPages) else np.zeros(0, np.int64)
    if not (there | ~real)[:, archived].all():
        raise CacheError(
            f"{name}: tokens were dropped before there was a cold tier, so its archive would have gaps. Call "
            "cache.reset() and feed the prompt again"
        )
    fresh.prepare(lens)
    if isinstance(fresh, TieredPages):
        everyone = np.arange(len(fresh.archived))
        _copy_from(old, fresh.archive, everyone, fresh.archived, positions, real[:, :1] & there[:, fresh.archived])
    fresh.advance(lens)
    if isinstance(fresh, TieredPages):
        fresh.count_archive(lens)
    # a ring may reach further back than what is there: then it starts behind the last gap
    gap = np.where(real & ~there & (at >= fresh.sink[:, None]), at + 1, 0).max(2, initial=0)
    fresh.oldest = np.maximum(fresh.oldest, gap)
    _copy_from(old, fresh, heads, heads, positions, real & there & holds(fresh))
    fresh._changed()
    return fresh


def _copy_from(
    old: LayerPages,
    target: LayerPages,
    target_heads: np.ndarray,
    heads: np.ndarray,
    positions: np.ndarray,
    keep: np.ndarray,
) -> None:
    """From the device where a head holds the token there, else from the archive."""
    at = positions[:, None]
    on_device = (at < old.sink[heads][:, None]) | (at >= old.oldest[:, heads, None])
    fill_slots(target, target_heads, positions, keep & on_device, old, heads)
    if isinstance(old, TieredPages):
        inside = np.isin(heads, old.archived)
        if inside.any():
            rest = (keep & ~on_device)[:, inside]
            rows = np.searchsorted(old.archived, heads[inside])
            fill_slots(target, target_heads[inside], positions, rest, old.archive, rows)


class ColdTier:
    """The cold pools of one cache, and how its retrieval heads use them.

    Args:
        kind: ``"cpu"`` or ``"disk"``.
        pick: how retrieval heads choose far pages: None for all (exact), an int or a float in (0, 1] (`pick_pages`).
        near: recent tokens that retrieval heads keep on the device.
        budget: far pages that each retrieval head keeps on the device (`retrieval.FarHeads`).

    Raises:
        CacheError: an argument is out of range.
    """

    def __init__(self, kind: str, pick: int | float | None = None, near: int = NEAR_TOKENS, budget: int | None = None):
        if kind not in ("cpu", "disk"):
            raise CacheError(f"cold={kind!r}: expected 'drop', 'cpu' or 'disk'")
        good = pick is None or (type(pick) is int and pick >= 0) or (type(pick) is float and 0.0 < pick <= 1.0)
        if not good:
            raise CacheError(
                f"retrieve={pick!r}: expected None (all far pages, exact), a number of pages, or a share of the "
                "attention above 0 and up to 1.0"
            )
        if type(near) is not int or near < 1:
            raise CacheError(f"near_tokens={near!r}: expected a number of tokens, 1 or more")
        if budget is not None and (type(budget) is not int or budget < 0):
            raise CacheError(
                f"resident_pages={budget!r}: expected a number of pages that each retrieval head keeps on the device (0: "
                "those of its latest step alone), or None for twice as many as it picks"
            )
        self.kind, self.pick, self.near, self.budget = kind, pick, near, budget
        self._pools: dict[tuple[Any, ...], tuple[PagePool, PageBounds]] = {}

    def pages(
        self,
        pool: PagePool,
        sink: np.ndarray,
        window: np.ndarray,
        batch_size: int,
        rollback: int,
        retrieval: np.ndarray,
        contiguous: bool,
    ) -> LayerPages:
        """Empty tables for a layer whose hot pages come from ``pool``; plain ones if none of its heads ever evicts."""
        if not len(retrieval) and (np.asarray(window) >= KEEP_ALL).all():
            return LayerPages(pool, sink, window, batch_size, rollback, contiguous)
        cold, bounds = self._pool_behind(pool)
        return TieredPages(
            pool,
            cold,
            sink,
            window,
            batch_size,
            rollback,
            retrieval,
            self.near,
            bounds,
            self.pick,
            self.budget,
            contiguous,
        )

    def _pool_behind(self, pool: PagePool) -> tuple[PagePool, PageBounds]:
        """One cold pool for all hot ones of a kind. Hot pools come and go; nothing here holds on to them."""
        key_dim, value_dim, dtype, device = pool.k.shape[2], pool.v.shape[2], pool.k.dtype, pool.k.device
        key = (pool.page_size, key_dim, value_dim, dtype, device)
        if key not in self._pools:
            arguments = (pool.page_size, key_dim, value_dim, dtype, torch.device("cpu"))
            cold = FilePool(*arguments) if self.kind == "disk" else HostPool(*arguments, pinned=device.type == "cuda")
            self._pools[key] = (cold, PageBounds(key_dim, dtype, device))
        return self._pools[key]

    @property
    def host_pools(self) -> list[HostPool]:
        """The cold pools that lie in host memory."""
        return [cold for cold, _ in self._pools.values() if isinstance(cold, HostPool)]

    def drop_pools(self) -> None:
        """Give the cold slabs back of which no page is in use, here or in a fork."""
        self._pools = {key: held for key, held in self._pools.items() if held[0].num_free < held[0].num_pages - 1}
