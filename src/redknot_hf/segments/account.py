"""What building a prompt took, and what may be expected of it: nothing here is computed from a formula."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BuildAccount", "SegmentAccount"]


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
        seconds: "store" (reading), "capture" (computing and storing what was missing), "load" (copying and rotating;
            on a GPU the time to issue it), "select", "recompute" (the forward, with what it loads on the way),
            "hand_over", "total".
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
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        hits = sum(segment.hit for segment in self.segments)
        kind = "exact" if self.exact else "approximate"
        return (
            f"{self.tokens} tokens: {len(self.segments)} segments ({hits} hits), {self.reused} rows reused, "
            f"{self.recomputed} recomputed by {self.selector}, {self.bytes_moved:,} bytes moved, "
            f"{self.seconds.get('total', 0.0):.3f} s; {kind}: {self.reason}"
        )
