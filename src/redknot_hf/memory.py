"""What a cache occupies, in bytes: read off the allocator and the page tables, never computed from a formula."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one cache. Capacity, memory and speed are three things; this is memory alone.

    Attributes:
        allocated: slabs of the page pools this cache uses (shared with its forks) plus its page tables.
        live: pages that this cache holds, each counted once, plus its page tables.
        ideal: the stored tokens alone, without page rounding.
        dense: what `DynamicCache` would hold for the same tokens: every column of every head.
        tables: the page tables alone.
        live_per_head, ideal_per_head: ``[layers][kv_heads]``, summed over the batch, without tables. Layers that are
            not served from pages have empty rows. Pages shared by rows count for each of them here.
        hot, cold: the live bytes on the compute device, and on host or disk.
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

    def __str__(self) -> str:
        share = f" ({self.live / self.dense:.1%} of dense)" if self.dense else ""
        return (
            f"live {self.live:,} bytes{share}, ideal {self.ideal:,}, allocated {self.allocated:,}, dense {self.dense:,}"
        )
