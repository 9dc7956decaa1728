"""Prompts from stored segments: exact where they claim to be, labelled approximate where they are not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from splice_models import FAMILIES, config_of, tiny
from transformers import AutoModelForCausalLM, DynamicCache

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.errors import UnsupportedModel
from redknot_hf.segments.capture import capture
from redknot_hf.segments.entry import pack, unpack
from redknot_hf.segments.placing import Loader, Place
from redknot_hf.segments.prompt import SegmentedPrompt
from redknot_hf.segments.rows import attention_weights
from redknot_hf.segments.select import Blend, Boundary, KVDeviation, QueryAttention
from redknot_hf.segments.splice import Observer, SpliceCache
from redknot_hf.segments.stores import SegmentStore
from redknot_hf.segments.transfer import Upload

EXACT = 3e-5
_random = np.random.default_rng(3)
HEADER = _random.integers(2, 97, 5).tolist()
DOCUMENTS = [_random.integers(2, 97, n).tolist() for n in (30, 41, 1, 25)]
QUERY = _random.integers(2, 97, 7).tolist()


def profile_of(model, windowed: bool, kind: str = "local") -> HeadProfile:
    if not windowed:
        return HeadProfile.all_global(model.config)
    return HeadProfile.uniform(model.config, sink=2, window=12, global_heads=[(0, 1), (2, 0), (3, 1)])


def prompt_of(model, windowed=False, store="memory://", header=HEADER, **options) -> SegmentedPrompt:
    profile = options.pop("profile", None) or profile_of(model, windowed)
    return SegmentedPrompt(model, None, store, profile, header=header, page_size=16, **options)


def logits_after(model, built) -> torch.Tensor:
    with torch.no_grad():
        return model(
            built["input_ids"][:, -1:],
            past_key_values=built["past_key_values"].fork(),
            attention_mask=built["attention_mask"],
        ).logits[0, -1]


def full_logits(model, ids, profile, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=RedKnotCache(model.config, profile, **options)).logits[0, -1]


def deviation(model, built, profile, **options) -> float:
    full = full_logits(model, built["input_ids"], profile, **options)
    return float((full - logits_after(model, built)).abs().max())


def contents(cache) -> list[torch.Tensor]:
    return [half for layer in cache.layers for half in (layer.keys, layer.values)]


# ------------------------------------------------------------------------------------------------- exactness ladder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("header", [HEADER, []])
def test_m1_the_first_segment_is_exact_without_recompute(family, windowed, header):
    model = tiny(family)
    built = prompt_of(model, windowed, header=header).build([DOCUMENTS[1]], QUERY, recompute=0.0)
    assert deviation(model, built, profile_of(model, windowed)) < EXACT
    assert built.account.exact and built.account.recomputed == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("order", [[2, 1, 0, 3], [3, 3, 0], [0, 2, 2, 2]])
def test_m2_ratio_one_is_the_full_prefill(family, windowed, order):
    model = tiny(family)
    prompt = prompt_of(model, windowed)
    segments = [DOCUMENTS[i] for i in order]
    built = prompt.build(segments, QUERY, recompute=1.0)
    profile = profile_of(model, windowed)
    assert deviation(model, built, profile) < EXACT
    assert built.account.exact
    whole = RedKnotCache(model.config, profile, page_size=16)
    with torch.no_grad():
        model(built["input_ids"][:, :-1], past_key_values=whole)
    for a, b in zip(contents(whole), contents(built["past_key_values"]), strict=True):
        assert (a - b).abs().max() < EXACT
    assert whole.memory_report().live == built["past_key_values"].memory_report().live
    # without recomputation it is not, or this test shows nothing
    rough = prompt.build(segments, QUERY, recompute=0.0)
    assert deviation(model, rough, profile) > 100 * EXACT
    assert not rough.account.exact


def test_m2_against_dynamic_cache_and_with_full_prefill_mode():
    model = tiny("llama")
    segments = [DOCUMENTS[3], DOCUMENTS[0]]
    built = prompt_of(model).build(segments, QUERY, recompute=1.0)
    with torch.no_grad():
        dense = model(built["input_ids"], past_key_values=DynamicCache(config=model.config)).logits[0, -1]
    assert (dense - logits_after(model, built)).abs().max() < EXACT
    built = prompt_of(model, True, prefill="full").build(segments, QUERY, recompute=1.0)
    profile = profile_of(model, True)
    cache = RedKnotCache(model.config, profile, prefill="full")
    ids = built["input_ids"]
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        want = model(ids[:, -1:], past_key_values=cache, attention_mask=torch.ones_like(ids)).logits[0, -1]
    assert (want - logits_after(model, built)).abs().max() < EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", [1, 1000])
def test_m3_a_shifted_segment_is_what_the_model_computes_there(family, shift):
    model = tiny(family)
    prompt = prompt_of(model, header=[])
    ids = DOCUMENTS[1]
    ((_, entry),) = capture(model, prompt.new_cache, None, [ids])
    (rows,) = unpack([entry], Upload([entry], "cpu"))
    cache = SpliceCache(prompt.new_cache(), shift + len(ids) + 1)
    ((_, filler),) = capture(model, prompt.new_cache, None, [[3] * shift])
    places = [Place(0, unpack([filler], Upload([filler], "cpu"))[0]), Place(shift, rows)]
    loader = Loader(cache, places, prompt.relocator)
    for layer in cache.layers:  # every row, whatever a window would leave out
        layer.lazy_initialization(rows.key(layer.index)[None], rows.value(layer.index)[None])
        layer.window[:] = 1 << 30
    loader.finish()
    plain = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids]), position_ids=torch.arange(shift, shift + len(ids))[None], past_key_values=plain)
    for layer, want in zip(cache.layers, plain.layers, strict=True):
        got = layer.k[:, :, shift : shift + len(ids)]
        assert (got - want.keys).abs().max() < 1e-4 * want.keys.abs().max()
        assert (layer.v[:, :, shift : shift + len(ids)] - want.values).abs().max() < EXACT


def test_m8_memory_files_and_a_second_process_give_bitwise_the_same(tmp_path):
    model = tiny("qwen3")
    segments = [DOCUMENTS[i] for i in (1, 0, 3)]
    results = []
    for store in ("memory://", f"file://{tmp_path}"):
        prompt = prompt_of(model, True, store)
        built = prompt.build(segments, QUERY, recompute=0.2, selector="blend")
        again = prompt.build(segments, QUERY, recompute=0.2, selector="blend")
        assert [s.hit for s in built.account.segments] == [False] * 4
        assert [s.hit for s in again.account.segments] == [True] * 4
        results += [built, again]
    fresh = prompt_of(model, True, f"file://{tmp_path}").build(segments, QUERY, recompute=0.2, selector="blend")
    assert {s.tier for s in fresh.account.segments} == {"file"}
    for other in [*results[1:], fresh]:
        for a, b in zip(contents(results[0]["past_key_values"]), contents(other["past_key_values"]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("windowed", [False, True])
def test_edges_empty_query_one_token_no_header_no_segments(windowed):
    model = tiny("llama")
    profile = profile_of(model, windowed)
    for header in (HEADER, []):
        prompt = prompt_of(model, windowed, header=header)
        for segments, query in (
            ([DOCUMENTS[1], DOCUMENTS[0]], []),
            ([DOCUMENTS[1], DOCUMENTS[2]], []),
            ([DOCUMENTS[2]], []),
            ([DOCUMENTS[2], DOCUMENTS[2]], [5]),
            ([], [5, 6]),
            ([], [5]),
        ):
            built = prompt.build(segments, query, recompute=1.0)
            ids = built["input_ids"]
            assert built["past_key_values"].get_seq_length() == ids.shape[1] - 1
            assert deviation(model, built, profile) < EXACT
            loose = prompt.build(segments, query, recompute=0.0)
            assert loose["past_key_values"].get_seq_length() == ids.shape[1] - 1
            assert torch.isfinite(logits_after(model, loose)).all()
    with pytest.raises(RedKnotError, match="empty"):
        prompt_of(model, header=[]).build([], [])


def test_generate_takes_the_dict_literally():
    model = tiny("llama")
    prompt = prompt_of(model)
    built = prompt.build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, recompute=1.0)
    ids = built["input_ids"]
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**built, max_new_tokens=12, do_sample=False), want)


# ----------------------------------------------------------------------------------------------- capture, local heads


def test_batched_capture_equals_one_by_one():
    model = tiny("gemma3")
    prompt = prompt_of(model, True)
    ((_, head),) = capture(model, prompt.new_cache, None, [HEADER])
    (header,) = unpack([head], Upload([head], "cpu"))
    documents = [_random.integers(2, 97, n).tolist() for n in (28, 30, 31, 29, 60, 3)]
    batched = dict(capture(model, prompt.new_cache, header, documents, 4096))
    for i, document in enumerate(documents):
        ((_, single),) = capture(model, prompt.new_cache, header, [document])
        assert batched[i].num_tokens == len(document) and batched[i].start == len(HEADER)
        for name, tensor in single.tensors.items():
            assert (tensor - batched[i].tensors[name]).abs().max() < EXACT


def test_local_heads_get_only_rows_that_are_read():
    model = tiny("llama")
    documents = [_random.integers(2, 97, 200).tolist() for _ in range(4)]
    moved = {}
    for windowed in (False, True):
        built = prompt_of(model, windowed).build(documents, QUERY, recompute=0.02, selector="boundary")
        moved[windowed] = built.account.bytes_moved
    # 3 of 8 heads keep everything; the others need the sinks, three windows of boundary rows and the last one
    assert moved[True] < 0.6 * moved[False]


def test_dense_heads_are_never_reused():
    model = tiny("llama")
    classes = [["global", "local"], ["global", "dense"], ["local", "global"], ["local", "local"]]
    profile = HeadProfile(4, 2, classes, 2, 12)
    built = prompt_of(model, profile=profile).build([DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[3]], QUERY, 0.1, "boundary")
    assert built.account.early_layers == 2
    whole = RedKnotCache(model.config, profile, page_size=16)
    with torch.no_grad():
        model(built["input_ids"][:, :-1], past_key_values=whole)
    apart = [
        float((a.keys - b.keys).abs().max()) for a, b in zip(whole.layers, built["past_key_values"].layers, strict=True)
    ]
    documents = apart[:2]
    assert max(documents) < EXACT and apart[2] > 10 * EXACT


# ---------------------------------------------------------------------------------------------------------- selectors


@pytest.mark.parametrize("selector", ["boundary", "kv_deviation", "query_attention", "blend"])
@pytest.mark.parametrize("windowed", [False, True])
def test_selectors_take_what_the_ratio_pays_for(selector, windowed):
    model = tiny("qwen3")
    prompt = prompt_of(model, windowed)
    segments = [DOCUMENTS[i] for i in (0, 1, 3)]
    total = sum(map(len, segments))
    for ratio in (0.0, 0.1, 0.5, 1.0):
        account = prompt.build(segments, QUERY, ratio, selector).account
        eligible = total - len(segments[0])
        assert account.recomputed == min(int(np.ceil(ratio * total)), eligible)
        assert account.recomputed == sum(s.recomputed for s in account.segments)
        assert (
            account.segments[0].recomputed == account.segments[1].recomputed == 0
        )  # header and first segment are exact
        assert account.exact == (ratio == 1.0)
        assert account.reused + account.recomputed == total + len(HEADER)


def test_boundary_takes_first_tokens_evenly():
    model = tiny("llama")
    seen = {}

    def spy(view):
        seen["offsets"], seen["eligible"] = view.offsets(), view.eligible
        return Boundary()(view)

    built = prompt_of(model).build([DOCUMENTS[i] for i in (0, 1, 3, 1)], QUERY, 0.2, spy)
    counts = [s.recomputed for s in built.account.segments[2:]]
    assert max(counts) - min(counts) <= 1 and sum(counts) == int(np.ceil(0.2 * (30 + 41 + 25 + 41)))
    assert seen["eligible"][0] == len(HEADER) + 30 and seen["offsets"][seen["eligible"][0]] == 0


@pytest.mark.parametrize("form", ["scores", "mask", "positions", "tensor"])
def test_a_callable_may_answer_in_any_form(form):
    model = tiny("llama")
    target = np.array([40, 41, 50])

    def selector(view):
        scores = np.zeros(view.length)
        scores[target] = [1, 3, 2]
        return {
            "scores": scores,
            "mask": scores > 0,
            "positions": np.array([41, 50, 40]),
            "tensor": torch.from_numpy(scores),
        }[form]

    built = prompt_of(model).build([DOCUMENTS[0], DOCUMENTS[1]], QUERY, 3 / 71, selector)
    assert [s.recomputed for s in built.account.segments] == [0, 0, 3]
    assert built.account.selector == "selector"


def test_what_a_selector_measures_is_right():
    model = tiny("llama")
    seen = {}

    def spy(view):
        seen["attention"] = view.query_attention()
        seen["deviation"] = view.kv_deviation(1)
        seen["layers"] = [(layer.k.clone(), layer.v.clone()) for layer in view.cache.layers[:2]]
        seen["view"] = view
        return np.zeros(view.length)

    prompt = prompt_of(model)
    built = prompt.build([DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]], QUERY, 0.1, spy)
    assert seen["attention"].sum() == pytest.approx(1.0, abs=1e-5)
    exact = len(HEADER) + 30
    assert (seen["deviation"][:exact] == 0).all() and (seen["deviation"][exact:-7] > 0).all()
    assert built.account.early_layers == 2
    whole = DynamicCache(config=model.config)
    with torch.no_grad():
        model(built["input_ids"], past_key_values=whole)
    end = built["input_ids"].shape[1] - 7
    for (k, v), want in zip(seen["layers"], whole.layers, strict=False):
        assert (k[:, :, :end] - want.keys[:, :, :end]).abs().max() < EXACT
        assert (v[:, :, :end] - want.values[:, :, :end]).abs().max() < EXACT


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0, float("inf")])
def test_powers_of_the_attention_are_averaged_or_the_largest_is_taken(power):
    class Look(Observer):
        def __init__(self, length):
            self.length, self.weights = length, []

        def queries(self, layer, rows, q, spec):
            keys = layer.k[:, :, : self.length]
            self.weights.append(attention_weights(q, rows, keys, layer.sink, layer.window, spec)[0])

    def spy(view):
        look = Look(view.length)
        view.run(view.query, look)
        for share, layers in ((1.0, 4), (0.5, 2)):
            weights = torch.stack(look.weights[:layers]).flatten(0, 3).double()  # [layers * heads * query, N]
            want = weights.amax(0) if power == float("inf") else weights.pow(power).mean(0)
            got = view.query_attention(share, power)
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-9)
        return np.zeros(view.length)

    model = tiny("llama")
    assert len(model.model.layers) == 4
    prompt_of(model).build([DOCUMENTS[0], DOCUMENTS[1]], QUERY, 0.2, spy)


def test_a_share_of_the_layers_is_measured_without_running_the_others():
    model = tiny("llama")
    ran, seen = [], {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
        for index, layer in enumerate(model.model.layers)
    ]

    def spy(view):
        seen[0.5] = view.query_attention(0.5)
        seen["ran"] = list(ran)
        seen[1.0] = view.query_attention()
        seen["again"] = view.query_attention(0.5)
        return -view.offsets().astype(float)

    documents = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]]
    prompt_of(model).add_many(documents)
    prompt = prompt_of(model)
    prompt.add_many(documents)
    ran.clear()
    built = prompt.build(documents, QUERY, 0.2, spy)
    assert seen["ran"] == [0, 1]
    assert seen["again"] is seen[0.5]
    assert seen[0.5].sum() == pytest.approx(1.0, abs=1e-5)
    assert np.abs(seen[0.5] - seen[1.0]).max() > 1e-4
    for hook in hooks:
        hook.remove()
    # what the interrupted forward has left behind changes nothing
    plain = prompt.build(documents, QUERY, 0.2, "boundary")
    assert (logits_after(model, built) - logits_after(model, plain)).abs().max() < EXACT


def test_a_build_fills_the_pages_that_it_hands_over(monkeypatch):
    """No copy is made where heads keep everything; elsewhere there is one."""
    model = tiny("llama")
    handed = []
    monkeypatch.setattr(
        SpliceCache, "hand_over", lambda cache, tokens: handed.append([layer.in_place for layer in cache.layers])
    )
    for windowed in (False, True):
        prompt_of(model, windowed).build(DOCUMENTS, QUERY, 0.2)
    assert handed == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("query", [0, 1, 2, 7, 16, 17])
def test_pages_behind_the_prompt_are_given_back(query):
    """Pages hold 16 tokens; the last token of the prompt is not stored and may need a page of its own."""
    model = tiny("llama")
    query_ids = _random.integers(2, 97, query).tolist()
    documents = [_random.integers(2, 97, 16 - len(HEADER)).tolist(), DOCUMENTS[0][:16]]
    built = prompt_of(model).build(documents, query_ids, 1.0)
    profile = profile_of(model, False)
    plain = RedKnotCache(model.config, profile, page_size=16)
    with torch.no_grad():
        model(built["input_ids"][:, :-1], past_key_values=plain)
    mine, other = built["past_key_values"].memory_report(), plain.memory_report()
    assert mine.live - mine.tables == other.live - other.tables
    assert deviation(model, built, profile) < EXACT
    out = model.generate(**built, max_new_tokens=20, do_sample=False)
    want = model.generate(
        built["input_ids"], max_new_tokens=20, do_sample=False, past_key_values=DynamicCache(config=model.config)
    )
    assert torch.equal(out, want)


def test_early_layers_and_boundary_reduce_the_drift():
    """Not a law of nature for one prompt, but over several it must show."""
    model = tiny("llama")
    profile = profile_of(model, False)
    prompt = prompt_of(model)
    drift = {}
    for seed in range(6):
        random = np.random.default_rng(seed)
        segments = [random.integers(2, 97, 40).tolist() for _ in range(4)]
        for selector in ("none", KVDeviation(), QueryAttention(), Blend()):
            ratio, chosen = (0.0, "boundary") if selector == "none" else (0.4, selector)
            built = prompt.build(segments, QUERY, ratio, chosen)
            drift.setdefault(str(selector), []).append(deviation(model, built, profile))
    mean = {name: np.mean(values) for name, values in drift.items()}
    assert all(value < mean["none"] for name, value in mean.items() if name != "none"), mean


def test_a_schedule_recomputes_fewer_rows_in_later_layers():
    model = tiny("llama")
    prompt = prompt_of(model)
    segments = [DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[3]]
    profile = profile_of(model, False)
    built = prompt.build(segments, QUERY, [1.0, 1.0, 0.5, 0.25], "query_attention")
    assert not built.account.exact and "fewer rows" in built.account.reason
    whole = RedKnotCache(model.config, profile, page_size=16)
    with torch.no_grad():
        model(built["input_ids"][:, :-1], past_key_values=whole)
    apart = [
        (a.keys - b.keys).abs().amax((0, 1, 3))
        for a, b in zip(whole.layers, built["past_key_values"].layers, strict=True)
    ]
    stale = [int((x > EXACT).sum()) for x in apart]
    assert stale[:2] == [0, 0] and 0 < stale[2] < stale[3]
    with pytest.raises(RedKnotError, match="never grow"):
        prompt.build(segments, QUERY, [0.1, 0.2, 0.1, 0.1])


# -------------------------------------------------------------------------------------------------- faults, refusals


def test_a_damaged_entry_is_a_miss_with_one_warning(tmp_path, caplog):
    model = tiny("llama")
    segments = [DOCUMENTS[1], DOCUMENTS[0]]
    good = prompt_of(model, store=f"file://{tmp_path}").build(segments, QUERY, 0.2)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000)
    assert len(files) == 3
    raw = bytearray(files[0].read_bytes())
    raw[-100] ^= 1
    files[0].write_bytes(raw)
    files[1].write_bytes(files[1].read_bytes()[:900])
    with caplog.at_level(logging.WARNING):
        built = prompt_of(model, store=f"file://{tmp_path}").build(segments, QUERY, 0.2)
    assert sum(s.hit for s in built.account.segments) == 1
    assert len(caplog.records) == 2
    for a, b in zip(contents(good["past_key_values"]), contents(built["past_key_values"]), strict=True):
        assert torch.equal(a, b)


def test_a_damaged_entry_that_cannot_be_deleted_is_not_used_either(tmp_path, caplog, monkeypatch):
    """Its bytes are hashed while the prompt is built from them; the second attempt must not read it again."""
    from redknot_hf.segments.stores.local import LocalFileStore

    model = tiny("llama")
    segments = [DOCUMENTS[1], DOCUMENTS[0]]
    good = prompt_of(model, store=f"file://{tmp_path}").build(segments, QUERY, 0.2)
    for path in tmp_path.rglob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-100] ^= 1
        path.write_bytes(raw)

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(LocalFileStore, "_remove", refuse)
    monkeypatch.setattr(LocalFileStore, "_write", refuse)
    prompt = prompt_of(model, store=f"file://{tmp_path}")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            built = prompt.build(segments, QUERY, 0.2)
            assert [segment.tier for segment in built.account.segments] == ["computed"] * 3
            for a, b in zip(contents(good["past_key_values"]), contents(built["past_key_values"]), strict=True):
                assert torch.equal(a, b)
    assert len([r for r in caplog.records if "is damaged" in r.getMessage()]) == 3


@pytest.mark.parametrize("fault", ["heads", "dtype", "tokens", "start", "groups"])
def test_an_entry_of_another_shape_is_a_miss(fault, caplog):
    model = tiny("llama")
    prompt = prompt_of(model)
    good = prompt.build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, 0.2)
    key = prompt._key(DOCUMENTS[1], HEADER)
    n = 41
    shape = (3 if fault == "heads" else 2, n - (fault == "tokens"), 16)
    dtype = torch.float16 if fault == "dtype" else torch.float32
    entry = pack([torch.zeros(shape, dtype=dtype)] * 4, [torch.zeros(shape, dtype=dtype)] * 4, 5 - (fault == "start"))
    if fault == "groups":
        entry.extra["groups"] = [0, 0, 0, 7]
    prompt.store.put(key, entry)
    with caplog.at_level(logging.WARNING):
        built = prompt.build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, 0.2)
    assert [s.hit for s in built.account.segments] == [True, False, True]
    assert len(caplog.records) == 1
    for a, b in zip(contents(good["past_key_values"]), contents(built["past_key_values"]), strict=True):
        assert torch.equal(a, b)


def test_other_weights_headers_and_profiles_have_other_ids():
    model = tiny("llama")
    ids = {
        prompt_of(model).add(DOCUMENTS[0]),
        prompt_of(model, header=[4]).add(DOCUMENTS[0]),
        prompt_of(model, True).add(DOCUMENTS[0]),
        prompt_of(tiny("mistral-sliding")).add(DOCUMENTS[0]),
        prompt_of(model).add(DOCUMENTS[1]),
    }
    assert len(ids) == 5
    assert prompt_of(model, True, prefill="full").add(DOCUMENTS[0]) == prompt_of(model).add(DOCUMENTS[0])


def test_wrong_input_is_refused_by_name():
    model = tiny("llama")
    prompt = prompt_of(model)
    known = prompt.add(DOCUMENTS[0])
    assert prompt.build([known], QUERY).account.segments[1].id == known
    for call, word in (
        (lambda: prompt.build(["0" * 64], QUERY), "not added"),
        (lambda: prompt.build([known], QUERY, 1.5), "recompute"),
        (lambda: prompt.build([known], QUERY, 0.5, "oracle"), "selector"),
        (lambda: prompt.build([known, DOCUMENTS[1]], QUERY, 0.5, lambda view: np.zeros(3)), "selector returned"),
        (lambda: prompt.build([known, DOCUMENTS[1]], QUERY, 0.5, lambda view: np.array([10**6])), "position"),
        (lambda: prompt.build([known], ["two", "queries"]), "build_many"),
        (lambda: prompt.build(["a text"], QUERY), "tokenizer"),
        (lambda: prompt.add([]), "token_ids is empty"),
    ):
        with pytest.raises(RedKnotError, match=word):
            call()


def test_models_that_cannot_be_spliced_are_refused_by_name():
    config = config_of("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()
    with pytest.raises(UnsupportedModel, match="dynamic"):
        prompt_of(model)
    from transformers import GPT2Config, Lfm2Config

    gpt2 = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=256)
    model = AutoModelForCausalLM.from_config(gpt2, attn_implementation="redknot").eval()
    with pytest.raises(UnsupportedModel):
        prompt_of(model)
    hybrid = Lfm2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(hybrid, attn_implementation="redknot").eval()
    with pytest.raises(UnsupportedModel, match="plain attention"):
        SegmentedPrompt(model, None, "memory://", HeadProfile.all_global(hybrid))
    plain = AutoModelForCausalLM.from_config(config_of("llama"), attn_implementation="sdpa").eval()
    with pytest.raises(RedKnotError, match="attn_implementation"):
        prompt_of(plain)


def test_a_store_that_is_full_costs_nothing_but_the_work(caplog):
    model = tiny("llama")
    want = prompt_of(model).build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, 0.2)
    with caplog.at_level(logging.WARNING):
        small = prompt_of(model, store=SegmentStore("memory://", max_bytes=100))
        built = small.build([DOCUMENTS[1], DOCUMENTS[0]], QUERY, 0.2)
    assert len(caplog.records) == 1
    for a, b in zip(contents(want["past_key_values"]), contents(built["past_key_values"]), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------- a real model

TEXTS = [
    "Document: Lake Vostok\nLake Vostok is the largest of Antarctica's subglacial lakes. Its surface lies about 4,000 "
    "metres under the ice, and it was named after the Vostok research station.\n\n",
    "Document: Oskar Klein\nOskar Klein was a Swedish theoretical physicist. He is known for the idea that extra "
    "dimensions may be curled up and very small, and worked in Stockholm for most of his life.\n\n",
    "Document: The Golden Spike\nThe golden spike was driven by Leland Stanford at Promontory Summit in 1869, where "
    "the first transcontinental railroad of North America was joined.\n\n",
]
SAMPLES = [  # contexts: documents like those, and none of them
    "Document: Mount Erebus\nMount Erebus is the southernmost active volcano on Earth. It stands on Ross Island, and its "
    "crater holds a lake of lava that has been there for decades.\n\n",
    "Document: Lise Meitner\nLise Meitner was an Austrian and Swedish physicist. She explained nuclear fission with her "
    "nephew Otto Frisch, and worked in Berlin before she fled to Sweden.\n\n",
]
ASK = "Question: Where was the golden spike driven?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The golden spike was driven at Promontory Summit."


def along(model, ids, answer, cache) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, teacher-forced over a cache of all ids but the last."""
    with torch.no_grad():
        fed = torch.cat([ids[:, -1:], answer[:, :-1]], 1)
        return model(fed, past_key_values=cache).logits[0].log_softmax(-1)


def test_smollm2_same_text_at_ratio_one_and_small_drift_by_default(smollm2, monkeypatch):
    model, tokenizer = smollm2
    every = HeadProfile.all_global(model.config)
    header = "<|im_start|>user\nAnswer with a few words, using the documents.\n\n"
    prompt = SegmentedPrompt(model, tokenizer, "memory://", every, header=header)
    names = prompt.add_many(TEXTS)
    behind = SegmentedPrompt(model, tokenizer, "memory://", every, header=header, contexts=SAMPLES)
    assert behind.add_many(TEXTS) == names
    compact = SegmentedPrompt(model, tokenizer, "memory://", every, header=header, kv_dtype="int8")
    answer = torch.tensor([tokenizer(ANSWER)["input_ids"]])
    drift: dict[str, list[float]] = {}
    for order in ([2, 0, 1], [1, 2, 0], [0, 1, 2]):
        segments = [names[i] for i in order]
        full = prompt.build(segments, ASK, 1.0)
        ids = full["input_ids"]
        pieces = [tokenizer(t)["input_ids"] for t in (header, *(TEXTS[i] for i in order), ASK)]
        assert ids[0].tolist() == [i for piece in pieces for i in piece]
        plain = RedKnotCache(model.config, every)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=plain, logits_to_keep=1)
        p = along(model, ids, answer, plain)
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert torch.equal(model.generate(**full, max_new_tokens=16, do_sample=False), want)
        for name, maker, options in (
            ("naive", prompt, dict(recompute=0.0, relocate=False)),
            ("none", prompt, dict(recompute=0.0)),
            ("default", prompt, {}),
            ("none, contexts", behind, dict(recompute=0.0)),
            ("int8", compact, {}),
            ("squared", prompt, dict(selector=Blend(power=2))),
        ):
            built = maker.build([TEXTS[i] for i in order] if maker is compact else segments, ASK, **options)
            assert ("int8" in built.account.reason) == (maker is compact)
            if name == "default":
                own = built["past_key_values"].fork()
            q = along(model, ids, answer, built["past_key_values"])
            drift.setdefault(name, []).append(float((p.exp() * (p - q)).sum(-1).mean()))
    # a GPU lets the layers of the query's pass share their memory, and the prompt is the same
    monkeypatch.setattr("redknot_hf.segments.splice._copies_cheaply", lambda device: True)
    shared = prompt.build(segments, ASK)["past_key_values"]
    assert all(torch.equal(a, b) for a, b in zip(contents(shared), contents(own), strict=True))
    mean = {name: float(np.mean(values)) for name, values in drift.items()}
    assert mean["default"] < 0.05, mean
    assert mean["default"] < 0.4 * mean["none"], mean
    assert mean["none, contexts"] < 0.5 * mean["none"], mean
    assert abs(mean["int8"] - mean["default"]) < 0.1 * mean["default"], mean
    assert mean["squared"] < 0.4 * mean["none"], mean
