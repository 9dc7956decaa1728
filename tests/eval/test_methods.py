"""Baselines: the same bytes, other heads."""

from __future__ import annotations

import pytest

from redknot_hf import HeadProfile
from redknot_hf.errors import RedKnotError
from redknot_hf.eval.methods import build_methods, fitted, matched_uniform, shuffled


def stored(profile, tokens):
    return sum(map(sum, profile.stored_tokens(tokens)))


@pytest.fixture(scope="module")
def profile():
    """The shipped profile: 22 of 90 heads global, five window sizes."""
    return HeadProfile.load("SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def config():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64)


@pytest.mark.parametrize("tokens", [200, 1024, 5000])
@pytest.mark.parametrize("sink", [0, 4])
def test_uniform_windows_store_as_much_and_no_window_shorter_does(profile, config, tokens, sink):
    found = matched_uniform(config, profile, tokens, sink)
    (window,) = {w for row in found.window for w in row}
    assert found.count("local") == 90 and {s for row in found.sink for s in row} == {sink}
    goal = stored(profile, tokens)
    assert goal <= stored(found, tokens) < goal + 90
    if window > 1:
        assert stored(HeadProfile.uniform(config, sink, window - 1), tokens) < goal


@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
@pytest.mark.parametrize("sink", [0, 4])
def test_uniform_windows_pay_for_as_many_pages_and_fill_them(profile, config, tokens, sink):
    """64-token pages: the profile's windows leave slots empty, which the baselines must not be charged less for."""
    found = matched_uniform(config, profile, tokens, sink, 64)
    (window,) = {w for row in found.window for w in row}
    ours, theirs = (p.kv_bytes(tokens, page_size=64, head_dim=64) for p in (profile, found))
    assert (sink + window) % 64 == 0 and theirs >= ours
    assert HeadProfile.uniform(config, sink, window - 64).kv_bytes(tokens, page_size=64, head_dim=64) < ours
    assert stored(found, tokens) * 2 * 64 * 2 == theirs, "no empty slots"


def test_random_maps_deal_the_same_heads_to_other_places(profile):
    def cells(p):
        return [
            (c, s, w)
            for rows in zip(p.head_class, p.sink, p.window, strict=True)
            for c, s, w in zip(*rows, strict=True)
        ]

    one, two = shuffled(profile, 1), shuffled(profile, 2)
    assert sorted(cells(one)) == sorted(cells(profile)) and cells(one) != cells(profile) != cells(two) != cells(one)
    assert cells(shuffled(profile, 1)) == cells(one)
    assert stored(one, 3000) == stored(profile, 3000)


@pytest.mark.parametrize("share", [0.3, 0.35, 0.43, 0.5, 0.8])
@pytest.mark.parametrize("page", [1, 16])
def test_fitted_windows_use_the_budget_and_keep_the_global_heads(profile, share, page):
    budget = share * 90 * 1024
    found = fitted(profile, lambda p: stored(p, 1024) <= budget, page)
    assert found.head_class == profile.head_class
    assert budget - 68 * page - 90 <= stored(found, 1024) <= budget
    assert all(
        (s + w) % page == 0 for rows in zip(found.sink, found.window, strict=True) for s, w in zip(*rows, strict=True)
    )
    longest = max(w for row in found.window for w in row)
    shortest = min(w for row in found.window for w in row if w)
    if share < 0.4:  # cut to one length: nothing above it, and the short ones left alone
        assert all(
            f == min(w, longest) or page > 1
            for fr, wr in zip(found.window, profile.window, strict=True)
            for f, w in zip(fr, wr, strict=True)
        )
    if share > 0.5:
        assert shortest > 64


def test_fitted_refuses_what_the_global_heads_alone_exceed(profile):
    with pytest.raises(RedKnotError, match="22 global heads alone"):
        fitted(profile, lambda p: stored(p, 1024) <= 0.2 * 90 * 1024)


def test_methods_by_name(profile, config):
    names = [m.name for m in build_methods(config, profile, 1024, random_maps=2)]
    assert names == ["full", "ours", "window", "streaming", "random-1", "random-2", "blind"]
    with pytest.raises(RedKnotError, match="'oracle' is unknown"):
        build_methods(config, profile, 1024, ["full", "oracle"])
    with pytest.raises(RedKnotError, match="random-maps"):
        build_methods(config, profile, 1024, ["random"], random_maps=0)
