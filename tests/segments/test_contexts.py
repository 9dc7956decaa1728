"""Segments kept as the mean of what they are behind several contexts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from splice_models import FAMILIES, tiny

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.segments.prompt import SegmentedPrompt
from redknot_hf.segments.stores import SegmentStore

_random = np.random.default_rng(11)
HEADER, A, B, C, X, Y = (_random.integers(2, 97, n).tolist() for n in (5, 23, 17, 1, 30, 12))
QUERY = _random.integers(2, 97, 6).tolist()


def prompt_of(model, contexts, store=None, **options) -> SegmentedPrompt:
    profile = HeadProfile.all_global(model.config)
    return SegmentedPrompt(model, None, store or "memory://", profile, header=HEADER, contexts=contexts, **options)


def rows_behind(model, before, document) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a document behind some tokens, by an ordinary forward."""
    cache = RedKnotCache(model.config, HeadProfile.all_global(model.config))
    with torch.no_grad():
        model(torch.tensor([[*before, *document]]), past_key_values=cache)
    return [(layer.keys[0, :, len(before) :], layer.values[0, :, len(before) :]) for layer in cache.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_is_the_mean_behind_the_contexts_with_keys_at_the_header(family):
    model = tiny(family)
    prompt = prompt_of(model, [X, Y])
    (name,) = prompt.add_many([A])
    key = prompt._elsewhere(prompt._segments[name])
    entry = prompt.store.get(key)
    assert entry.start == len(HEADER) and entry.num_tokens == len(A)
    plain = SegmentedPrompt(model, None, "memory://", HeadProfile.all_global(model.config), header=HEADER)
    found = {}
    for context in (X, Y):
        plain.behind = [*HEADER, *context]
        (other,) = plain.add_many([A])
        found[len(context)] = plain.store.get(other)
    for tensor in entry.tensors:
        if tensor.startswith("v"):
            mean = torch.stack([e.tensors[tensor].float() for e in found.values()]).mean(0)
            assert (entry.tensors[tensor] - mean).abs().max() < 1e-5 * mean.abs().max()
    # built behind X, ratio 0, with X alone as the context: exactly what a forward gives there
    alone = prompt_of(model, [X])
    built = alone.build([X, A], QUERY, 0.0, "boundary")
    start = len(HEADER) + len(X)
    with torch.no_grad():
        model(built["input_ids"][:, -1:], past_key_values=built["past_key_values"])
    want = rows_behind(model, [*HEADER, *X], A)
    for layer, (k, v) in zip(built["past_key_values"].layers, want, strict=True):
        if layer.keys.shape[2] >= start + len(A) and not layer.is_sliding:
            assert (layer.keys[0, :, start : start + len(A)] - k).abs().max() < 1e-4
            assert (layer.values[0, :, start : start + len(A)] - v).abs().max() < 1e-4


def test_the_first_segment_is_still_exact_and_ratio_one_is_the_full_prefill():
    model = tiny("llama")
    prompt = prompt_of(model, [X, Y])
    a, b, c = prompt.add_many([A, B, C])
    built = prompt.build([b, a, c, b], QUERY, 0.15)
    assert [s.exact for s in built.account.segments] == [True, True, False, False, False]
    assert all(s.hit for s in built.account.segments) and [s.id for s in built.account.segments[1:]] == [b, a, c, b]
    assert not built.account.exact
    for segments, ratio in (([a], 0.0), ([b, a, c, b], 1.0)):
        built = prompt.build(segments, QUERY, ratio)
        assert built.account.exact
        with torch.no_grad():
            cache = RedKnotCache(model.config, HeadProfile.all_global(model.config))
            full = model(built["input_ids"], past_key_values=cache).logits[0, -1]
            mine = model(built["input_ids"][:, -1:], past_key_values=built["past_key_values"]).logits[0, -1]
        assert (full - mine).abs().max() < 3e-5


def test_a_mean_that_is_missing_is_computed_anew_to_the_same_bits():
    model = tiny("llama")
    store = SegmentStore("memory://")
    prompt = prompt_of(model, [X, Y], store)
    a, b = prompt.add_many([A, B])
    first = prompt.build([b, a], QUERY, 0.15)
    assert store.delete(prompt._elsewhere(prompt._segments[a]))
    again = prompt.build([b, a], QUERY, 0.15)
    assert [s.hit for s in again.account.segments] == [True, True, False]
    for x, y in zip(first["past_key_values"].layers, again["past_key_values"].layers, strict=True):
        assert torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)


def test_other_contexts_are_other_entries_under_the_same_ids():
    model = tiny("llama")
    store = SegmentStore("memory://")
    prompts = [prompt_of(model, contexts, store) for contexts in ([], [X], [Y], [X, Y], [Y, X], [X + Y])]
    ids = [prompt.add(A) for prompt in prompts]
    assert len(set(ids)) == 1
    keys = {prompt._elsewhere(prompt._segments[ids[0]]).hex for prompt in prompts}
    assert len(keys) == len(prompts)


def test_contexts_of_a_wrong_kind_are_refused():
    model = tiny("llama")
    with pytest.raises(RedKnotError, match="contexts"):
        prompt_of(model, "a text")
    with pytest.raises(RedKnotError, match="contexts"):
        prompt_of(model, [[]])
