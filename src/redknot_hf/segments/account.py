"""What building a prompt took, and what may be expected of it: nothing here is computed from a formula."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

__all__ = ["BuildAccount", "Clock", "SegmentAccount"]


@dataclass(frozen=True)
class SegmentAccount:
    """One segment of a prompt; the header is the first, if there is one.

    Attributes:
        id: the segment's key, 64 hex digits.
        start, tokens: its place in the prompt.
        hit: it was in the store.
        tier: which store it came from; "computed" for a miss.
        recomputed: rows computed anew.
        exact: its stored rows are what a full prefill gives here, because everything before it is what it was computed
            behind.
        nbytes: bytes of the entry.
    """

    id: str
    start: int
    tokens: int
    hit: bool
    tier: str
    recomputed: int
    exact: bool
    nbytes: int


@dataclass(frozen=True)
class BuildAccount:
    """One build.

    Attributes:
        segments: header and segments in order.
        tokens: of the whole prompt; query: of the query.
        reused, recomputed: rows of segments taken from storage, and computed anew (in the first layer).
        early_layers: how many layers ran over all rows, for the selector or for dense heads.
        ratio: what was asked for, per layer if it was a schedule.
        selector: its name.
        exact: the cache equals a full prefill of the same tokens, up to rounding. Otherwise the result is approximate.
        reason: why it is exact, or what is approximate about it.
        bytes_moved: keys and values copied into the prompt.
        seconds: "store" (reading, and copying to the GPU), "capture" (computing and storing what was missing),
            "select", "recompute" (the forward, with what it loads on the way), "hand_over", "verify" (waiting for
            checksums that were computed meanwhile), and "total"; besides, "load" (copying and rotating; on a GPU the
            host's time to issue it), which is part of the others. On a GPU a build returns before the GPU has finished,
            and the first look at ``seconds`` waits for it.
    """

    segments: list[SegmentAccount]
    tokens: int
    query: int
    reused: int
    recomputed: int
    early_layers: int
    ratio: float | list[float]
    selector: str
    exact: bool
    reason: str
    bytes_moved: int
    timing: Callable[[], dict[str, float]] = field(default=dict, repr=False, compare=False)

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        return self.timing()

    def __str__(self) -> str:
        hits = sum(segment.hit for segment in self.segments)
        kind = "exact" if self.exact else "approximate"
        return (
            f"{self.tokens} tokens: {len(self.segments)} segments ({hits} hits), {self.reused} rows reused, "
            f"{self.recomputed} recomputed by {self.selector}, {self.bytes_moved:,} bytes moved, "
            f"{self.seconds.get('total', 0.0):.3f} s; {kind}: {self.reason}"
        )


class Clock:
    """Seconds between marks. On a GPU they are taken from its own stream, so that a mark waits for nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self.mark("")

    def begin(self) -> None:
        """Forget the marks: what is measured begins now."""
        self._marks.clear()
        self.mark("")

    def mark(self, name: str) -> None:
        """What has been done since the last mark was ``name``; the same name may come again."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
        self._marks.append((name, time.perf_counter(), event))

    def reading(self, **more: float) -> Callable[[], dict[str, float]]:
        """What gives the seconds of all marks so far, when they are asked for; ``more`` is added."""
        return functools.partial(_read, tuple(self._marks), more)


def _read(marks: tuple[tuple[str, float, torch.cuda.Event | None], ...], more: dict[str, float]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    if marks[-1][2] is not None:
        marks[-1][2].synchronize()
    total = 0.0
    for (_, before, start), (name, now, end) in itertools.pairwise(marks):
        took = now - before if start is None or end is None else start.elapsed_time(end) / 1e3
        seconds[name] = seconds.get(name, 0.0) + took
        total += took
    return {**seconds, **more, "total": total}
