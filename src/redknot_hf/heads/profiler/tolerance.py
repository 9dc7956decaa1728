"""The smallest budget that costs no more than the user allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import RedKnotError, shorten
from ..profile import HeadProfile
from .validation import Prompts, rounded, validate_profile

__all__ = ["read_tolerance", "search_budget"]

_LADDER = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)
"""Budgets that `tolerance=` tries."""

_TOLERANCES = {"text_kl": ("text", "kl"), "needle_kl": ("needle", "kl"), "accuracy_drop": ("needle", "accuracy")}


def search_budget(
    model: Any,
    references: Sequence[Prompts],
    build: Callable[[float], HeadProfile],
    bounds: Mapping[str, float],
    mode: str,
    context: int,
    bar: Any,
) -> HeadProfile:
    """The smallest budget of the ladder that meets the bounds, by bisection (cost falls with the budget)."""
    tried: dict[float, dict[str, Any]] = {}
    low, high, found = 0, len(_LADDER), None
    while low < high:
        middle = (low + high) // 2
        profile = build(_LADDER[middle])
        profile.metadata["validation"] = validate_profile(model, references, profile, mode, context, bar)
        cost = _costs(profile.metadata["validation"])
        tried[_LADDER[middle]] = cost
        if all(cost[name] <= bound for name, bound in bounds.items()):
            found, high = profile, middle
        else:
            low = middle + 1
    note = {
        "bounds": bounds,
        "met": found is not None,
        "tried": {str(b): rounded(c) for b, c in sorted(tried.items())},
    }
    if found is None:
        warnings.warn(
            f"no budget up to {_LADDER[-1]:.0%} global heads meets the tolerance {bounds} on the validation prompts "
            f"(costs: {note['tried']}); all heads stay global",
            UserWarning,
            stacklevel=3,
        )
        found = build(1.0)
        found.metadata["validation"] = validate_profile(model, references, found, mode, context, bar)
    found.metadata["tolerance"] = note
    return found


def _costs(validation: Mapping[str, Any]) -> dict[str, float]:
    needle = validation["needle"]
    return {
        "text_kl": validation["text"]["kl"],
        "needle_kl": needle["kl"],
        "accuracy_drop": needle["full_accuracy"] - needle["accuracy"],
    }


def read_tolerance(tolerance: float | Mapping[str, float] | None) -> dict[str, float] | None:
    if tolerance is None:
        return None
    bounds = dict(tolerance) if isinstance(tolerance, Mapping) else {"text_kl": tolerance}
    for name, bound in bounds.items():
        if name not in _TOLERANCES:
            raise RedKnotError(f"tolerance names {name!r}; expected some of {', '.join(_TOLERANCES)}")
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound >= 0:
            raise RedKnotError(f"tolerance[{name!r}] is {shorten(bound)}; expected a number >= 0")
    if not bounds:
        raise RedKnotError(f"tolerance is empty; expected a number or some of {', '.join(_TOLERANCES)}")
    return {name: float(bound) for name, bound in bounds.items()}
