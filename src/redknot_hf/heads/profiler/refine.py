"""Search over head maps at a fixed number of global heads and a fixed number of window tokens.

Each round expands the objective around the best map so far (`LocalModel`), walks downhill on the prediction by two kinds
of moves that keep the bytes (a global and a local head change places; one head's window grows and others shrink to pay
for it), and measures the maps along the walk together with the most promising single moves. What measured better and
does not overlap is then combined and measured again. Only measured improvements are kept, so the result is never worse
than the start on the prompts of the search; whether that carries over is what the validation is for.

All functions but `search_on` know choices (`[heads]` option indices, the last one global) and callbacks; no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .intercept import DecoderLayout
from .local_model import LocalModel, linearise, option_map
from .many_maps import map_costs
from .moves import single_moves, walk
from .objective import Objective
from .validation import Prompts

__all__ = ["Search", "refine", "search_on"]


def _combined(choice: Tensor, steps: Sequence[Tensor]) -> list[Tensor]:
    """Choices with the first 2, 3, ... of the steps that touch different heads."""
    here, found, touched = choice, [], torch.zeros(len(choice), dtype=torch.bool)
    for step in steps:
        changed = step != choice
        if bool((changed & touched).any()):
            continue
        here = torch.where(changed, step, here)
        if bool(touched.any()):
            found.append(here)
        touched |= changed
    return found


_HALF = 24
"""Prompts from which half of them suffices for the predictions of one round."""

State = tuple[Tensor, list[dict[str, Any]]]


@dataclass(frozen=True)
class Search:
    """What a search may ask and how long it may take.

    Attributes:
        windows: sizes in tokens, increasing; the options of a head, before the last one, global.
        expand: predictions around a choice; the second argument is the round.
        cost: measures choices with eviction after the prefill.
        deployed: measures choices in the mode of the deployment; None if that is what `cost` does.
        more_sinks: measures a choice with the given numbers of sinks, every window paying for them; None to keep them.
        rounds: at most.
        lengths: of the walk that are measured: the prediction is good near the start and cheap to overrun.
        singles: moves to measure per round beside the walk.
        patience: rounds in a row that may bring nothing.
        step: called after every round.
        load, save: of an interrupted search by its key: the best choice and the history so far.
    """

    windows: Sequence[int]
    expand: Callable[[Tensor, int], LocalModel]
    cost: Callable[[Sequence[Tensor]], Sequence[float]]
    deployed: Callable[[Sequence[Tensor]], Sequence[float]] | None = None
    rounds: int = 8
    lengths: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 16, 24)
    singles: int = 24
    patience: int = 1
    step: Callable[[], Any] = lambda: None
    more_sinks: Callable[[Tensor, Sequence[int]], Sequence[float]] | None = None
    load: Callable[[str], State | None] = lambda key: None
    save: Callable[[str, State], Any] = lambda key, state: None


def search_on(
    model: Any,
    layout: DecoderLayout,
    prompts: Sequence[Prompts],
    *,
    windows: Sequence[int],
    sink: int,
    objective: Objective,
    sketches: int,
    seed: int,
    mode: str,
    rounds: int,
    lengths: Sequence[int],
    singles: int,
    step: Callable[[], Any] = lambda: None,
) -> Search:
    """A search that runs a model.

    Args:
        model: the decoder, inside `collect.frozen`.
        layout: of the model; its heads are the entries of a choice, layer by layer.
        prompts: batches, each of one kind, with full-attention contexts.
        windows, sink: tokens.
        objective: what is minimised.
        sketches: random backward passes per batch and round.
        seed: of the sketches.
        mode: "full" or "windowed", of the deployment.
        rounds, lengths, singles, step: as in `Search`.
    """
    shape = (layout.num_layers, layout.num_kv_heads)
    cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]

    kinds = [[p for p in prompts if (p.batch.kinds[0] == "text") == text] for text in (False, True)]
    halves = [[p for kind in kinds for p in kind[part::2]] for part in (0, 1)]
    split = all(len(kind) > 1 for kind in kinds) and min(sum(len(p.batch) for p in half) for half in halves) >= _HALF

    def expand(choice: Tensor, number: int) -> LocalModel:
        # Backward passes cost more than forward ones: where there are many prompts, rounds take half of them in turn.
        some = halves[number % 2] if split else prompts
        return linearise(
            model, some, choice, shape, cells, objective=objective, windows=windows, sink=sink, sketches=sketches,
            seed=seed * 1009 + number,
        )  # fmt: skip

    def cost(choices: Sequence[Tensor], used: str = "full") -> list[float]:
        maps = [option_map(choice, shape, cells, windows, sink) for choice in choices]
        return objective.total(map_costs(model, prompts, maps, used)).tolist()

    def more_sinks(choice: Tensor, sinks: Sequence[int]) -> list[float]:
        maps = [option_map(choice, shape, cells, [w - s + sink for w in windows], s) for s in sinks]
        return objective.total(map_costs(model, prompts, maps)).tolist()

    deployed = None if mode == "full" else lambda choices: cost(choices, mode)
    return Search(windows, expand, cost, deployed, rounds, lengths, singles, 2 if split else 1, step, more_sinks)


def refine(choice: Tensor, limit: int, search: Search, key: str = "search") -> State:
    """Improve a map until no measured move helps or the rounds are spent.

    Args:
        choice: int64 `[heads]` option indices; `len(search.windows)` is global.
        limit: window tokens in all; kept.
        search: callbacks and limits.
        key: under which the search is saved after every round and continued.

    Returns:
        the best choice, and per round what was measured: `{"round", "measured", "cost"}`.
    """
    windows, cost, singles = search.windows, search.cost, search.singles
    state = search.load(key)
    if state is None:
        state = choice, [{"round": 0, "measured": 1, "cost": float(cost([choice])[0])}]
    best, history = state
    lowest = history[-1]["cost"]
    for number in range(len(history), search.rounds + 1):
        if number > search.patience and lowest >= history[-1 - search.patience]["cost"]:
            break
        local = search.expand(best, number)
        path = walk(local, best, windows, limit, search.lengths[-1])
        trials = [path[n - 1] for n in search.lengths if n <= len(path)]
        alone = single_moves(local, best, windows, limit, singles) if singles else []
        trials += [trial for trial in alone if not any(torch.equal(trial, other) for other in trials)]
        costs = list(cost(trials)) if trials else []
        start = lowest
        measured = len(trials)
        ranked = sorted(range(len(trials)), key=lambda i: costs[i])
        helpful = [trials[i] for i in ranked if costs[i] < start and any(trials[i] is trial for trial in alone)]
        together = _combined(best, helpful)
        if together:
            more = list(cost(together))
            measured += len(together)
            trials, costs = trials + together, costs + more
        if trials:
            i = min(range(len(trials)), key=lambda i: costs[i])
            if costs[i] < start:
                best, lowest = trials[i], float(costs[i])
        history.append({"round": number, "measured": measured, "cost": lowest})
        search.save(key, (best, history))
        search.step()
    return best, history
