"""Which heads become global: by share, by list, or by score.

Pure functions over (layer, kv_head) cells; they know neither models nor files.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..errors import ProfileError, shorten

__all__ = ["MAX_TOKENS", "choose_global", "integer", "select_by_score"]

MAX_TOKENS = 2**30
"""Largest sink or window: no context is longer, and sums of two stay inside int32."""


def choose_global(
    wanted: float | Collection[tuple[int, int]] | None, cells: list[tuple[int, int]], num_kv_heads: int
) -> set[tuple[int, int]]:
    """The cells that `HeadProfile.uniform(global_heads=wanted)` makes global; `cells` are those of attention layers."""
    if wanted is None:
        return set()
    if isinstance(wanted, numbers.Real):
        fraction = float(wanted)
        if isinstance(wanted, bool) or not 0 <= fraction <= 1:
            raise ProfileError(
                f"global_heads is {wanted!r}; expected a fraction in [0, 1] or a set of (layer, kv_head)"
            )
        count = round(fraction * len(cells))
        # Rotating the head index by the layer keeps an even stride from always hitting the same head.
        rotated = [(l, (h + l) % num_kv_heads) for l, h in cells]
        return {rotated[(2 * i + 1) * len(cells) // (2 * count)] for i in range(count)}
    if isinstance(wanted, (str, bytes, Mapping)) or not isinstance(wanted, Iterable):
        raise ProfileError(
            f"global_heads is {shorten(wanted)}; expected a fraction in [0, 1] or a set of (layer, kv_head)"
        )
    known = {cell: cell for cell in cells}
    chosen = set()
    for cell in wanted:
        try:
            found = known.get(tuple(cell))  # type: ignore[arg-type]  # of any length, perhaps unhashable
        except TypeError:
            found = None
        if found is None:
            raise ProfileError(
                f"global_heads contains {shorten(cell)}, not a (layer, kv_head) of the model's attention layers"
            )
        chosen.add(found)
    return chosen


def select_by_score(
    scores: Sequence[Sequence[float]], *, threshold: float | None = None, fraction: float | None = None
) -> set[tuple[int, int]]:
    """Cells whose score is high: exactly one of two rules.

    Args:
        scores: `[layers][heads]`, higher means more in need of all tokens.
        threshold: take every cell with score >= threshold.
        fraction: take the `round(fraction * cells)` highest. Equal scores go to the earlier layer, then the lower head,
            so that the same scores always give the same map.

    Raises:
        ProfileError: both rules or none, or one out of range.
    """
    if (threshold is None) == (fraction is None):
        raise ProfileError("give exactly one of threshold and fraction")
    ranked = [(-score, l, h) for l, row in enumerate(scores) for h, score in enumerate(row)]
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not math.isfinite(threshold):
            raise ProfileError(f"threshold is {shorten(threshold)}; expected a finite number")
        return {(l, h) for negative, l, h in ranked if -negative >= threshold}
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 <= fraction <= 1:
        raise ProfileError(f"fraction is {shorten(fraction)}; expected a number from 0 to 1")
    return {(l, h) for _, l, h in sorted(ranked)[: round(fraction * len(ranked))]}


def integer(value: Any, what: str, least: int, most: int = MAX_TOKENS) -> int:
    """`value` as a plain int, or a `ProfileError` that names it; numpy integers pass, booleans and floats do not."""
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not good or not least <= value <= most:
        raise ProfileError(f"{what} is {shorten(value)}; expected an integer from {least} to {most}")
    return int(value)
