"""A pass whose keys nobody reads later uses one layer's memory for all of them: the prompts are bit by bit the same.

Only GPUs do so on their own; here the CPU is told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from splice_models import FAMILIES, tiny
from test_prompt import DOCUMENTS, QUERY, contents, prompt_of

from redknot_hf.segments import splice
from redknot_hf.segments.select import Blend, KVDeviation, QueryAttention
from redknot_hf.segments.splice import SpliceCache


def twice(view):
    """Asks for two passes and computes rows between them."""
    first = view.query_attention(0.5)
    view.run(view.eligible[:3])
    return first + view.query_attention(1.0, power=4)


def early_first(view):
    return view.kv_deviation(1) * view.query_attention(1.0)


SELECTORS = {
    "blend": Blend(share=1),
    "query_attention": QueryAttention(),
    "early layers last": Blend(attention=1, deviation=1, share=1),
    "early layers first": early_first,
    "deviation alone": KVDeviation(),
    "twice": twice,
}


@pytest.fixture
def lent(monkeypatch):
    """Addresses that layers borrowed, by layer."""
    found: dict[int, set[int]] = {}
    lend = SpliceCache.lend

    def watched(cache, layer, k, v):
        memory = lend(cache, layer, k, v)
        if memory is not None:
            found.setdefault(layer.index, set()).add(memory[0].data_ptr())
        return memory

    monkeypatch.setattr(SpliceCache, "lend", watched)
    return found


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [False, True])
def test_prompts_are_the_same(monkeypatch, lent, family, windowed, selector):
    prompt = prompt_of(tiny(family), windowed)
    build = lambda: prompt.build(DOCUMENTS, QUERY, 0.2, SELECTORS[selector])  # noqa: E731
    want = build()
    assert not lent
    monkeypatch.setattr(splice, "_copies_cheaply", lambda device: True)
    got = build()
    for a, b in zip(contents(want["past_key_values"]), contents(got["past_key_values"]), strict=True):
        assert torch.equal(a, b)
    assert [s.recomputed for s in got.account.segments] == [s.recomputed for s in want.account.segments]
    assert got.account.bytes_moved == want.account.bytes_moved
    if not windowed and family in ("llama", "qwen3") and selector != "deviation alone":
        # rows that were computed on purpose stay, in memory of the layers' own, and the next pass looks at them there
        expected = {"twice": [0, 1], "early layers first": []}
        assert sorted(lent) == expected.get(selector, [0, 1, 2, 3])
    if windowed or selector == "deviation alone":
        assert not lent


def test_layers_share_the_memory_of_one_and_are_empty_afterwards(monkeypatch, lent):
    monkeypatch.setattr(splice, "_copies_cheaply", lambda device: True)
    seen = []

    def look(view):
        scores = view.query_attention()
        seen.append([(layer.is_initialized, layer.borrowed, layer.k) for layer in view.cache.layers])
        return scores

    prompt_of(tiny("llama")).build(DOCUMENTS, QUERY, 0.2, look)
    assert set.union(*lent.values()) == lent[0] and len(lent[0]) == 1
    assert seen == [[(False, False, None)] * 4]


def test_a_pass_that_fails_gives_the_memory_back(monkeypatch, lent):
    monkeypatch.setattr(splice, "_copies_cheaply", lambda device: True)
    prompt = prompt_of(tiny("llama"))
    want = prompt.build(DOCUMENTS, QUERY, 0.2)

    def stumble(view):
        observed = type(view.cache.layers[2]).attend
        monkeypatch.setattr(type(view.cache.layers[2]), "attend", lambda *a: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            view.query_attention()
        monkeypatch.setattr(type(view.cache.layers[2]), "attend", observed)
        assert not any(layer.is_initialized for layer in view.cache.layers)
        return view.query_attention(2 / 3)

    got = prompt.build(DOCUMENTS, QUERY, 0.2, stumble)
    assert np.isfinite(got.account.recomputed) and got.account.recomputed == want.account.recomputed
