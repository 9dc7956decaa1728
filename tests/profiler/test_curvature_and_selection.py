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
from redknot_hf.heads.profiler.local_model import LocalModel
from redknot_hf.heads.profiler.scores import HeadScores
from redknot_hf.heads.profiler.selection import candidates, choose_windows, head_count, quadratic, rank_heads
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
            choice[[l * HEADS + h for l, h in keep]] = len(windows)
            assert quadratic([(rows, 1.0)], shrinkage=0.0).predict(choice) == pytest.approx(real, rel=0.1)


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


def random_rows(heads: int, windows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Larger windows hurt less.
    return torch.randn(30, heads, windows, generator=generator) * torch.linspace(1, 0.2, windows)


def test_quadratic_is_half_the_mean_square_of_the_sum_shrunk_towards_independence():
    rows = random_rows(4, 2, 0)
    choice = torch.tensor([0, 2, 1, 0])  # the second head is global
    columns = torch.stack([rows[:, 0, 0], rows[:, 2, 1], rows[:, 3, 0]], 1).double()
    joint, alone = columns.sum(1).square().mean() / 2, columns.square().sum(1).mean() / 2
    for shrinkage in (0.0, 0.4, 1.0):
        expected = (1 - shrinkage) * joint + shrinkage * alone
        assert quadratic([(rows, 1.0)], shrinkage).predict(choice) == pytest.approx(float(expected), rel=1e-5)
    both = quadratic([(rows, 1.0), (rows[:7], 3.0)], 1.0).predict(choice)
    few = columns[:7].square().sum(1).mean() / 2
    assert both == pytest.approx(float(alone + 3 * few), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_windows_keep_the_budget_and_come_close_to_the_best(seed):
    local, windows = quadratic([(random_rows(6, 3, seed), 1.0)], 0.9), (8, 16, 32)
    choice = choose_windows({0, 3}, local, windows, 16)
    others = [1, 2, 4, 5]
    spent = sum(windows[choice[h]] for h in others)
    assert spent <= 16 * 4 and choice[0] == choice[3] == 3
    costs = []
    for sizes in itertools.product(range(3), repeat=4):
        if sum(windows[s] for s in sizes) <= 64:
            other = torch.full((6,), 3)
            other[others] = torch.tensor(sizes)
            costs.append(local.predict(other))
    assert local.predict(choice) <= min(costs) + 0.02 * (max(costs) - min(costs))


def test_gates_come_first_and_the_rest_is_filled_by_predicted_kl():
    rows = random_rows(5, 2, 0)
    order = rank_heads(torch.tensor([0.0, 0.6, 0.0, 0.9, 0.1]), quadratic([(rows, 1.0)], 1.0), window=0)
    assert order[:2] == [3, 1] and sorted(order) == [0, 1, 2, 3, 4]
    alone = rows[..., 0].square().sum(0)  # independent heads: the largest square gains most
    assert order[2:] == sorted([0, 2, 4], key=lambda h: -float(alone[h]))


@pytest.mark.parametrize("budget,heads,count", [(0.15, 90, 14), (0.25, 90, 22), (0, 90, 0), (1, 90, 90), (0.5, 3, 2)])
def test_head_count(budget, heads, count):
    assert head_count(budget, heads) == count


def test_candidates_keep_count_and_bytes():
    rows = random_rows(12, 3, 1)
    windows, gates = (8, 16, 32), torch.linspace(0, 1, 12)
    found = candidates(gates, rows, rows.flip(0), 4, windows, 16)
    assert len(found) >= 3 and len({tuple(choice.tolist()) for choice in found.values()}) == len(found)
    for choice in found.values():
        assert int((choice == 3).sum()) == 4
        assert sum(windows[w] for w in choice.tolist() if w < 3) <= 16 * 8


def test_searches_on_small_matrices_leave_the_thread_count_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        local = quadratic([(random_rows(6, 3, 0), 1.0)])
        choose_windows({0}, local, (8, 16, 32), 16)
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError):
            choose_windows({0}, LocalModel(local.linear, local.second[:2]), (8, 16, 32), 16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)  # tabulated value for 8 of 10
    assert wilson(0, 0) == (0.0, 1.0)
