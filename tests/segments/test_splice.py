"""A splice computes rows of a prompt over stored rows: exact wherever nothing is reused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from splice_models import FAMILIES, tiny
from transformers import DynamicCache

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.paging.pages import KEEP_ALL
from redknot_hf.paging.torch_attention import AttentionSpec
from redknot_hf.segments.rows import CPU_TILE, RowSet, attend_rows, attention_weights, balanced_rows
from redknot_hf.segments.splice import SpliceCache, forward_rows, narrow_rows

EXACT = 2e-5


def ids_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 97, (1, n), generator=torch.Generator().manual_seed(seed))


def mixed(model, sink: int = 2, window: int = 12) -> HeadProfile:
    return HeadProfile.uniform(model.config, sink=sink, window=window, global_heads=[(0, 1), (2, 0), (3, 1)])


def target_for(model, profile=None, **options) -> RedKnotCache:
    return RedKnotCache(model.config, profile or HeadProfile.all_global(model.config), page_size=16, **options)


def next_logits(model, cache, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[:, -1:], past_key_values=cache, attention_mask=torch.ones_like(ids)).logits[0, -1]


def dense_rows(q, k, v, positions, sink, window, spec):
    """The rule of section 3 as one dense mask, fp64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).double(), v.repeat_interleave(group, 1).double()
    scores = q.double() @ k.transpose(2, 3) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    j = torch.arange(k.shape[2])
    p = torch.from_numpy(positions)[:, None]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for h in range(q.shape[1]):
        s, w = int(sink[h // group]), int(window[h // group])
        seen = (j <= p) & ((j < s) | (j > p - w))
        if spec.model_window:
            seen &= j > p - spec.model_window
        out[:, h] = scores[:, h].masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, h]
    return out.transpose(1, 2)


@pytest.mark.parametrize(("model_window", "softcap"), [(0, 0.0), (40, 0.0), (0, 2.0)])
@pytest.mark.parametrize("which", ["all", "scattered", "runs", "one"])
def test_rows_attend_by_position(which, model_window, softcap):
    torch.manual_seed(1)
    length = 600
    k, v = torch.randn(1, 4, 640, 16), torch.randn(1, 4, 640, 8)
    positions = {
        "all": np.arange(length),
        "scattered": np.sort(np.random.default_rng(0).choice(length, 170, replace=False)),
        "runs": np.concatenate([np.arange(a, a + 20) for a in (3, 200, 230, 570)]),
        "one": np.array([311]),
    }[which]
    q = torch.randn(1, 8, len(positions), 16)
    sink, window = np.array([0, 4, 4, 3]), np.array([KEEP_ALL, 32, 32, 100])
    spec = AttentionSpec(0.3, softcap, model_window=model_window)
    rows = RowSet(positions, "cpu")
    want = dense_rows(q, k, v, positions, sink, window, spec)
    got = attend_rows(q, rows, k, v, sink, window, spec)
    assert (got.double() - want).abs().max() < 1e-5
    weights = attention_weights(q, rows, k, sink, window, spec)
    again = (weights @ v[:, :, None]).flatten(1, 2).transpose(1, 2)
    assert (again.double() - want).abs().max() < 1e-5


def test_the_operator_is_given_the_same_problem(monkeypatch):
    """What GPUs run, through the operator's own CPU implementation: linear storage seen as pages."""
    torch.manual_seed(2)
    k, v = torch.randn(2, 4, 640, 16), torch.randn(2, 4, 640, 16)
    positions = np.sort(np.random.default_rng(0).choice(600, 170, replace=False))
    q = torch.randn(2, 8, 170, 16)
    sink, window = np.array([0, 4, 4, 3]), np.array([KEEP_ALL, 32, 32, 100])
    spec = AttentionSpec(0.3, model_window=40)
    monkeypatch.setattr("redknot_hf.segments.rows._kernel_serves", lambda q, k, v: True)
    rows = RowSet(positions, "cpu")
    for _ in range(2):  # the second time with what the first has uploaded
        got = attend_rows(q, rows, k, v, sink, window, spec)
        want = dense_rows(q, k, v, positions, sink, window, spec)
        assert (got.double() - want).abs().max() < 1e-5


def test_a_local_row_does_not_read_the_whole_prompt():
    rows = RowSet(np.concatenate([np.arange(a, a + 8) for a in range(0, 40000, 1000)]), "cpu")
    assert max(b.sinks + b.high - b.low for b in rows.blocks(4, 256, 0, 1, 1, True, torch.zeros(1))) <= 4 + 256 + 8


@pytest.mark.parametrize(("heads", "group", "threads"), [(3, 3, 2), (3, 3, 8), (8, 4, 16), (1, 1, 2), (2, 7, 4)])
def test_blocks_leave_no_thread_idle_that_another_size_would_use(heads, group, threads):
    def idle(rows):
        tiles = heads * -(-group * rows // CPU_TILE)
        return -(-tiles // threads) * threads * CPU_TILE / (heads * group * rows)

    rows = balanced_rows(heads, group, threads)
    assert 64 <= rows <= 128
    assert idle(rows) <= min(idle(n) for n in range(64, 129)) + 0.02


def test_nothing_behind_the_last_layers_keys_is_computed(monkeypatch):
    model = tiny("llama")
    cache = SpliceCache(target_for(model), 40)
    calls, mlps = [], []
    original = attend_rows
    monkeypatch.setattr("redknot_hf.segments.splice.attend_rows", lambda *args: calls.append(1) or original(*args))
    hooks = [layer.mlp.register_forward_hook(lambda *args: mlps.append(1)) for layer in model.model.layers]
    forward_rows(model, cache, ids_of(40), RowSet(np.arange(40), "cpu"))
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(mlps) == len(model.model.layers) - 1
    assert all(layer.k is not None and layer.k[:, :, :40].abs().sum() > 0 for layer in cache.layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [False, True])
def test_all_rows_computed_equal_the_full_prefill(family, windowed):
    """M2 without segments: the splice forward over every row is the prefill."""
    model = tiny(family)
    ids = ids_of(150)
    profile = mixed(model) if windowed else None
    whole = target_for(model, profile)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=whole)
    target = target_for(model, profile)
    cache = SpliceCache(target, 149)
    forward_rows(model, cache, ids[:, :-1], RowSet(np.arange(149), "cpu"))
    cache.hand_over(149)
    for a, b in zip(whole.layers, target.layers, strict=True):
        assert (a.keys - b.keys).abs().max() < EXACT
        assert (a.values - b.values).abs().max() < EXACT
    assert target.get_seq_length() == 149
    assert target.memory_report().live == whole.memory_report().live
    want, got = next_logits(model, whole, ids), next_logits(model, target, ids)
    assert (want - got).abs().max() < EXACT
    if not windowed:
        with torch.no_grad():
            dense = model(ids, past_key_values=DynamicCache(config=model.config)).logits[0, -1]
        assert (dense - got).abs().max() < EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [False, True])
def test_rows_over_right_storage_are_the_prefills_rows(family, windowed):
    """Where the stored rows are right, computing any subset gives what the prefill computes there."""
    model = tiny(family)
    ids = ids_of(140, 3)
    profile = mixed(model) if windowed else None
    whole = SpliceCache(target_for(model, profile), 140)
    forward_rows(model, whole, ids, RowSet(np.arange(140), "cpu"))
    rows = np.sort(np.random.default_rng(1).choice(140, 37, replace=False))
    part = SpliceCache(target_for(model, profile), 140)
    for layer, source in zip(part.layers, whole.layers, strict=True):
        k, v = source.k.clone(), source.v.clone()
        k[:, :, rows], v[:, :, rows] = 9.0, 9.0  # must be overwritten before it is read
        layer.fill(k, v, slice(None))
    forward_rows(model, part, ids[:, rows], RowSet(rows, "cpu"))
    for a, b in zip(whole.layers, part.layers, strict=True):
        assert (a.k - b.k).abs().max() < EXACT
        assert (a.v - b.v).abs().max() < EXACT


def test_narrowed_rows_stop_where_they_are_dropped():
    model = tiny("llama")
    ids = ids_of(90, 5)
    whole = SpliceCache(target_for(model), 90)
    forward_rows(model, whole, ids, RowSet(np.arange(90), "cpu"))
    part = SpliceCache(target_for(model), 90)
    for layer in part.layers:
        layer.fill(torch.zeros(1, 2, 90, 16), torch.zeros(1, 2, 90, 16), slice(0, 90))
    seen = []

    def keep_last_ten(rows):
        seen.append(len(rows))
        return np.arange(len(rows) - 10, len(rows))

    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with narrow_rows(model, part, {1: lambda rows: np.arange(40, 90), 3: keep_last_ten}):
        forward_rows(model, part, ids, RowSet(np.arange(90), "cpu"))
    assert seen == [50]
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert (part.layers[0].k - whole.layers[0].k)[:, :, :90].abs().max() < EXACT
    first = [int((layer.k[0, 0] != 0).any(1).nonzero()[0]) for layer in part.layers]
    assert first == [0, 40, 40, 80]
    # layer 1 takes its input from a complete layer 0: the rows that are left are exact
    assert (part.layers[1].k - whole.layers[1].k)[:, :, 40:90].abs().max() < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_narrowing_twice_keeps_rows_and_their_positions_together(family):
    model = tiny(family)
    ids = ids_of(90, 8)
    whole = SpliceCache(target_for(model), 90)
    forward_rows(model, whole, ids, RowSet(np.arange(90), "cpu"))
    part = SpliceCache(target_for(model), 90)
    third = np.arange(1, 90, 3)
    left = third[5::2]  # what the two steps below leave; only these rows are wrong in storage
    for layer, source in zip(part.layers, whole.layers, strict=True):
        k, v = source.k.clone(), source.v.clone()
        k[:, :, left], v[:, :, left] = 9.0, 9.0
        layer.fill(k, v, slice(None))
    steps = {1: lambda rows: np.arange(5, len(rows)), 2: lambda rows: np.arange(0, len(rows), 2)}
    with narrow_rows(model, part, steps):
        forward_rows(model, part, ids[:, third], RowSet(third, "cpu"))
    for a, b in zip(whole.layers, part.layers, strict=True):
        assert (a.k - b.k).abs().max() < EXACT
        assert (a.v - b.v).abs().max() < EXACT


def test_partial_rows_replace_only_heads_that_keep_everything():
    model = tiny("llama")
    profile = mixed(model)
    ids = ids_of(64, 6)
    cache = SpliceCache(target_for(model, profile), 64)
    for layer in cache.layers:
        layer.fill(torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 16), slice(0, 64))
    partial = np.arange(64) < 32
    forward_rows(model, cache, ids, RowSet(np.arange(64), "cpu", partial))
    for layer, classes in zip(cache.layers, profile.head_class, strict=True):
        for head, kind in enumerate(classes):
            fresh = (layer.k[0, head, :64] != 0).any(1)  # slots behind are there to make pages whole
            assert fresh[32:].all()
            assert fresh[:32].all() if kind == "global" else not fresh[:32].any()
