"""SparseFFN around reuse: documents are captured as they are, the forward over recomputed rows and query is sparse."""

from __future__ import annotations

import pytest
import torch
from sparse_models import tiny, tokens, with_rows

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.segments import SegmentedPrompt, SegmentStore
from redknot_hf.segments.rows import attention_weights
from redknot_hf.sparse_ffn import SparseFFN, SparseFFNSchedule
from redknot_hf.sparse_ffn import run as run_module

SCHEDULE = SparseFFNSchedule(keep=0.4, first_layer=1, sink=2, recent=4, boundary=3, query_block=5, bucket=1, min_rows=0)
DOCUMENTS = [tokens(1, 30, seed)[0].tolist() for seed in (5, 6)]
QUERY = tokens(1, 12, 7)[0].tolist()


def build(model, store, recompute=1.0, profile=None):
    prompt = SegmentedPrompt(model, None, store, profile)
    segments = [prompt.add(document) for document in DOCUMENTS]
    return prompt.build(segments, QUERY, recompute=recompute)


def keys_of(built):
    return [layer.dense()[0] for layer in built["past_key_values"].layers]


@pytest.mark.parametrize("local", [False, True])
def test_a_sparse_splice_is_the_prompt_without_those_ffn_rows(local, monkeypatch):
    """The first document is reused as captured, its FFN rows are whole; of the others those that did not pass are zero."""
    model = tiny("llama")
    profile = HeadProfile.uniform(model.config, sink=3, window=90, global_heads=0.5) if local else None
    chosen, original = [], run_module.select_rows
    monkeypatch.setattr(run_module, "select_rows", lambda *args: chosen.append(original(*args)) or chosen[-1])
    dense = keys_of(build(model, SegmentStore("memory://"), profile=profile))
    with SparseFFN(model, SCHEDULE) as context:
        built = build(model, SegmentStore("memory://"), profile=profile)
    # a splice ends with the keys of the last layer: nobody reads what its FFN would give
    assert context.stats.seen == [41, 41, 41, 0] and context.stats.run == [41, 17, 17, 0]
    passing = {}
    for layer, index in zip((1, 2), chosen, strict=True):
        assert {0, 1, 2, *range(30, 41)} <= set(index.tolist())  # the segment's first rows, and the query
        passing[layer] = torch.ones(1, 71, dtype=torch.bool)
        passing[layer][0, 30:] = False
        passing[layer][0, 30 + index] = True
    cache = RedKnotCache(model.config, profile)
    ids = torch.tensor([DOCUMENTS[0] + DOCUMENTS[1] + QUERY])[:, :-1]  # the last token is fed by generate()
    with_rows(model, ids, passing, past_key_values=cache)
    for a, b in zip(keys_of(built), keys_of({"past_key_values": cache}), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(keys_of(built)[3], dense[3], atol=1e-2)


def test_documents_are_captured_dense_and_the_account_says_what_was_left_out():
    model = tiny("llama")
    store, plain = SegmentStore("memory://"), SegmentStore("memory://")
    dense = build(model, plain, recompute=0.0)
    with SparseFFN(model, SCHEDULE.replace(keep=0.0)) as context:
        first = build(model, store, recompute=1.0)
        assert (
            context.stats.seen[2] == 41
        )  # one forward: the captures do not count, and the first document stands right
    again = build(model, store, recompute=0.0)  # what is in the store is what a dense capture puts there
    for a, b in zip(keys_of(again), keys_of(dense), strict=True):
        assert torch.equal(a, b)
    assert not first.account.exact and "sparse FFN left out" in first.account.reason
    assert build(model, store, recompute=1.0).account.exact


def test_importance_in_a_splice_is_the_querys_attention(monkeypatch):
    model, seen = tiny("llama"), []
    original = run_module.splice_call_mass

    def spy(query, rows, layer, spec, queries, length):
        mass = original(query, rows, layer, spec, queries, length)
        seen.append((rows.host.copy(), queries.copy()))
        weights = attention_weights(query, rows, layer.k[:, :, :length], layer.sink, layer.window, spec)
        expected = weights[:, :, :, queries].sum((1, 2, 3))[:, rows.host]
        assert torch.allclose(mass, expected, atol=1e-6)
        return mass

    monkeypatch.setattr(run_module, "splice_call_mass", spy)
    with SparseFFN(model, SCHEDULE) as context:
        build(model, SegmentStore("memory://"), recompute=0.5)
    assert len(seen) == 3 and context.stats.run[1] < context.stats.seen[1]
    rows, queries = seen[0]
    assert rows[queries].tolist() == list(range(60, 71))
