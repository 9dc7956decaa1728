"""Segments kept in int8: what comes out is the rounded rows and nothing else, they are never taken for others, and they are
never called exact while a row of them is used."""

from __future__ import annotations

import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch
from splice_models import FAMILIES, tiny
from store_backends import KINDS, make_backend, params

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.segments.codec import CorruptEntry
from redknot_hf.segments.entry import in_int8, inspect, pack
from redknot_hf.segments.keys import SegmentKey
from redknot_hf.segments.prompt import SegmentedPrompt
from redknot_hf.segments.stores import SegmentStore

EXACT = 3e-5
_random = np.random.default_rng(3)
HEADER = _random.integers(2, 97, 5).tolist()
DOCUMENTS = [_random.integers(2, 97, n).tolist() for n in (30, 41, 1, 25)]
QUERY = _random.integers(2, 97, 7).tolist()


def profile_of(model, windowed: bool) -> HeadProfile:
    if not windowed:
        return HeadProfile.all_global(model.config)
    return HeadProfile.uniform(model.config, sink=2, window=12, global_heads=[(0, 1), (2, 0), (3, 1)])


def prompt_of(model, store, windowed=False, header=HEADER, kv_dtype="int8", **options) -> SegmentedPrompt:
    profile = profile_of(model, windowed)
    return SegmentedPrompt(model, None, store, profile, header=header, page_size=16, kv_dtype=kv_dtype, **options)


def logits_after(model, built) -> torch.Tensor:
    ids = built["input_ids"]
    with torch.no_grad():
        return model(ids[:, -1:], past_key_values=built["past_key_values"].fork()).logits[0, -1]


def multiplied_out(entry):
    tensors = {
        name: tensor.float() * entry.tensors[f"s{name[1:]}"][..., "kv".index(name[0]), None]
        for name, tensor in entry.tensors.items()
        if name[0] != "s"
    }
    return dataclasses.replace(entry, tensors=tensors)


# ------------------------------------------------------------------------------------------------------------ numbers


def test_a_row_is_off_by_half_a_step_at_most():
    torch.manual_seed(0)
    keys, values = ([torch.randn(2, 9, 16) * 10.0**i for i in range(3)] for _ in range(2))
    keys[1][0, 3] = 0
    plain = pack(keys, values, 5)
    kept = in_int8(plain)
    for name, tensor in plain.tensors.items():
        scale = kept.tensors[f"s{name[1:]}"][..., "kv".index(name[0]), None]
        assert kept.tensors[name].dtype == torch.int8 and scale.dtype == torch.float32
        assert torch.equal(scale[..., 0], tensor.abs().amax(-1) / 127)
        assert ((kept.tensors[name] * scale - tensor).abs() <= 0.5001 * scale).all()
    assert kept.nbytes == plain.nbytes // 4 + plain.nbytes // 16  # float32 rows of 16 and one float32 each
    inspect(kept, [(2, 16, 16)] * 3, 9, 5, torch.float32, True)


def test_rows_that_are_not_finite_are_refused():
    rows = [torch.zeros(2, 3, 4)]
    broken = [torch.full((2, 3, 4), torch.inf)]
    with pytest.raises(RedKnotError, match="keys are not finite"):
        in_int8(pack(broken, rows, 0))
    with pytest.raises(RedKnotError, match="values are not finite"):
        in_int8(pack(rows, broken, 0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("header", [HEADER, []])
def test_a_prompt_is_what_the_multiplied_out_rows_make(family, windowed, header):
    model = tiny(family)
    store = SegmentStore("memory://")
    segments = [DOCUMENTS[i] for i in (3, 1, 0, 2)]
    prompt = prompt_of(model, store, windowed, header)
    built = prompt.build(segments, QUERY, 0.3)
    others = SegmentStore("memory://")
    plain = prompt_of(model, others, windowed, header, None)
    for ids in segments:
        entry = store.get(prompt._register(ids))
        others.put(plain._register(ids), multiplied_out(entry))
    again = plain.build(segments, QUERY, 0.3)
    assert all(segment.hit for segment in again.account.segments[bool(header) :])
    assert again.account.recomputed == built.account.recomputed > 0
    assert torch.equal(logits_after(model, built), logits_after(model, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_get_their_own_dtype(dtype):
    model = copy.deepcopy(tiny("llama")).to(dtype)
    built = prompt_of(model, "memory://").build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, 0.2)
    assert {layer.keys.dtype for layer in built["past_key_values"].layers} == {dtype}
    assert torch.isfinite(logits_after(model, built)).all()


@pytest.mark.parametrize("windowed", [False, True])
def test_ratio_one_is_the_full_prefill(windowed):
    model = tiny("llama")
    built = prompt_of(model, "memory://", windowed).build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, 1.0)
    cache = RedKnotCache(model.config, profile_of(model, windowed))
    with torch.no_grad():
        full = model(built["input_ids"], past_key_values=cache).logits[0, -1]
    assert (full - logits_after(model, built)).abs().max() < EXACT
    assert built.account.exact and built.account.reused == len(HEADER)


def test_contexts_and_batches_take_them_too():
    model = tiny("llama")
    store = SegmentStore("memory://")
    prompt = prompt_of(model, store, contexts=[DOCUMENTS[2] * 4])
    segments = [DOCUMENTS[1], DOCUMENTS[0]]
    one = prompt.build(segments, QUERY, 0.2)
    kept = [store.get(record.key) for record in store.list()]
    # the first document, the mean of the second one; header and context stay as they are
    assert sorted(entry.dtype for entry in kept) == ["float32"] * 2 + ["float32/int8"] * 2
    many = prompt.build_many([segments, segments[:1]], [QUERY, QUERY], 0.2)
    assert all(segment.hit for account in many.accounts for segment in account.segments)
    with torch.no_grad():
        last = model(
            many["input_ids"][:, -1:], past_key_values=many["past_key_values"], attention_mask=many["attention_mask"]
        ).logits[0, -1]
    assert (last - logits_after(model, one)).abs().max() < EXACT


# ----------------------------------------------------------------------------------------------------- what is claimed


def test_the_account_says_that_rows_are_rounded():
    model = tiny("llama")
    prompt = prompt_of(model, "memory://")
    first = prompt.build([DOCUMENTS[1]], QUERY, 0.2).account
    # where it was computed, behind what it was computed behind: nothing to gain from computing rows anew but exactness
    assert not first.exact and first.recomputed == 0 and first.reason.startswith("41 reused rows are kept in int8")
    assert [segment.exact for segment in first.segments] == [True, False]
    two = prompt.build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, 0.2).account
    kept = 71 - two.recomputed
    assert not two.exact and f"{kept} reused rows are kept in int8" in two.reason
    falling = prompt.build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, [1.0, 1.0, 0.5, 0.5]).account
    assert not falling.exact and "int8" in falling.reason
    plain = prompt_of(model, "memory://", kv_dtype=None).build([DOCUMENTS[1]], QUERY, 0.2).account
    assert plain.exact and "int8" not in plain.reason


def test_other_entries_are_never_taken_for_them():
    model = tiny("llama")
    store = SegmentStore("memory://")
    prompts = [prompt_of(model, store, kv_dtype=kv_dtype) for kv_dtype in (None, "int8", torch.int8)]
    ids = [prompt.add(DOCUMENTS[1]) for prompt in prompts]
    assert ids[0] != ids[1] == ids[2]
    assert SegmentKey.of(model="m", rope="r", token_ids=[1], kv_dtype=torch.int8).dtype == "bfloat16/int8"
    for prompt, dtype in zip(prompts, (torch.float32, torch.int8, torch.int8), strict=True):
        assert store.get(prompt._register(DOCUMENTS[1])).tensors["k.0"].dtype == dtype


@pytest.mark.parametrize("kv_dtype", ["int8", None])
def test_an_entry_of_the_other_form_under_the_right_key_is_a_miss(kv_dtype, caplog):
    model = tiny("llama")
    segments = [DOCUMENTS[1], DOCUMENTS[0]]
    store = SegmentStore("memory://")
    prompt = prompt_of(model, store, kv_dtype=kv_dtype)
    good = logits_after(model, prompt.build(segments, QUERY, 0.2))
    other = prompt_of(model, store, kv_dtype=None if kv_dtype else "int8")
    store.put(prompt._register(DOCUMENTS[0]), store.get(added(other, DOCUMENTS[0])))
    with caplog.at_level(logging.WARNING):
        built = prompt.build(segments, QUERY, 0.2)
    assert [segment.hit for segment in built.account.segments] == [True, True, False] and len(caplog.records) == 1
    assert torch.equal(good, logits_after(model, built))


def added(prompt, ids):
    prompt.add(ids)
    return prompt._register(ids)


@pytest.mark.parametrize("fault", ["no scales", "scales of another shape", "scales in float64", "rows in uint8"])
def test_what_does_not_fit_is_called_corrupt(fault):
    entry = in_int8(pack([torch.randn(2, 9, 16)] * 2, [torch.randn(2, 9, 16)] * 2, 5))
    if fault == "no scales":
        del entry.tensors["s.0"]
    elif fault == "scales of another shape":
        entry.tensors["s.0"] = entry.tensors["s.0"][..., :1]
    elif fault == "scales in float64":
        entry.tensors["s.0"] = entry.tensors["s.0"].double()
    else:
        entry.tensors["k.0"] = entry.tensors["k.0"].view(torch.uint8)
    with pytest.raises(CorruptEntry):
        inspect(entry, [(2, 16, 16)] * 2, 9, 5, torch.float32, True)


def test_wrong_dtypes_are_refused_by_name():
    model = tiny("llama")
    for wrong in ("fp8", "int4", torch.float16):
        with pytest.raises(RedKnotError, match="kv_dtype="):
            prompt_of(model, "memory://", kv_dtype=wrong)


# ------------------------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize("kind", params(KINDS))
def test_a_hit_in_any_store_gives_the_bits_of_a_miss(kind, tmp_path, request):
    model = tiny("llama")
    segments = [DOCUMENTS[1], DOCUMENTS[0]]
    backend = make_backend(kind, tmp_path, request)
    with backend.open() as store:
        built = [prompt_of(model, store).build(segments, QUERY, 0.2) for _ in range(2)]
        assert [any(s.hit for s in each.account.segments) for each in built] == [False, True]
        assert all(segment.hit for segment in built[1].account.segments)
        assert torch.equal(*(logits_after(model, each) for each in built))


@pytest.mark.parametrize("where", ["rows", "scales"])
def test_damage_is_a_miss_with_one_warning(where, tmp_path, caplog):
    model = tiny("llama")
    segments = [DOCUMENTS[1], DOCUMENTS[0]]
    url = f"file://{tmp_path}"
    good = logits_after(model, prompt_of(model, url).build(segments, QUERY, 0.2))
    path = max((p for p in tmp_path.rglob("*.safetensors")), key=lambda p: p.stat().st_size)
    raw = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")  # of the tensors: scales come first, as they are wider
    raw[begin + 8 if where == "scales" else -8] ^= 1
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        built = prompt_of(model, url).build(segments, QUERY, 0.2)
    assert sum(segment.hit for segment in built.account.segments) == 2 and len(caplog.records) == 1
    assert torch.equal(good, logits_after(model, built))


def test_a_chain_promotes_them(tmp_path):
    model = tiny("llama")
    segments = [DOCUMENTS[1], DOCUMENTS[0]]
    url = f"file://{tmp_path}"
    good = logits_after(model, prompt_of(model, url).build(segments, QUERY, 0.2))
    chain = SegmentStore(["memory://", url])
    for tier in ("file", "memory"):
        built = prompt_of(model, chain).build(segments, QUERY, 0.2)
        assert {segment.tier for segment in built.account.segments} == {tier}
        assert torch.equal(good, logits_after(model, built))
