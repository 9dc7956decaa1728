"""The quadratic model against measured KL, and the searches on it against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from planted import HEADS, LAYERS

from redknot_hf.heads.profiler.collect import frozen
from redknot_hf.heads.profiler.context import run_suffix
from redknot_hf.heads.profiler.curvature import score_batch
from redknot_hf.heads.profiler.gates import gated_handler
from redknot_hf.heads.profiler.scores import HeadScores
from redknot_hf.heads.profiler.selection import (
    QuadraticModel,
    candidates,
    choose_windows,
    head_count,
    rank_heads,
)
from redknot_hf.heads.profiler.tasks import Sample, collate
from redknot_hf.heads.profiler.validation import full_reference, measure, summarise, wilson
from redknot_hf.heads.profiler.visibility import HeadMap, visible_attention, windowed_handler


def text_batch(seed: int = 0):
    ids = torch.randint(0, 256, (2, 150), generator=torch.Generator().manual_seed(seed)).tolist()
    return collate([Sample("text", row[:120], row[120:], 1) for row in ids])


def test_quadratic_model_predicts_small_measured_kl(planted_model):
    """Second order is exact in the limit, so the heads' effect is made small; then 10 % is sampling error."""
    with torch.no_grad():
        for layer in planted_model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
    windows, sink = (8, 40), 2
    with frozen(planted_model):
        prompts = full_reference(planted_model, text_batch())
        rows = score_batch(
            planted_model, prompts.cache, prompts.batch, HeadScores(LAYERS, HEADS, windows, sink),
            sketches=600, seed=0, windows=windows, sink=sink,
        ).flatten(1, 2)  # fmt: skip
        for keep, window in (((), 0), (((0, 1),), 0), (((1, 0), (1, 2)), 1)):
            visible = HeadMap.uniform(LAYERS, HEADS, sink, windows[window], keep)
            real = summarise(measure(planted_model, prompts, visible, "full"))["text"]["kl"]
            choice = torch.full((LAYERS * HEADS,), window)
            choice[[l * HEADS + h for l, h in keep]] = -1
            assert QuadraticModel(rows.double() / len(rows) ** 0.5, 0.0).predict(choice) == pytest.approx(real, rel=0.1)


def test_open_gates_are_full_attention_and_closed_gates_are_the_window(planted_model):
    with frozen(planted_model), torch.no_grad():
        prompts = full_reference(planted_model, text_batch())

        def logits(handler):
            return run_suffix(planted_model, prompts.cache, prompts.batch.suffix, handler)

        ones, zeros = torch.ones(LAYERS, HEADS), torch.zeros(LAYERS, HEADS)
        assert torch.allclose(logits(gated_handler(ones, 2, 16)), logits(visible_attention), atol=1e-4)
        local = logits(windowed_handler(HeadMap.uniform(LAYERS, HEADS, 2, 16)))
        assert torch.allclose(logits(gated_handler(zeros, 2, 16)), local, atol=1e-4)
        assert not torch.allclose(local, logits(visible_attention), atol=1e-2)


def random_model(heads: int, windows: int, seed: int, shrinkage: float = 0.5) -> QuadraticModel:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(30, heads, windows, generator=generator).double()
    # Larger windows hurt less.
    return QuadraticModel(rows * torch.linspace(1, 0.2, windows).double(), shrinkage)


@pytest.mark.parametrize("seed", range(3))
def test_gains_are_differences_of_predictions(seed):
    model = random_model(6, 3, seed)
    choice = torch.tensor([-1, 0, 1, 2, -1, 1])
    others = torch.tensor([0, 1, -1, 2, 2, 0])
    gains = model.gains(choice, others)
    for head in range(6):
        changed = choice.clone()
        changed[head] = others[head]
        assert float(gains[head]) == pytest.approx(model.predict(choice) - model.predict(changed), abs=1e-9)
    assert float(gains[3]) == pytest.approx(0, abs=1e-12)  # no change, no gain


@pytest.mark.parametrize("seed", range(4))
def test_windows_keep_the_budget_and_come_close_to_the_best(seed):
    model, windows = random_model(6, 3, seed, shrinkage=0.9), (8, 16, 32)
    choice = choose_windows({0, 3}, model, windows, 16)
    local = [1, 2, 4, 5]
    spent = sum(windows[choice[h]] for h in local)
    assert spent <= 16 * 4 and choice[0] == choice[3] == -1
    costs = []
    for sizes in itertools.product(range(3), repeat=4):
        if sum(windows[s] for s in sizes) <= 64:
            other = torch.full((6,), -1)
            other[local] = torch.tensor(sizes)
            costs.append(model.predict(other))
    assert model.predict(choice) <= min(costs) + 0.02 * (max(costs) - min(costs))


def test_gates_come_first_and_the_rest_is_filled_by_predicted_kl():
    model = random_model(5, 2, 0, shrinkage=1.0)
    order = rank_heads(torch.tensor([0.0, 0.6, 0.0, 0.9, 0.1]), model, window=0)
    assert order[:2] == [3, 1] and sorted(order) == [0, 1, 2, 3, 4]
    alone = model.rows[..., 0].square().sum(0)  # independent heads: the largest square gains most
    assert order[2:] == sorted([0, 2, 4], key=lambda h: -float(alone[h]))


@pytest.mark.parametrize("budget,heads,count", [(0.15, 90, 14), (0.25, 90, 22), (0, 90, 0), (1, 90, 90), (0.5, 3, 2)])
def test_head_count(budget, heads, count):
    assert head_count(budget, heads) == count


def test_candidates_keep_count_and_bytes():
    rows = random_model(12, 3, 1).rows
    windows, gates = (8, 16, 32), torch.linspace(0, 1, 12)
    found = candidates(gates, rows, rows.flip(0), 4, windows, 16)
    assert len(found) >= 3 and len({tuple(choice.tolist()) for choice in found.values()}) == len(found)
    for choice in found.values():
        assert int((choice < 0).sum()) == 4
        assert sum(windows[w] for w in choice.tolist() if w >= 0) <= 16 * 8


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)  # tabulated value for 8 of 10
    assert wilson(0, 0) == (0.0, 1.0)
