"""Retrieval prompts that share a context: all needles are in it, and running them together changes nothing."""

from __future__ import annotations

import pytest
from planted import HEADS, LAYERS

from redknot_hf.heads.profiler import context as context_module
from redknot_hf.heads.profiler.collect import batches, frozen
from redknot_hf.heads.profiler.tasks import Sample, collate, make_needles
from redknot_hf.heads.profiler.texts import TokenStream
from redknot_hf.heads.profiler.validation import full_reference, measure
from redknot_hf.heads.profiler.visibility import HeadMap


@pytest.fixture
def samples(byte_tokenizer) -> list[Sample]:
    return make_needles(byte_tokenizer, TokenStream(byte_tokenizer, None, "shared"), 5, 1500, "shared", together=3)


def test_needles_of_a_context_are_all_in_it(samples, byte_tokenizer):
    assert [s.context is samples[0].context for s in samples] == [True, True, True, False, False]
    assert len({s.kind for s in samples}) == 5
    for sample in samples:
        first, last = sample.needle
        answer = byte_tokenizer.decode(sample.suffix[sample.answer_start :]).strip(' ".')
        assert len(sample.context) == 1500
        assert answer.split(" ")[-1] in byte_tokenizer.decode(sample.context[first:last])


def test_batches_count_contexts(samples):
    assert [len(group) for group in batches(samples, 1)] == [3, 2]
    assert [len(group) for group in batches(samples, 2)] == [5]
    alone = [Sample(s.kind, list(s.context), s.suffix, s.answer_start, s.needle) for s in samples]
    assert [len(group) for group in batches(alone, 2)] == [2, 2, 1]


@pytest.mark.parametrize("mode", ["full", "windowed"])
def test_a_shared_context_is_computed_once_and_answers_alike(planted_model, samples, mode, monkeypatch):
    visible = HeadMap.uniform(LAYERS, HEADS, 4, 32)
    lengths: list[int] = []
    inner = context_module.ContextCache.repeat
    monkeypatch.setattr(
        context_module.ContextCache, "repeat", lambda self, count: (lengths.append(count), inner(self, count))
    )
    with frozen(planted_model):
        together = full_reference(planted_model, collate(samples[:3]))
        rows = measure(planted_model, together, visible, mode)
        assert lengths == ([3] if mode == "full" else [3, 3])
        for sample, row in zip(samples[:3], rows, strict=True):
            (alone,) = measure(planted_model, full_reference(planted_model, collate([sample])), visible, mode)
            assert (row.kind, row.hit, row.full_hit) == (alone.kind, alone.hit, alone.full_hit)
            assert row.kl == pytest.approx(alone.kl, abs=1e-5)
            assert row.delta_nll == pytest.approx(alone.delta_nll, abs=1e-5)
