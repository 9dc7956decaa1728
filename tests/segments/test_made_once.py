"""What a build does once instead of in every layer or for every segment gives the same as doing it each time."""

from __future__ import annotations

import types
import warnings

import numpy as np
import pytest
import torch

from redknot_hf.paging.pages import KEEP_ALL
from redknot_hf.paging.torch_attention import AttentionSpec
from redknot_hf.segments.codec import CorruptEntry, SegmentEntry
from redknot_hf.segments.entry import SegmentRows, inspect, pack
from redknot_hf.segments.rows import RowSet, attention_weights, kinds, packed_weights
from redknot_hf.segments.select import choose

ALL = (np.zeros(2, np.int64), np.full(2, KEEP_ALL))
MIXED = (np.array([0, 3]), np.array([KEEP_ALL, 7]))
LOCAL = (np.array([2, 2]), np.array([5, 9]))


def dense_weights(q, k, positions, sink, window, spec):
    """Section by section as the rule says, fp64, ``[batch, kv_heads, group, n, slots]``."""
    heads = k.shape[1]
    scores = torch.einsum("bhgnd,bhsd->bhgns", q.double().unflatten(1, (heads, -1)), k.double()) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    j, p = torch.arange(k.shape[2]), torch.from_numpy(positions)[:, None]
    for h in range(heads):
        seen = (j <= p) & ((j < int(sink[h])) | (j > p - int(window[h])))
        if spec.model_window:
            seen &= j > p - spec.model_window
        scores[:, h].masked_fill_(~seen, -torch.inf)
    if spec.s_aux is None:
        return scores.softmax(-1)
    aux = spec.s_aux.double().view(1, heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, aux], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [np.arange(33, 40), np.array([3, 17, 39]), np.array([39])])
def test_one_set_of_rows_serves_layers_of_any_rule(positions, dtype):
    """Rules, lengths and score modifications take turns, so that what is kept for one must not serve another."""
    torch.manual_seed(3)
    rows = RowSet(positions, "cpu")
    aux = torch.tensor([0.5, -1.0, 2.0, 0.0])
    bound = 1e-5 if dtype == torch.float32 else 0.03
    for turn in range(2):
        for sink, window in (ALL, MIXED, LOCAL):
            for model_window, softcap, s_aux, slots in ((0, 0.0, None, 40), (6, 0.0, aux, 40), (0, 1.5, aux, 48)):
                q = torch.randn(2, len(positions), 4, 8).transpose(1, 2).to(dtype)
                k = torch.randn(2, 2, 64, 8).to(dtype)[:, :, :slots]
                spec = AttentionSpec(0.4, softcap, s_aux, model_window)
                want = dense_weights(q, k, positions, sink, window, spec)
                got = attention_weights(q, rows, k, sink, window, spec)
                assert got.dtype == torch.float32
                assert (got.double() - want).abs().max() < bound, (turn, sink, window, spec)
                packed = packed_weights(q, rows, k, sink, window, spec)
                assert torch.equal(packed.unflatten(2, (2, -1)), got)
    assert len(rows.unseen) == 9, "a mask for each rule, not for each layer"


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_kinds_are_those_of_the_heads_whoever_asked_before(dtype):
    generator = np.random.default_rng(0)
    for _ in range(200):
        heads = int(generator.integers(1, 9))
        sink, window = generator.integers(0, 3, (2, heads)).astype(dtype)
        found = kinds(sink, window)
        assert [kind[:2] for kind in found] == sorted(set(zip(sink.tolist(), window.tolist(), strict=True)))
        for s, w, mine in found:
            assert mine.tolist() == [h for h in range(heads) if (sink[h], window[h]) == (s, w)]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.from_numpy(mine)
            mine += 100  # the caller's own


# -------------------------------------------------------------------------------------------------------------- ranking


def view_of(eligible, length, budget):
    return types.SimpleNamespace(eligible=eligible, length=length, budget=budget)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_the_best_rows_are_those_of_the_stable_sort(dtype):
    """Few distinct scores, so that ties cross the budget; NaN, infinities, every budget."""
    generator = np.random.default_rng(1)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype)
    for _ in range(60):
        length = int(generator.integers(1, 40))
        scores = generator.integers(0, 4, length).astype(dtype)
        strange = generator.random(length) < 0.3
        scores[strange] = generator.choice(odd, int(strange.sum()))
        eligible = np.flatnonzero(generator.random(length) < 0.8)
        sorted_ones = eligible[np.argsort(-np.nan_to_num(scores[eligible], nan=-np.inf), kind="stable")]
        for budget in range(len(eligible) + 1):
            chosen = choose(view_of(eligible, length, budget), scores).ranked
            assert chosen.tolist() == sorted_ones[:budget].tolist()


# -------------------------------------------------------------------------------------------------------------- entries


def entry_of(shapes):
    keys = [torch.randn(heads, 5, dim) for heads, dim, _ in shapes]
    values = [torch.randn(heads, 5, dim) for heads, _, dim in shapes]
    return keys, values, pack(keys, values, 0)


@pytest.mark.parametrize("shapes", [[(2, 4, 4)] * 3, [(2, 4, 6), (1, 8, 8), (2, 4, 6), (1, 8, 8), (3, 2, 2)]])
def test_rows_know_their_layers_and_shapes(shapes):
    for _ in range(2):
        keys, values, entry = entry_of(shapes)
        inspect(entry, shapes, 5, 0, torch.float32)
        rows = SegmentRows(entry.tensors, entry.extra["groups"], 0, "", 0)
        assert rows.shapes() == shapes
        for layer in range(len(shapes)):
            assert torch.equal(rows.key(layer), keys[layer]) and torch.equal(rows.value(layer), values[layer])


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("which", range(3))
def test_an_entry_of_other_shapes_is_refused(layer, which):
    shapes = [(2, 4, 6), (1, 8, 8), (2, 4, 6), (1, 8, 8), (3, 2, 2)]
    other = [list(shape) for shape in shapes]
    other[layer][which] += 1
    _, _, entry = entry_of([tuple(shape) for shape in other])
    with pytest.raises(CorruptEntry, match="the model has"):
        inspect(entry, shapes, 5, 0, torch.float32)


@pytest.mark.parametrize("groups", [[False, False], [0, -1], [0, "0"], [0, None], [0, {}], [0, 2**70], [0] * 100_000])
def test_groups_that_are_no_groups_are_refused(groups):
    tensors = {"k.0": torch.zeros(2, 1, 4, 8), "v.0": torch.zeros(2, 1, 4, 8)}
    with pytest.raises(CorruptEntry):
        inspect(SegmentEntry(tensors, num_tokens=4, extra={"groups": groups}), [(1, 8, 8)] * 2, 4, 0, torch.float32)
