"""What a cache occupies, in bytes: read off the allocator and the page tables, never computed from a formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .layer import RedKnotLayer
from .paging.frozen import FrozenPages
from .paging.pool import PagePool
from .paging.resident import FetchCounts
from .paging.retrieval import FarHeads

if TYPE_CHECKING:
    from .cache import RedKnotCache


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one cache. Capacity, memory and speed are three things; this is memory alone.

    Attributes:
        allocated: slabs of the page pools this cache uses (shared with its forks) plus its page tables.
        live: pages that this cache holds, each counted once, plus its page tables.
        ideal: the stored tokens alone, without page rounding.
        dense: what `DynamicCache` would hold for the same tokens: every column of every head.
        tables: the page tables alone, and the bounds by which retrieval heads pick pages.
        live_per_head, ideal_per_head: ``[layers][kv_heads]``, summed over the batch, without tables. Layers that are
            not served from pages have empty rows. Pages shared by rows count for each of them here.
        hot, cold: the live bytes on the compute device, and on host or disk.
        resident: of the hot ones, copies of cold pages that retrieval heads keep on the device.
        far: what retrieval heads asked for, found on the device, fetched late and ahead; None without such heads.
    """

    allocated: int
    live: int
    ideal: int
    dense: int
    tables: int
    live_per_head: list[list[int]] = field(repr=False)
    ideal_per_head: list[list[int]] = field(repr=False)
    hot: int = 0
    cold: int = 0
    resident: int = 0
    far: FetchCounts | None = None

    def __str__(self) -> str:
        share = f" ({self.live / self.dense:.1%} of dense)" if self.dense else ""
        text = (
            f"live {self.live:,} bytes{share}, ideal {self.ideal:,}, allocated {self.allocated:,}, dense {self.dense:,}"
        )
        if self.cold:
            text += f"; hot {self.hot:,}, cold {self.cold:,}"
        return text if self.far is None else f"{text}; {self.far}, {self.resident:,} bytes kept for them"


def report_on(cache: RedKnotCache) -> MemoryReport:
    """Count what ``cache`` holds, after everything that is staged or counted on the device has arrived."""
    cache._pull()
    cache.flush()
    held: dict[int, tuple[PagePool, list[np.ndarray]]] = {}
    live_heads: list[list[int]] = []
    ideal_heads: list[list[int]] = []
    tables = dense = cold = 0
    archives: dict[int, tuple[PagePool, list[np.ndarray]]] = {}
    stores: dict[int, Any] = {}
    bounds: dict[int, int] = {}
    resident, counted = 0, None
    for layer in cache.layers:
        # Any: a layer that sleeps has something else in the place of its pages
        pages: Any = layer.pages if isinstance(layer, RedKnotLayer) else None
        if pages is None:
            live_heads.append([])
            ideal_heads.append([])
            continue
        archive = getattr(pages, "archive", None)
        if archive is not None:
            archives.setdefault(id(archive.pool), (archive.pool, []))[1].append(archive.table[archive.table > 0])
            tables += archive.table.nbytes
        far: FarHeads | None = getattr(pages.geometry if getattr(pages, "asleep", False) else pages, "far", None)
        if far is not None:
            counted = far.counts + (counted or FetchCounts())
            bounds[id(far.bounds)] = far.bounds.low.nbytes + far.bounds.high.nbytes
            resident += far.resident_bytes
        if getattr(pages, "asleep", False):  # offloaded: asking for its pages would bring them back
            live_heads.append(pages.rows_per_head_bytes())
            ideal_heads.append(live_heads[-1])
            cold += pages.host_bytes
            dense += pages.batch_size * pages.num_heads * cache.seen * pages.token_bytes
            continue
        token = pages.pool.page_bytes // pages.pool.page_size
        held.setdefault(id(pages.pool), (pages.pool, []))[1].append(pages.table[pages.table > 0])
        for heads, per_head in zip((live_heads, ideal_heads), pages.head_bytes(), strict=True):
            heads.append(per_head.tolist())
        if isinstance(pages, FrozenPages):
            stores[id(pages.store)] = pages.store
            tables += pages.frozen.nbytes
        tables += pages.table.nbytes
        dense += pages.batch_size * pages.num_heads * cache.seen * token
    live = sum(len(np.unique(np.concatenate(lists))) * pool.page_bytes for pool, lists in held.values())
    allocated = sum(pool.allocated_bytes for pool, _ in held.values())
    tables += sum(bounds.values())
    beside = resident + sum(store.nbytes for store in stores.values())  # on the device, in no pool
    live, allocated = live + beside, allocated + beside
    for pool, lists in archives.values():
        kept = len(np.unique(np.concatenate(lists))) * pool.page_bytes
        cold += kept
        allocated += pool.allocated_bytes - kept
    return MemoryReport(
        allocated=allocated + tables + cold,
        live=live + tables + cold,
        ideal=sum(map(sum, ideal_heads)),
        dense=dense,
        tables=tables,
        live_per_head=live_heads,
        ideal_per_head=ideal_heads,
        hot=live + tables,
        cold=cold,
        resident=resident,
        far=counted,
    )
