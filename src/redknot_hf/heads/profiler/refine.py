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

from .context import prefill
from .intercept import DecoderLayout
from .local_model import LocalModel, linearise, option_map
from .many_maps import map_costs
from .moves import single_moves, walk
from .objective import Objective
from .validation import Prompts
from .visibility import windowed_handler

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
        finalists: maps that are measured there: the start and the best of the last rounds.
        then: a search in the mode of the deployment that goes on from the best of them; None where that takes too long.
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
    finalists: int = 2
    then: Search | None = None
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
    finalists: int = 2,
    deployed_rounds: int = 0,
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
        rounds, lengths, singles, finalists, step: as in `Search`.
        deployed_rounds: of the search that goes on in `mode`, if that is not "full": every map then takes a prefill of
            every prompt, so it sees some of them.
    """
    shape = (layout.num_layers, layout.num_kv_heads)
    cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]

    kinds = [[p for p in prompts if (p.batch.kinds[0] == "text") == text] for text in (False, True)]
    halves = [[p for kind in kinds for p in kind[part::2]] for part in (0, 1)]
    split = all(len(kind) > 1 for kind in kinds) and min(sum(len(p.batch) for p in half) for half in halves) >= _HALF

    used = [*kinds[0][::2], *kinds[1][::3]] if split and mode != "full" else prompts

    def local(some: Sequence[Prompts], choice: Tensor, number: int) -> LocalModel:
        return linearise(
            model, some, choice, shape, cells, objective=objective, windows=windows, sink=sink, sketches=sketches,
            seed=seed * 1009 + number,
        )  # fmt: skip

    def expand(choice: Tensor, number: int) -> LocalModel:
        # Backward passes cost more than forward ones: where there are many prompts, rounds take half of them in turn.
        return local(halves[number % 2] if split else prompts, choice, number)

    def expand_deployed(choice: Tensor, number: int) -> LocalModel:
        # The contexts as the map itself would leave them; what a move does to them is not predicted, only measured.
        handler = windowed_handler(option_map(choice, shape, cells, windows, sink))
        some = [Prompts(p.batch, prefill(model, p.batch.context, handler), p.log_probs) for p in used]
        return local(some, choice, number)

    def cost(choices: Sequence[Tensor]) -> list[float]:
        maps = [option_map(choice, shape, cells, windows, sink) for choice in choices]
        return objective.total(map_costs(model, prompts, maps)).tolist()

    def deployed(choices: Sequence[Tensor]) -> list[float]:
        maps = [option_map(choice, shape, cells, windows, sink) for choice in choices]
        return objective.total(map_costs(model, used, maps, mode)).tolist()

    going_on = mode != "full" and deployed_rounds > 0

    def more_sinks(choice: Tensor, sinks: Sequence[int]) -> list[float]:
        maps = [option_map(choice, shape, cells, [w - s + sink for w in windows], s) for s in sinks]
        found = map_costs(model, used, maps, mode) if going_on else map_costs(model, prompts, maps)
        return objective.total(found).tolist()

    then = Search(
        windows, expand_deployed, deployed, rounds=deployed_rounds, lengths=(1, 2, 4, 8), singles=6
    )  # fmt: skip
    return Search(
        windows, expand, cost, None if mode == "full" else deployed, finalists, then if going_on else None, rounds,
        lengths, singles, 2 if split else 1, step, more_sinks,
    )  # fmt: skip


def refine(choice: Tensor, limit: int, search: Search, key: str = "search", trail: list[Tensor] | None = None) -> State:
    """Improve a map until no measured move helps or the rounds are spent.

    Args:
        choice: int64 `[heads]` option indices; `len(search.windows)` is global.
        limit: window tokens in all; kept.
        search: callbacks and limits.
        key: under which the search is saved after every round and continued.
        trail: gets the best choice of every round that brought one.

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
                if trail is not None:
                    trail.append(best)
        history.append({"round": number, "measured": measured, "cost": lowest})
        search.save(key, (best, history))
        search.step()
    return best, history
