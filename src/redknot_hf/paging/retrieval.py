"""The retrieval heads of a layer: all tokens in the archive, the recent ones on the device, far pages read by choice.

In a decode step the far pages of a head are picked by bounds that lie on the device (`bounds`), and read from there if
they are resident (`resident`) or else from the archive. Those that came close are fetched ahead for the next step. A
chunk of several tokens reads everything.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import torch_attention
from .bounds import PICKED, RUNNER_UP, PageBounds, rank_pages, upper_bounds
from .cold_pools import FilePool, fetch_pages, read_by_device, side_stream, upload_pages
from .pages import LayerPages
from .pool import PagePool, upload
from .resident import FetchCounts, ResidentPages

if TYPE_CHECKING:
    from .tiers import TieredPages

__all__ = ["FarHeads"]

# One spare page of so many is for pages that came close, the others for pages that were read lately. With SmolLM2 and 2,000
# tokens of text a quarter or a half of them found more than none or all, by 1 or 2 %.
AHEAD_SHARE = 3


class FarHeads:
    """The retrieval heads of one layer.

    Args:
        pages: the layer's page table.
        heads: int64, which KV heads these are.
        bounds: of the pages of the archive's pool.
        pick: None, an int or a float: see `bounds.pick_pages`.
        budget: far pages that each head keeps on the device. None: twice as many as it picks. What a step reads is kept
            until the next one in any case.
    """

    def __init__(
        self,
        pages: TieredPages,
        heads: np.ndarray,
        bounds: PageBounds,
        pick: int | float | None,
        budget: int | None = None,
    ):
        self._pages = weakref.ref(pages)  # a cycle would hold on to the pool until it is collected
        self.heads, self.bounds, self.pick, self.budget = heads, bounds, pick, budget
        self.counts = FetchCounts()
        self.resident: list[ResidentPages | None] = []  # of each row
        self._indices: dict[int, tuple[tuple[int, int, int], torch.Tensor]] = {}

    def moved_to(self, pages: TieredPages) -> FarHeads:
        """The same heads of another table of the same tokens; nothing is resident, counting goes on."""
        twin = FarHeads(pages, self.heads, self.bounds, self.pick, self.budget)
        twin.counts = self.counts
        return twin

    @property
    def pages(self) -> TieredPages:
        pages = self._pages()
        assert pages is not None, "the page table of these heads is gone"
        return pages

    @property
    def keeps(self) -> bool:
        """Whether pages are kept on the device between steps; a head that reads all would keep all."""
        return isinstance(self.pick, int) or (self.pick is not None and self.pick < 1.0)

    @property
    def resident_bytes(self) -> int:
        return sum(row.nbytes for row in self.resident if row is not None)

    def rows_of_archive(self) -> np.ndarray:
        return np.searchsorted(self.pages.archived, self.heads)

    # ------------------------------------------------------------------------------------------------- decode
    def decode(self, q: torch.Tensor, spec: torch_attention.AttentionSpec) -> torch.Tensor:
        """One query per row, ``q [batch, heads, group, dim]`` -> the same shape with value channels."""
        archive = self.pages.settled(self.pages.lag)
        self.resident = self.resident[: len(q)] + [None] * (len(q) - len(self.resident))
        return torch.cat([self._decode_row(row, q[row : row + 1], spec, archive) for row in range(len(q))])

    def _decode_row(
        self, row: int, q: torch.Tensor, spec: torch_attention.AttentionSpec, archive: LayerPages
    ) -> torch.Tensor:
        pages, heads = self.pages, self.heads
        size, length = pages.pool.page_size, int(pages.lens[row])
        oldest = int(pages.oldest[row, heads].max())
        far = -(-oldest // size)  # pages below this one come from the archive
        near = np.arange(far * size, length)[None]
        near_k, near_v = pages.one_row(row).gather(near, heads)
        if not far:
            return torch_attention._attend(q, near_k, near_v, None, spec, heads, q.shape[2])
        table = archive.table[row, self.rows_of_archive(), :far].astype(np.int64)
        rank = self._rank(q[0], row, table, spec.scale)
        chosen = rank == PICKED
        counts = chosen.sum(1)
        here = self._look(row, table, chosen) if self.keeps else None
        outs = []
        for count in np.unique(counts):  # heads that read equally many pages go together
            group = np.flatnonzero(counts == count)
            picked = np.nonzero(chosen[group])[1].reshape(len(group), int(count))
            if here is not None:
                k, v = here.read(group, picked)
            else:
                self._count(asked=picked.size, late=picked.size)
                k, v = self._fetch(table[group[:, None], picked])
            k, v = torch.cat([k, near_k[:, group]], 2), torch.cat([v, near_v[:, group]], 2)
            outs.append((group, torch_attention._attend(q[:, group], k, v, None, spec, heads[group], q.shape[2])))
        if here is not None and self.budget != 0:
            self._look_ahead(here, table, rank)
        return torch_attention._join(outs, len(heads))

    def _rank(self, q: torch.Tensor, row: int, table: np.ndarray, scale: float) -> np.ndarray:
        """uint8 ``[heads, far pages]``; the first page is always picked: it holds the attention sinks."""
        if not self.keeps:
            return np.full(table.shape, PICKED, np.uint8)
        index = self._index(row, table)
        bounds = upper_bounds(q, self.bounds.low[index], self.bounds.high[index])
        if not isinstance(self.pick, int):
            rank = rank_pages(bounds, scale, self.pick, self._runners_up()).cpu().numpy()
            rank[:, 0] = PICKED
            return rank
        # beside the first page, so that all heads read equally many and go together
        rest = rank_pages(bounds[..., 1:], scale, self.pick, self._runners_up()).cpu().numpy()
        return np.concatenate([np.full((len(rest), 1), PICKED, np.uint8), rest], 1)

    def _index(self, row: int, table: np.ndarray) -> torch.Tensor:
        """``table`` on the device; it changes when the archive gets a page, not with every token."""
        key = row, self.pages.settled(self.pages.lag).version, table.shape[1]
        known = self._indices.get(row)
        if known is None or known[0] != key:
            known = self._indices[row] = key, upload(table, self.bounds.low.device)
        return known[1]

    def _slots(self, picked: int) -> int:
        """Pages that each head keeps when a step picks ``picked`` of them."""
        return 2 * picked if self.budget is None else self.budget

    def _runners_up(self) -> int:
        if self.budget == 0:
            return 0
        if isinstance(self.pick, int):
            spare = self._slots(self.pick + 1) - self.pick - 1
        else:
            spare = max((row.slots for row in self.resident if row is not None), default=24) // 2
        return max(0, -(-spare // AHEAD_SHARE))

    def _look(self, row: int, table: np.ndarray, chosen: np.ndarray) -> ResidentPages:
        """The resident pages of a row with all that are ``chosen`` among them."""
        pool = self.pages.pool
        here = self.resident[row]
        if here is None:
            k, v = pool.k, pool.v
            here = ResidentPages(len(self.heads), pool.page_size, k.shape[2], v.shape[2], k.dtype, k.device)
            self.resident[row] = here
        missing = here.look(chosen, self._slots(int(chosen.sum(1).max())))
        asked, late = int(chosen.sum()), int(missing.sum())
        self._count(asked=asked, found=asked - late, late=late)
        if late:
            head, page, slot = placed = here.place(missing, chosen)
            source = self.pages.settled(self.pages.lag).pool
            try:
                if read_by_device(source, pool.k.device):
                    here.fill_from(source, table[head, page], placed)
                else:
                    k, v = self._fetch(table[head, page][None])
                    size = (late, pool.page_size, -1)
                    here.fill(head, slot, k.view(size), v.view(size))
            except BaseException:
                here.forget(head, page)
                raise
        return here

    def _look_ahead(self, here: ResidentPages, table: np.ndarray, rank: np.ndarray) -> None:
        """Start to fetch the pages that came close in this step, for the next one."""
        absent = here.look_for(rank == RUNNER_UP)
        if not absent.any():
            return
        placed = here.place(absent, rank > 0)
        if len(placed[0]):
            pool = self.pages.settled(self.pages.lag).pool
            here.bring(pool, table[placed[0], placed[1]], placed, self._way(pool))
            self._count(ahead=len(placed[0]))

    def _way(self, source: PagePool) -> str:
        """Who brings pages ahead of a step; see `ResidentPages.bring`."""
        if self.pages.pool.k.device.type != "cpu" or isinstance(source, FilePool):  # a file may have to be read first
            return "thread"
        return "now"

    def _count(self, asked: int = 0, found: int = 0, late: int = 0, ahead: int = 0) -> None:
        counts = self.counts
        counts.asked += asked
        counts.found += found
        counts.late += late
        counts.ahead += ahead
        counts.moved += (late + ahead) * self.pages.pool.page_bytes

    def _fetch(self, picked: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages ``[heads, count]`` of the archive -> two ``[1, heads, count * page_size, dim]`` on the device."""
        pool, device = self.pages.settled(self.pages.lag).pool, self.pages.pool.k.device
        slabs, numbers = (pool.k, pool.v), picked.ravel()
        if read_by_device(pool, device):
            k, v = (torch.empty(len(numbers), *slab.shape[1:], dtype=slab.dtype, device=device) for slab in slabs)
            fetch_pages(pool, numbers, k, v, np.arange(len(numbers)))
        else:
            index = torch.from_numpy(numbers)
            with side_stream(device, wait_after=True) as main:
                k, v = (upload_pages(slab, index, device, main) for slab in slabs)
        shape = (1, len(picked), picked.shape[1] * pool.page_size, -1)
        return k.view(shape), v.view(shape)

    # ------------------------------------------------------------------------------------------------- rows, crops
    def select(self, indices: np.ndarray) -> None:
        """Rows become ``indices``; of rows that repeat, the first keeps what is resident."""
        old, self.resident = self.resident, []
        for index in indices:
            held = old[index] if index < len(old) else None
            self.resident.append(held)
            if held is not None:
                old[index] = None

    def forget_from(self, tokens: int) -> None:
        """Forget resident pages with a token from position ``tokens`` on in any row."""
        for row in self.resident:
            if row is not None:
                row.forget_from(tokens // self.pages.pool.page_size)

    # ------------------------------------------------------------------------------------------------- prefill
    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, new: np.ndarray, spec: torch_attention.AttentionSpec
    ) -> torch.Tensor:
        """A chunk over the whole past and itself, like a global head. ``q [batch, heads, group, n, dim]``."""
        index = upload(self.heads, k.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
        past = _Past(self.pages, self.rows_of_archive(), k.device)
        everyone = np.arange(len(self.heads))
        return torch_attention._prefill_full(past, q, k, v, self.pages.lens, new, spec, everyone, False)  # type: ignore[arg-type]


class _Past:
    """The archive's pages of some heads as `torch_attention` reads pages, on the device of the queries."""

    def __init__(self, pages: TieredPages, heads: np.ndarray, device: torch.device):
        archive = pages.archive
        self.table = archive.table[:, heads]
        self.batch_size, self.num_heads = archive.batch_size, len(heads)
        self.pool: Any = archive.pool
        if device.type != "cpu" and (self.table > 0).any():
            held = np.unique(self.table[self.table > 0])
            self.pool = _Slabs(archive.pool, held.astype(np.int64), device)
            self.table = np.where(self.table > 0, np.searchsorted(held, self.table), 0)

    def copies(self, heads: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `LayerPages.copies`."""
        index = upload(self.table[:, heads, :count].astype(np.int64).ravel(), self.pool.k.device)
        shape = (self.batch_size, len(heads), count * self.pool.page_size, -1)
        return self.pool.k.index_select(0, index).view(shape), self.pool.v.index_select(0, index).view(shape)


class _Slabs:
    def __init__(self, pool: PagePool, held: np.ndarray, device: torch.device):
        self.page_size, index = pool.page_size, torch.from_numpy(held)
        with side_stream(device, wait_after=True) as main:
            self.k, self.v = (upload_pages(slab, index, device, main) for slab in (pool.k, pool.v))
