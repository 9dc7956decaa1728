"""From measurements to a profile: candidate maps, the best of them by what it costs, and the scores a profile keeps."""

from __future__ import annotations

import datetime
from typing import Any

import torch
from torch import Tensor

from ..model_shape import describe_config
from ..profile import HeadProfile
from .collect import Measured
from .intercept import DecoderLayout
from .refine import Search, refine
from .selection import candidates, head_count, quadratic
from .validation import rounded

__all__ = ["METHODS", "select_profile"]

METHODS = ("joint", "gates+error", "gates", "error")
"""`joint`: the best of the candidates, then a search over all heads and windows together. `gates+error`: maps that mix
gates and predicted KL, the best of them by measured cost. `gates`: gates alone, one window. `error`: predicted KL alone,
no gate optimisation, the best by measured cost."""


_SINKS = (16,)
"""Other numbers of sinks that are measured for the final map: the first tokens of a context are worth more than the oldest
of a window on some models, and cost the same."""


def select_profile(
    config: Any,
    layout: DecoderLayout,
    measured: Measured,
    *,
    budget: float,
    method: str = "joint",
    mean_window: int = 256,
    search: Search | None = None,
) -> HeadProfile:
    """Turn measurements into a profile at one budget.

    Args:
        config: the model's config.
        layout: of the model.
        measured: from `measure_heads`.
        budget: fraction of attention heads that stay global.
        method: one of `METHODS`.
        mean_window: tokens per local head on average.
        search: measures what maps cost; None takes the first candidate unmeasured.
    """
    windows = measured.scores.windows
    cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]
    index = torch.tensor([l * layout.num_kv_heads + h for l, h in cells])
    text, needle = (rows.flatten(1, 2)[:, index] for rows in (measured.text_rows, measured.needle_rows))
    middle = min(range(len(windows)), key=lambda w: abs(windows[w] - mean_window))
    gates = torch.zeros(len(cells)) if measured.gates is None else measured.gates.flatten()[index]
    count = head_count(budget, len(cells))
    if method == "gates":
        choice = torch.full((len(cells),), middle)
        choice[gates.argsort(descending=True, stable=True)[:count]] = len(windows)
        found = {"gates alone": choice}
    else:
        found = candidates(gates, text, needle, count, windows, mean_window)
        if method == "error":
            found = {name: choice for name, choice in found.items() if name.startswith("no gates")}

    def profile_of(choice: Tensor, sink: int) -> HeadProfile:
        rows = range(layout.num_layers)
        classes = [["global"] * layout.num_kv_heads for _ in rows]
        window = [[0] * layout.num_kv_heads for _ in rows]
        for (l, h), w in zip(cells, choice.tolist(), strict=True):
            if w < len(windows):
                classes[l][h], window[l][h] = "local", windows[w] - sink + measured.scores.sink
        return HeadProfile(layout.num_layers, layout.num_kv_heads, classes, sink, window)  # type: ignore[arg-type]

    best = next(iter(found))
    chosen = found[best]
    note: dict[str, Any] = {}
    sink = measured.scores.sink
    if search is not None and method != "gates" and 0 < count < len(cells):
        names = list(found)
        options = list(found.values())
        costs = list(search.cost(options))
        ranked = sorted(range(len(names)), key=lambda i: costs[i])
        note["measured"] = dict(zip(names, costs, strict=True))
        best = names[ranked[0]]
        chosen = found[best]
        limit = mean_window * (len(cells) - count)
        finalists = {best: chosen}
        if method == "joint":
            trail: list[Tensor] = []
            refined, history = refine(chosen, limit, search, f"{count} global", trail)
            note.update(started_from=best, search=history)
            best, chosen = "joint search", refined
            last = trail[:-1][::-1][: max(0, search.finalists - 2)]  # fewer rounds fit the mode of the search less
            finalists = {best: refined, **finalists, **{f"joint search, {i + 1} back": m for i, m in enumerate(last)}}
        if search.deployed is not None and len(finalists) > 1:
            paid = list(search.deployed(list(finalists.values())))
            note["deployed"] = dict(zip(finalists, paid, strict=True))
            best = min(finalists, key=note["deployed"].__getitem__)
            chosen = finalists[best]
        if method == "joint" and search.then is not None:
            chosen, note["deployed_search"] = refine(chosen, limit, search.then)
        if method == "joint" and search.more_sinks is not None:
            numbers = [sink, *(s for s in _SINKS if sink < s < windows[0])]
            paid = list(search.more_sinks(chosen, numbers))
            note["sinks"] = {str(s): cost for s, cost in zip(numbers, paid, strict=True)}
            sink = min(zip(paid, numbers, strict=True))[1]
    profile = profile_of(chosen, sink)
    parts = {"text": text, "needle": needle}
    predicted = {kind: quadratic([(rows, 1.0)]).predict(chosen) for kind, rows in parts.items() if len(rows)}
    profile.metadata = {
        **describe_config(config),
        "method": method,
        "date": datetime.date.today().isoformat(),
        "budget": {
            "global_fraction": budget, "global_heads": count, "heads": len(cells), "mean_window": mean_window,
        },
        "selection": {"chosen": best, "predicted_kl": rounded(predicted), **rounded(note)},
        "scores": _scores(measured, layout, middle),
    }  # fmt: skip
    return profile


def _scores(measured: Measured, layout: DecoderLayout, middle: int) -> dict[str, list[list[float | None]]]:
    """The matrices kept in the profile, at the window nearest to the mean, four significant digits."""
    means = measured.scores.means()
    matrices = {key: value if value.dim() == 2 else value[..., middle] for key, value in means.items()}
    for kind in ("text", "needle"):
        rows = getattr(measured, f"{kind}_rows")
        if len(rows):  # KL that this head alone would cost, by the quadratic model
            matrices[f"{kind}_predicted_kl"] = 0.5 * rows[..., middle].double().square().mean(0)
    if measured.gates is not None:
        matrices["gate"] = measured.gates
    layers = set(layout.layers)
    return {
        key: [[float(f"{x:.4g}") if l in layers else None for x in row] for l, row in enumerate(matrix.tolist())]
        for key, matrix in matrices.items()
    }
