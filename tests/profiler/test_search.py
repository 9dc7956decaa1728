"""The search over head maps: its costs against one map at a time, its predictions against finite differences and brute
force, and that it ends where it should."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from planted import HEADS, LAYERS, PLANTED

from redknot_hf.heads.profiler import many_maps
from redknot_hf.heads.profiler.collect import build_prompts, frozen
from redknot_hf.heads.profiler.intercept import decoder_layout
from redknot_hf.heads.profiler.local_model import LocalModel, linearise, option_map
from redknot_hf.heads.profiler.many_maps import map_costs, map_rows
from redknot_hf.heads.profiler.moves import single_moves, walk
from redknot_hf.heads.profiler.objective import Objective, prompt_terms
from redknot_hf.heads.profiler.refine import Search, refine, search_on
from redknot_hf.heads.profiler.tasks import collate
from redknot_hf.heads.profiler.validation import full_reference, measure

WINDOWS, SINK = (16, 32, 64), 4
SHAPE = (LAYERS, HEADS)
CELLS = [(l, h) for l in range(LAYERS) for h in range(HEADS)]


@pytest.fixture
def prompts(planted_model, byte_tokenizer):
    needles, texts = build_prompts(byte_tokenizer, None, "selection", 3, 2, 640, 48, 0)
    with frozen(planted_model):
        yield [full_reference(planted_model, collate(group)) for group in (needles, texts)]


def test_the_search_goes_on_in_the_mode_of_the_deployment(planted_model, prompts):
    layout = decoder_layout(planted_model)
    arguments = dict(
        windows=WINDOWS, sink=SINK, objective=Objective(), sketches=1, seed=0, rounds=1, lengths=(1, 2), singles=4,
        deployed_rounds=1,
    )  # fmt: skip
    assert search_on(planted_model, layout, prompts, mode="full", **arguments).then is None
    search = search_on(planted_model, layout, prompts, mode="windowed", **arguments)
    start = torch.tensor([1, 1, 1, 3, 1, 1])  # the planted head is local
    deployed = search.deployed([start])
    maps = [option_map(start, SHAPE, CELLS, WINDOWS, SINK)]
    terms = map_costs(planted_model, prompts, maps, "windowed")
    assert deployed == pytest.approx(Objective().total(terms).tolist())
    best, history = refine(start, 32 * 5, search.then)
    assert history[0]["cost"] == pytest.approx(deployed[0])
    assert history[-1]["cost"] < history[0]["cost"]
    assert history[-1]["cost"] == pytest.approx(search.deployed([best])[0])


@pytest.mark.parametrize(("mode", "masked"), [("full", False), ("full", True), ("windowed", False)])
def test_many_maps_at_once_equal_one_at_a_time(planted_model, prompts, mode, masked, monkeypatch):
    monkeypatch.setattr(many_maps, "_one_call", lambda call: masked)  # what a GPU does
    choices = [[3, 1, 1, 1, 1, 1], [1, 3, 1, 1, 1, 1], [0, 3, 2, 1, 3, 0], [3] * 6]
    maps = [option_map(torch.tensor(choice), SHAPE, CELLS, WINDOWS, SINK) for choice in choices]
    together = map_costs(planted_model, prompts, maps, mode, rows=1000)  # two or three maps per pass
    rows_together = map_rows(planted_model, prompts, maps, mode, rows=1000)
    for visible, (text, needle, misses), many in zip(maps, together.tolist(), rows_together, strict=True):
        rows = [row for prompt in prompts for row in measure(planted_model, prompt, visible, mode)]
        assert [(r.kind, r.top1, r.hit, r.full_hit) for r in many] == [
            (r.kind, r.top1, r.hit, r.full_hit) for r in rows
        ]
        assert [r.delta_nll for r in many] == pytest.approx([r.delta_nll for r in rows], abs=1e-5)
        kl = {kind: [r.kl for r in rows if (r.kind == "text") == kind] for kind in (True, False)}
        assert text == pytest.approx(sum(kl[True]) / 2, abs=1e-6)
        assert needle == pytest.approx(sum(kl[False]) / 3, abs=1e-6)
        assert 0 <= misses <= 1
    assert together[0, 1] > 2 * together[1, 1] > 0  # without the planted head the answers suffer
    assert together[3, :2].abs().max() < 1e-6


def test_soft_miss_is_the_smallest_margin_and_becomes_the_share_of_misses(planted_model, prompts):
    batch, reference = prompts[0].batch, prompts[0].log_probs
    owner = batch.target.nonzero()[:, 0].tolist()
    truth = batch.next_ids[batch.target].tolist()
    margins = [math.inf] * len(batch)
    for row, who, token in zip(reference, owner, truth, strict=True):
        others = torch.cat([row[:token], row[token + 1 :]])
        margins[who] = min(margins[who], float(row[token] - others.max()))
    kl, miss = prompt_terms(reference, reference, batch, temperature=0.5)
    assert kl.abs().max() < 1e-6
    assert miss.tolist() == pytest.approx([1 / (1 + math.exp(margin / 0.5)) for margin in margins], abs=1e-5)
    _, hard = prompt_terms(reference, reference, batch, temperature=1e-4)
    full = measure(planted_model, prompts[0], option_map(torch.full((6,), 3), SHAPE, CELLS, WINDOWS, SINK), "full")
    assert hard.round().tolist() == [float(not row.full_hit) for row in full]


def test_slopes_equal_finite_differences(planted_model, prompts):
    """Changes are made small, so that the slope is all of a change; the planted head's is checked at its own size."""
    with torch.no_grad():
        for layer in planted_model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
    objective = Objective(1.0, 0.5, 0.25)
    fresh = [full_reference(planted_model, prompt.batch) for prompt in prompts]
    choice = torch.tensor([0, 0, 0, 3, 1, 2])
    local = linearise(
        planted_model, fresh, choice, SHAPE, CELLS, objective=objective, windows=WINDOWS, sink=SINK, sketches=64, seed=0
    )  # fmt: skip

    def cost(one):
        return float(objective.total(map_costs(planted_model, fresh, [option_map(one, SHAPE, CELLS, WINDOWS, SINK)])))

    start = cost(choice)
    scale = float(local.linear.abs().max())
    for head, option in itertools.product(range(6), range(4)):
        other = choice.clone()
        other[head] = option
        assert local.predict(other) == pytest.approx(cost(other) - start, abs=0.05 * scale)
    assert scale > 1e-5 and bool((local.linear[torch.arange(6), choice] == 0).all())


def random_model(heads: int, seed: int) -> LocalModel:
    """Predictions around "all smallest windows", larger options better on the whole."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, heads, 4, generator=generator) * torch.tensor([1.0, 0.7, 0.4, 0.0]) / 40**0.5
    return LocalModel.from_rows(torch.zeros(heads, 4), rows, shrinkage=0.3)


@pytest.mark.parametrize("seed", range(3))
def test_gains_are_differences_of_predictions(seed):
    local, choice = random_model(6, seed), torch.tensor([3, 0, 1, 2, 3, 1])
    price = local.field(choice)
    for head, option in itertools.product(range(6), range(4)):
        other = choice.clone()
        other[head] = option
        gain = float(price[head, option] - price[head, choice[head]])
        assert gain == pytest.approx(local.predict(other) - local.predict(choice), abs=1e-9)
    one, two, gains = local.swap_gains(choice)
    assert one.tolist() == [0, 4] and two.tolist() == [1, 2, 3, 5]
    for (i, g), (j, l) in itertools.product(enumerate(one.tolist()), enumerate(two.tolist())):
        other = choice.clone()
        other[g], other[l] = choice[l], choice[g]
        assert float(gains[i, j]) == pytest.approx(local.predict(other) - local.predict(choice), abs=1e-9)


def tokens(choice) -> int:
    return sum(WINDOWS[k] for k in choice.tolist() if k < 3)


@pytest.mark.parametrize("seed", range(4))
def test_moves_keep_the_number_of_global_heads_and_the_tokens(seed):
    local, choice = random_model(9, seed), torch.tensor([3, 3, 3, 1, 1, 1, 1, 1, 1])
    limit = 32 * 6
    path = walk(local, choice, WINDOWS, limit, 12)
    values = [local.predict(step) for step in [choice, *path]]
    assert path and values == sorted(values, reverse=True)
    for step in [*path, *single_moves(local, choice, WINDOWS, limit, 8)]:
        assert int((step == 3).sum()) == 3 and tokens(step) <= limit


@pytest.mark.parametrize("seed", range(4))
def test_the_search_comes_close_to_the_best_map_and_is_never_worse_than_its_start(seed):
    local, limit = random_model(6, seed), 32 * 4
    start = torch.tensor([3, 3, 1, 1, 1, 1])
    every = [
        torch.tensor(choice)
        for choice in itertools.product(range(4), repeat=6)
        if choice.count(3) == 2 and tokens(torch.tensor(choice)) <= limit
    ]
    costs = sorted(local.predict(choice) for choice in every)
    search = Search(WINDOWS, lambda *_: local, lambda cs: [local.predict(c) for c in cs], rounds=8, singles=8)
    best, history = refine(start, limit, search)
    found = local.predict(best)
    assert found <= costs[len(costs) // 50]  # among the best two per cent
    assert found <= local.predict(start) and history[-1]["cost"] == pytest.approx(found)
    # A prediction that is wrong cannot do harm: only measured improvements are kept.
    misled = Search(WINDOWS, lambda *_: random_model(6, seed + 100), search.cost, rounds=3, singles=2)
    assert local.predict(refine(start, limit, misled)[0]) <= local.predict(start)


def test_the_search_finds_the_planted_head_from_a_map_without_it(planted_model, prompts):
    search = search_on(
        planted_model, decoder_layout(planted_model), prompts, windows=WINDOWS, sink=SINK, objective=Objective(),
        sketches=4, seed=0, mode="full", rounds=3, lengths=(1, 2, 4), singles=2,
    )  # fmt: skip
    choice = torch.tensor([1, 1, 1, 1, 1, 3])
    best, history = refine(choice, 32 * 5, search)
    assert CELLS[int((best == 3).nonzero())] == PLANTED
    assert history[-1]["cost"] < history[0]["cost"]
