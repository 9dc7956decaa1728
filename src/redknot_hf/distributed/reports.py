"""`MemoryReport` over all ranks of a tensor-parallel model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..memory import MemoryReport
from ..paging.resident import FetchCounts
from .ranks import Ranks

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["WorldReport", "world_report"]


@dataclass(frozen=True)
class WorldReport:
    """What a cache occupies on every rank and in all.

    Attributes:
        ranks: one report per rank, in order; heads as that rank holds them.
        total: their sum; heads in the order of the model (`[layers][kv_heads]` of all ranks side by side).
    """

    ranks: list[MemoryReport]
    total: MemoryReport

    @property
    def imbalance(self) -> float:
        """Largest over mean live bytes per rank: 1.0 is even."""
        live = [report.live for report in self.ranks]
        return max(live) * len(live) / sum(live) if sum(live) else 1.0

    def __str__(self) -> str:
        live = [f"{report.live:,}" for report in self.ranks]
        return f"{self.total}; live per rank {', '.join(live)} (largest over mean {self.imbalance:.3f})"


def world_report(cache: RedKnotCache, *, group: Any = None) -> WorldReport:
    """The memory report of every rank, on every rank. All ranks of the cache's model call it.

    Args:
        group: process group of the ranks, where it is not the default one.

    Raises:
        RedKnotError: the ranks cannot talk to each other.
    """
    ranks = Ranks.of(cache.tp_rank, cache.tp_size, group)
    reports = [_report(said) for said in ranks.exchange(asdict(cache.memory_report()))]
    summed: dict[str, Any] = {}
    for name in asdict(reports[0]):
        parts = [getattr(report, name) for report in reports]
        if isinstance(parts[0], list):
            summed[name] = [list(chain.from_iterable(rows)) for rows in zip(*parts, strict=True)]
        else:
            counted = [part for part in parts if part is not None]  # what only some kinds of heads count
            summed[name] = sum(counted[1:], counted[0]) if counted else None
    return WorldReport(reports, MemoryReport(**summed))


def _report(said: dict[str, Any]) -> MemoryReport:
    """A report as `asdict` took it apart."""
    far = said.get("far")
    return MemoryReport(**{**said, "far": None if far is None else FetchCounts(**far)})
