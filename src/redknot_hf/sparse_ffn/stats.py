"""How many FFN rows ran."""

from __future__ import annotations

import threading

__all__ = ["SparseFFNStats"]


class SparseFFNStats:
    """Rows of the forwards that a schedule was applied to, by layer. Padding counts as seen; dense forwards (decode
    steps, short chunks) do not count.

    Attributes:
        seen, run: rows of every layer, ``[layers]``.
    """

    def __init__(self, layers: int):
        self.seen, self.run = [0] * layers, [0] * layers
        self._lock = threading.Lock()

    def add(self, layer: int, seen: int, run: int) -> None:
        with self._lock:
            self.seen[layer] += seen
            self.run[layer] += run

    def reset(self) -> None:
        with self._lock:
            self.seen, self.run = [0] * len(self.seen), [0] * len(self.run)

    @property
    def fraction(self) -> float:
        """Share of all FFN rows that ran, over all layers; 1.0 if nothing was seen."""
        total = sum(self.seen)
        return sum(self.run) / total if total else 1.0

    def __str__(self) -> str:
        return f"{self.fraction:.1%} of {sum(self.seen):,} FFN rows run"
