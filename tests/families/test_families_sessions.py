"""What happens to a cache between two turns changes no bit, for families of every kind, left-padded rows and local heads.

`test_generation` compares ways to generate; here a cache sleeps, is saved, forked, packed or cropped in the middle.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from dense_reference import dense_reference, full_cache
from family_check import PROMPT, SINK, TOLERANCE, WINDOW, difference, generate, inputs, mixed_profile
from tiny_families import tiny_model

from redknot_hf import HeadProfile, RedKnotCache

FAMILIES = [
    "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt_oss", "olmo2", "cohere2", "mixtral", "qwen3_moe", "glm4",
    "smollm3", "gpt_neox",
]  # fmt: skip
STEPS = 4


@functools.cache
def model_of(family: str) -> Any:
    model = tiny_model(family)
    model.set_attn_implementation("redknot")
    return model


def fed(model: Any, **options: Any) -> RedKnotCache:
    cache = RedKnotCache(model.config, mixed_profile(model.config), page_size=4, **options)
    with torch.no_grad():
        model(**inputs(), past_key_values=cache)
    return cache


def continued(model: Any, cache: RedKnotCache) -> torch.Tensor:
    """Logits ``[steps, rows, 1, vocab]`` of further tokens."""
    mask, outs = inputs()["attention_mask"], []
    for step in range(STEPS):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        with torch.no_grad():
            outs.append(model(torch.full((2, 1), 7 + step), attention_mask=mask, past_key_values=cache).logits)
    return torch.stack(outs)


@pytest.mark.parametrize("family", FAMILIES)
def test_sleep_files_forks_and_packing_change_no_bit(family, tmp_path):
    model = model_of(family)
    want = continued(model, fed(model))

    sleeper = fed(model)
    assert sleeper.offload() > 0
    saved = fed(model)
    saved.save(tmp_path / "s.safetensors", model=model)
    root = fed(model)
    fork = root.fork()
    packed = fed(model)
    packed.freeze()
    child = packed.fork()
    caches = {
        "offload": sleeper,
        "load": RedKnotCache.load(tmp_path / "s.safetensors", model),
        "fork": fork,
        "forked": root,
        "packed": child,
        "unpacked": packed,
    }
    wrong = {name for name, cache in caches.items() if not torch.equal(continued(model, cache), want)}
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_taken_back_were_never_there(family):
    model = model_of(family)
    cache = fed(model, rollback=STEPS)
    want = continued(model, cache)
    cache.crop(-STEPS)
    assert cache.get_seq_length() == PROMPT
    torch.testing.assert_close(continued(model, cache), want, atol=TOLERANCE * float(want.abs().max().clamp(1)), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["at once", "chunks", "static", "cold", "rollback"])
def test_all_heads_local_equals_the_dense_mask(family, form):
    """Every form of the cache against attention written out with the visibility rule, inside the model's own windows."""
    model = model_of(family)
    profile = HeadProfile.uniform(model.config, sink=SINK, window=WINDOW)
    options = {"static": {"max_cache_len": 40}, "cold": {"cold": "cpu"}, "rollback": {"rollback": 6}}.get(form, {})
    cache = RedKnotCache(model.config, profile, page_size=4, **options)
    how = {"chunks": {"prefill_chunk_size": 5}, "static": {"disable_compile": True}}.get(form, {})
    got = generate(model, cache, **how)
    with dense_reference(model, profile):
        want = generate(model, full_cache(model.config))
    assert difference(want, got) <= TOLERANCE
