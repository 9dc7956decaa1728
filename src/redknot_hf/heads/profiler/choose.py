"""From measurements to a profile: candidate maps, the best of them by what it costs, and the scores a profile keeps."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model_shape import describe_config
from ..profile import HeadProfile
from .collect import Measured
from .intercept import DecoderLayout
from .selection import QuadraticModel, candidates, head_count, swaps
from .validation import Prompts, measure, rounded, summarise
from .visibility import HeadMap

__all__ = ["METHODS", "judge_on", "select_profile"]

METHODS = ("gates+error", "gates", "error")
"""`gates+error`: maps that mix gates and predicted KL, the best of them by measured KL. `gates`: gates alone, one
window.
`error`: predicted KL alone, no gate optimisation."""


def select_profile(
    config: Any,
    layout: DecoderLayout,
    measured: Measured,
    *,
    budget: float,
    method: str = "gates+error",
    mean_window: int = 256,
    judge: Callable[[HeadMap], dict[str, float]] | None = None,
    exchanges: int = 0,
) -> HeadProfile:
    """Turn measurements into a profile at one budget.

    Args:
        config: the model's config.
        layout: of the model.
        measured: from `measure_heads`.
        budget: fraction of attention heads that stay global.
        method: one of `METHODS`.
        mean_window: tokens per local head on average.
        judge: measures what a map costs, as named numbers whose sum counts; None takes the first candidate unmeasured.
        exchanges: swaps of a global and a local head to try on the best candidate; each is kept if it costs less.
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
        choice[gates.argsort(descending=True, stable=True)[:count]] = -1
        found = {"gates alone": choice}
    else:
        found = candidates(gates, text, needle, count, windows, mean_window)
        if method == "error":
            found = {name: choice for name, choice in found.items() if name.startswith("no gates")}

    def profile_of(choice: Tensor) -> HeadProfile:
        rows = range(layout.num_layers)
        classes = [["global"] * layout.num_kv_heads for _ in rows]
        window = [[0] * layout.num_kv_heads for _ in rows]
        for (l, h), w in zip(cells, choice.tolist(), strict=True):
            if w >= 0:
                classes[l][h], window[l][h] = "local", windows[w]
        return HeadProfile(layout.num_layers, layout.num_kv_heads, classes, measured.scores.sink, window)  # type: ignore[arg-type]

    best = next(iter(found))
    chosen = found[best]
    costs: dict[str, dict[str, float]] = {}
    if judge is not None and method != "gates" and 0 < count < len(cells):
        costs = {name: judge(HeadMap.from_profile(profile_of(choice))) for name, choice in found.items()}
        best = min(costs, key=lambda name: sum(costs[name].values()))
        chosen = found[best]
        model = QuadraticModel.join([(text, 1.0), (needle, 1.0)])
        tried: set[tuple[int, int]] = set()
        lowest = costs[best]
        for _ in range(exchanges):
            proposal = swaps(chosen, model, tried)
            if proposal is None:
                break
            tried.add(proposal[1])
            cost = judge(HeadMap.from_profile(profile_of(proposal[0])))
            if sum(cost.values()) < sum(lowest.values()):
                chosen, lowest = proposal[0], cost
        if chosen is not found[best]:
            costs["after exchanges"] = lowest
    profile = profile_of(chosen)
    predicted = {
        kind: QuadraticModel.join([(rows, 1.0)]).predict(chosen) for kind, rows in (("text", text), ("needle",
        needle)) if len(rows)
    }  # fmt: skip
    profile.metadata = {
        **describe_config(config),
        "method": method,
        "date": datetime.date.today().isoformat(),
        "budget": {
            "global_fraction": budget, "global_heads": count, "heads": len(cells), "mean_window": mean_window,
        },
        "selection": {"chosen": best, "predicted_kl": rounded(predicted), "measured": rounded(costs)},
        "scores": _scores(measured, layout, middle),
    }  # fmt: skip
    return profile


def judge_on(
    model: Any, prompts: Sequence[Prompts], modes: Sequence[str] = ("full",)
) -> Callable[[HeadMap], dict[str, float]]:
    """What a map costs on prompts, as numbers to be added: KL on text, KL at needle answers, and a tenth of the share
    of answer tokens that change (KL alone does not see how close an answer is to flipping); means over the modes."""

    def judge(visible: HeadMap) -> dict[str, float]:
        total: dict[str, float] = {}
        for mode in modes:
            summary = summarise([row for prompt in prompts for row in measure(model, prompt, visible, mode)], draws=0)
            costs = {f"{kind}_kl": summary[kind]["kl"] for kind in ("text", "needle") if kind in summary}
            if "needle" in summary:
                costs["answers_changed"] = 0.1 * (1 - summary["needle"]["top1"])
            total = {key: total.get(key, 0.0) + value / len(modes) for key, value in costs.items()}
        return total

    return judge


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
