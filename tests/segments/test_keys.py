"""Keys: equal exactly when the KV may be exchanged."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from redknot_hf.errors import RedKnotError, UnsupportedModel
from redknot_hf.segments import keys as keys_module
from redknot_hf.segments.keys import SegmentKey, hash_fields, model_fingerprint
from redknot_hf.segments.rope import RopeSignature

BASE = dict(model="m", rope="r", header_ids=[1, 2], dtype="bfloat16", profile="p", token_ids=[3, 4, 5])


def tiny(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, **options})).eval()


def test_a_key_is_the_same_tomorrow_and_elsewhere():
    """A changed value here means: every entry in every store is lost."""
    assert SegmentKey.of(**BASE).hex == "b13de5db4f206bd7a4ac2927a2adcaedf952bb78391c9407d233516327cb44f0"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "x"}, {"rope": "x"}, {"header_ids": [1]}, {"header_ids": []}, {"header_ids": [2, 1]},
        {"dtype": torch.float32}, {"profile": ""}, {"token_ids": [3, 4]}, {"token_ids": [3, 4, 6]},
        {"token_ids": [5, 4, 3]},
        {"header_ids": [1], "token_ids": [2, 3, 4, 5]}, {"model": "mr", "rope": ""}, {"model": "", "rope": "mr"},
    ],
)  # fmt: skip
def test_every_field_counts(change):
    assert SegmentKey.of(**BASE).hex != SegmentKey.of(**{**BASE, **change}).hex


def test_equal_content_in_other_types_is_the_same_key():
    other = SegmentKey.of(
        **{**BASE, "dtype": torch.bfloat16, "token_ids": torch.tensor([[3, 4, 5]]), "header_ids": (1, 2)}
    )
    assert other == SegmentKey.of(**BASE) and other.hex == SegmentKey.of(**BASE).hex == str(other)
    signature = RopeSignature("{}")
    assert SegmentKey.of(**{**BASE, "rope": signature}).rope == signature.digest


def test_what_is_no_row_of_ids_is_refused():
    for bad in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), [2**63]):
        with pytest.raises(RedKnotError, match="token_ids"):
            SegmentKey.of(**{**BASE, "token_ids": bad})
    with pytest.raises(RedKnotError, match="empty"):
        SegmentKey.of(**{**BASE, "token_ids": []})


@given(st.lists(st.binary(max_size=6), max_size=5), st.lists(st.binary(max_size=6), max_size=5))
def test_no_two_field_lists_meet(a, b):
    assume(a != b)
    assert hash_fields("d", a) != hash_fields("d", b)
    assert hash_fields("d", a) != hash_fields("e", a)


def test_a_fingerprint_belongs_to_the_weights():
    assert model_fingerprint(tiny(0)) == model_fingerprint(tiny(0))
    assert model_fingerprint(tiny(0)) != model_fingerprint(tiny(1))
    assert model_fingerprint(tiny(0)) != model_fingerprint(tiny(0).to(torch.bfloat16))
    assert model_fingerprint(tiny(0)) != model_fingerprint(tiny(0, rms_norm_eps=1e-3)), "the config counts as well"


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_one_changed_number_is_seen(name):
    model = tiny()
    before = model_fingerprint(model)
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter.view(-1)[parameter.numel() // 2 + 1] += 1e-3
    assert model_fingerprint(model) != before


def test_exchanged_rows_are_seen():
    model = tiny()
    before = model_fingerprint(model)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[[3, 4]] = weight[[4, 3]]
    assert model_fingerprint(model) != before


def test_where_a_model_comes_from_and_how_it_runs_does_not_count():
    model, other = tiny(), tiny()
    other.config._name_or_path = "/somewhere/else"
    other.config.use_cache = False
    other.set_attn_implementation("eager")
    assert model_fingerprint(model) == model_fingerprint(other)


def test_it_is_computed_once_and_forgotten_with_the_model(monkeypatch):
    model = tiny()
    first = model_fingerprint(model)
    calls = []
    original = keys_module._sums
    monkeypatch.setattr(keys_module, "_sums", lambda *a: calls.append(a) or original(*a))
    assert model_fingerprint(model) == first and not calls
    assert model_fingerprint(model, refresh=True) == first and calls
    model.model.norm.weight.data.mul_(2)  # the one kind of change that only refresh sees
    assert model_fingerprint(model, refresh=True) != first
    alive = weakref.ref(model)
    del model
    calls.clear()
    gc.collect()
    assert alive() is None


def test_other_adapters_are_another_model():
    model = tiny()
    before = model_fingerprint(model)
    model.model.layers[0].self_attn.q_proj._active_adapter = ["b"]
    assert model_fingerprint(model) != before


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(UnsupportedModel, match="offloaded"):
        model_fingerprint(model)


@pytest.mark.gpu
def test_cpu_and_gpu_agree():
    assert model_fingerprint(tiny()) == model_fingerprint(tiny().cuda())
    assert RopeSignature.of(tiny()) == RopeSignature.of(tiny().cuda())
