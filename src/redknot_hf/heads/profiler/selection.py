"""From scores to head maps: gates say which heads retrieve, the quadratic model fills and sizes the rest.

Retrieval heads (gates at or above one half) are global first, strongest first. What is left of the budget goes, head by
head, to whoever lowers the predicted joint KL most. Windows are then chosen per head at the byte budget of one common
window: all start at the smallest, and tokens go where they lower the predicted KL most, until the mean is spent.
No single mixture is best on every model and budget, so `candidates` makes a few and leaves the choice to whoever can
run the model. Everything here works on small matrices; no model is run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .local_model import LocalModel
from .moves import exchanges, one_thread

__all__ = ["candidates", "choose_windows", "head_count", "quadratic", "rank_heads"]


def head_count(budget: float, heads: int) -> int:
    """Global heads of a budget: the fraction of all attention heads, rounded to the nearest head."""
    return min(heads, max(0, round(budget * heads)))


def quadratic(parts: Sequence[tuple[Tensor, float]], shrinkage: float | None = None) -> LocalModel:
    """Predicted cost around full attention, where it has no slope, of a weighted sum of KLs.

    Args:
        parts: `[rows, heads, windows]` from `curvature` and its weight; every part counts as its mean over rows.
        shrinkage: of the interactions; None takes the default of `LocalModel.from_rows`.
    """
    scaled = torch.cat([rows * (weight / max(len(rows), 1)) ** 0.5 for rows, weight in parts])
    heads, windows = scaled.shape[1:]
    nothing = torch.zeros(len(scaled), heads, 1)  # global: no change
    return LocalModel.from_rows(torch.zeros(heads, windows + 1), torch.cat([scaled, nothing], dim=2), shrinkage)


@one_thread
def rank_heads(gates: Tensor, local: LocalModel, window: int, threshold: float = 0.5) -> list[int]:
    """All heads in the order in which they become global.

    Args:
        gates: `[heads]` in [0, 1].
        local: predicted cost.
        window: index of the window that local heads have meanwhile.
        threshold: gates from here on are retrieval heads and come first, by their gate.
    """
    heads, last = len(gates), local.linear.shape[1] - 1
    order = [int(h) for h in gates.argsort(descending=True) if gates[h] >= threshold]
    choice = torch.full((heads,), window)
    choice[order] = last
    total = local.total(choice)
    while len(order) < heads:
        price = local.field(choice, total)
        gain = price[:, window] - price[:, last]
        gain[choice == last] = -torch.inf
        best = int(gain.argmax())
        order.append(best)
        total = local.moved(total, best, window, last)
        choice[best] = last
    return order


@one_thread
def choose_windows(
    chosen: set[int], local: LocalModel, windows: Sequence[int], mean_window: int, sweeps: int = 3
) -> Tensor:
    """A window for every local head, no more tokens in all than `mean_window` for each would take.

    Args:
        chosen: global heads.
        local: predicted cost.
        windows: sizes in tokens, increasing.
        mean_window: tokens per local head on average.
        sweeps: rounds of exchanges (one head grows, others shrink) after the greedy pass, per local head.

    Returns:
        int64 `[heads]`: option index; `len(windows)` for global heads.
    """
    heads, last = len(local.linear), len(windows)
    size = torch.tensor([*windows, 0], dtype=torch.float64)
    choice = torch.full((heads,), last)
    choice[[h for h in range(heads) if h not in chosen]] = 0
    limit = mean_window * (heads - len(chosen))
    left = float(limit - size[choice].sum())
    options = torch.arange(last + 1)[None]
    total = local.total(choice)
    while True:
        price = local.field(choice, total)
        gain = price.gather(1, choice[:, None]) - price
        # Jumps of several sizes count as one: a head may gain nothing before its window reaches a boundary.
        more = size[None] - size[choice][:, None]
        allowed = (choice[:, None] < last) & (options > choice[:, None]) & (options < last) & (more <= left + 1e-9)
        rate = torch.where(allowed, gain / more.clamp_min(1), -torch.inf)
        head, target = divmod(int(rate.argmax()), last + 1)
        if not float(rate[head, target]) > 0:
            break
        left -= float(more[head, target])
        total = local.moved(total, head, int(choice[head]), target)
        choice[head] = target
    for _ in range(sweeps * (heads - len(chosen))):
        better = exchanges(local, choice, windows, limit, 6)[:1]
        if not better or better[0][0] >= -1e-9 * abs(local.predict(choice)):
            break
        choice = better[0][1]
    return choice


def candidates(
    gates: Tensor, text_rows: Tensor, needle_rows: Tensor, count: int, windows: Sequence[int], mean_window: int
) -> dict[str, Tensor]:
    """Head maps of equal size that weigh gates, text and needles differently.

    Args:
        gates: `[heads]` in [0, 1].
        text_rows, needle_rows: `[rows, heads, windows]` of the quadratic model.
        count: global heads.
        windows: sizes in tokens, increasing.
        mean_window: tokens per local head on average.

    Returns:
        By name, `[heads]` option indices, `len(windows)` for global heads; the first is the default. All keep the same
        number of tokens: `count` global heads, and windows of `mean_window` on average.
    """
    middle = min(range(len(windows)), key=lambda w: abs(windows[w] - mean_window))
    balanced = quadratic([(text_rows, 1.0), (needle_rows, 1.0)])
    retrieval = quadratic([(text_rows, 1.0), (needle_rows, 3.0)])
    # From the threshold on a gate counts: retrieval heads only; every gate that is open at all; none.
    mixtures = (
        ("retrieval gates", 0.5, balanced),
        ("open gates", 0.01, balanced),
        ("no gates", 2.0, balanced),
        ("no gates, needles x3", 2.0, retrieval),
    )
    found: dict[str, Tensor] = {}

    def add(name: str, choice: Tensor) -> None:
        if not any(torch.equal(choice, other) for other in found.values()):
            found[name] = choice

    for name, threshold, model in mixtures:
        chosen = set(rank_heads(gates, model, middle, threshold)[:count])
        add(name, choose_windows(chosen, model, windows, mean_window))
        if model is balanced:
            add(f"{name}, windows for needles", choose_windows(chosen, retrieval, windows, mean_window))
        if threshold < 1 and windows[middle] <= mean_window:
            one = torch.full((len(gates),), middle)
            one[list(chosen)] = len(windows)
            add(f"{name}, one window", one)
    return found
