"""Rows that are not recomputed take over what recomputation changed at rows near them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from splice_models import FAMILIES, tiny

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.segments.prompt import SegmentedPrompt
from redknot_hf.segments.spread import spread_weights

_random = np.random.default_rng(12)
HEADER, A, B, C = (_random.integers(2, 97, n).tolist() for n in (5, 23, 17, 19))
QUERY = _random.integers(2, 97, 6).tolist()


def prompt_of(model, profile=None) -> SegmentedPrompt:
    return SegmentedPrompt(model, None, "memory://", profile or HeadProfile.all_global(model.config), header=HEADER)


def unrotated(model, layer: int, k: torch.Tensor, first: int) -> torch.Tensor:
    """Keys ``[heads, n, dim]`` of positions from ``first`` on without their rotation, by complex numbers."""
    config = model.config
    theta = (config.rope_parameters or {}).get("rope_theta") if hasattr(config, "rope_parameters") else None
    theta = theta or config.rope_theta
    half = k.shape[-1] // 2
    turn = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (first + torch.arange(k.shape[1], dtype=torch.float64))[:, None] * turn
    z = torch.complex(k[..., :half].double(), k[..., half:].double()) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([z.real, z.imag], -1)


def test_one_row_gives_half_of_its_change_to_itself_and_a_quarter_to_the_far_end():
    weights = spread_weights(1000, np.array([10]), 16.0)
    assert weights.shape == (1000, 1)
    assert weights[10, 0] == pytest.approx(0.5) and weights[-1, 0] == pytest.approx(0.25)
    assert weights[26, 0] == pytest.approx((1 + np.exp(-1)) / 4)


def test_an_equal_change_of_many_rows_is_the_change_of_all_others():
    chosen = np.arange(0, 1000, 3)
    total = spread_weights(1000, chosen, 16.0).sum(1)
    assert np.abs(total - 1).max() < 0.02


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_that_stay_move_by_the_weighted_changes(family):
    model = tiny(family)
    prompt = prompt_of(model)
    a, b = prompt.add_many([A, B])
    start, n = len(HEADER) + len(A), 4
    kept = prompt.build([a, b], QUERY, 0.0)["past_key_values"]
    # the boundary selector takes the first n rows of the only segment that is not exact
    ratio = n / (len(A) + len(B))
    plain = prompt.build([a, b], QUERY, ratio, "boundary")
    assert plain.account.recomputed == n
    moved = prompt.build([a, b], QUERY, ratio, "boundary", spread=8)["past_key_values"]
    weights = torch.from_numpy(spread_weights(len(B), np.arange(n), 8.0)).double()
    layer = 1  # layer 0 is right everywhere, so the recomputed rows here are those of the plain build
    for part in ("keys", "values"):
        old, new, got = (
            getattr(cache.layers[layer], part)[0, :, start : start + len(B)]
            for cache in (kept, plain["past_key_values"], moved)
        )
        if part == "keys":
            old, new, got = (unrotated(model, layer, x, start) for x in (old, new, got))
        want = old + torch.einsum("tn,hnd->htd", weights, (new - old)[:, :n].double())
        want[:, :n] = new[:, :n]
        assert (new - old)[:, :n].abs().max() > 1e-2
        assert (got - want).abs().max() < 1e-4
        assert (got - old)[:, n:].abs().max() > 1e-3
    for cache in (plain["past_key_values"], moved):  # what is exact is left alone
        assert torch.equal(cache.layers[2].keys[0, :, :start], kept.layers[2].keys[0, :, :start])


@pytest.mark.parametrize("family", FAMILIES)
def test_at_ratio_one_nothing_is_left_to_correct(family):
    model = tiny(family)
    prompt = prompt_of(model)
    built = prompt.build([C, A, B], QUERY, 1.0, spread=16)
    assert built.account.exact
    with torch.no_grad():
        cache = RedKnotCache(model.config, HeadProfile.all_global(model.config))
        full = model(built["input_ids"], past_key_values=cache).logits[0, -1]
        mine = model(built["input_ids"][:, -1:], past_key_values=built["past_key_values"]).logits[0, -1]
    assert (full - mine).abs().max() < 3e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selector", ["boundary", "blend", "kv_deviation"])
def test_it_goes_with_local_heads_and_every_selector(family, selector):
    model = tiny(family)
    profile = HeadProfile.uniform(model.config, sink=2, window=8, global_heads=0.5)
    prompt = prompt_of(model, profile)
    with torch.no_grad():
        logits = []
        for spread in (0, 16):
            built = prompt.build([C, A, B], QUERY, 0.2, selector, spread=spread)
            assert not built.account.exact
            logits.append(model(built["input_ids"][:, -1:], past_key_values=built["past_key_values"]).logits[0, -1])
    assert torch.isfinite(logits[1]).all()
    if family == "mistral-sliding":  # no head keeps everything: nothing is corrected
        assert (logits[0] - logits[1]).abs().max() < 1e-4
    else:
        assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_distance_below_zero_is_refused():
    with pytest.raises(RedKnotError, match="spread"):
        prompt_of(tiny("llama")).build([A, B], QUERY, spread=-1)
