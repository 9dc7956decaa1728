"""The static form (max_cache_len) against the growing form, token by token, eager and compiled, on the CPU."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from models import CONFIGS, assert_same, generate, mixed, model, prompt
from transformers import CompileConfig

from redknot_hf import RedKnotCache, RedKnotError


def caches(family: str, limit: int = 64, **options: Any) -> tuple[RedKnotCache, RedKnotCache]:
    config = model(family).config
    profile = mixed(config)
    growing = RedKnotCache(config, profile, page_size=16, **options)
    return growing, RedKnotCache(config, profile, page_size=16, max_cache_len=limit, **options)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=10),
    "beams": dict(num_beams=3),
    "chunked prefill": dict(prefill_chunk_size=7),
    "token by token": dict(prefill_chunk_size=1),
    "full prefill": {},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CONFIGS)
def test_static_equals_growing(family: str, mode: str) -> None:
    options = {"prefill": "full"} if mode == "full prefill" else {}
    for rows in (1, 3):
        ids, mask = prompt(rows)
        growing, static = caches(family, **options)
        assert static.is_compileable and not growing.is_compileable
        torch.manual_seed(1)
        want = generate(model(family), growing, ids, mask, **MODES[mode])
        torch.manual_seed(1)
        assert_same(want, generate(model(family), static, ids, mask, **MODES[mode]))
        assert int(static.get_seq_length()) == growing.get_seq_length()


def test_multi_turn_fork_and_reset() -> None:
    ids, _ = prompt()
    more = prompt(length=9, seed=5)[0]
    results = []
    for cache in caches("llama", limit=90):
        first = generate(model("llama"), cache, ids)
        turn = torch.cat([first.sequences, more], 1)
        fork = copy.deepcopy(cache)
        second = generate(model("llama"), cache, turn)
        forked = generate(model("llama"), fork, turn)
        cache.reset()
        results.append((first, second, forked, generate(model("llama"), cache, ids)))
    for want, got in zip(*results, strict=True):
        assert_same(want, got)
    assert torch.equal(results[1][1].sequences, results[1][2].sequences)
    assert torch.equal(results[1][0].sequences, results[1][3].sequences)


def test_crop_and_prompt_lookup() -> None:
    ids = prompt(length=12)[0].repeat(1, 3)
    growing, static = caches("llama", limit=96)
    want = generate(model("llama"), growing, ids, prompt_lookup_num_tokens=4)
    assert_same(want, generate(model("llama"), static, ids, prompt_lookup_num_tokens=4))


def test_local_heads_take_sink_and_window_only() -> None:
    _, static = caches("llama", limit=4096)
    generate(model("llama"), static, prompt()[0], max_new_tokens=2)
    config, profile = model("llama").config, mixed(model("llama").config)
    page_bytes = 16 * 16 * 2 * 4
    for layer in range(config.num_hidden_layers):
        for head in range(config.num_key_value_heads):
            slots = 4096 if profile.head_class[layer][head] == "global" else 3 + 8
            assert static.memory_report().live_per_head[layer][head] == -(-slots // 16) * page_bytes


@pytest.mark.parametrize("limit", [40, 41, 50, 53])
def test_capacity_is_checked_before_anything_is_stored(limit: int) -> None:
    ids, _ = prompt()
    _, static = caches("llama", limit=limit)
    if limit >= 53:  # 40 + 14 tokens, the last of which is never fed
        assert generate(model("llama"), static, ids).sequences.shape[1] == 54
        return
    with pytest.raises(RedKnotError, match=f"max_cache_len={limit}"):
        generate(model("llama"), static, ids)
    assert int(static.get_seq_length()) == limit
    with pytest.raises(RedKnotError, match="max_cache_len"):
        generate(model("llama"), RedKnotCache(model("llama").config, max_cache_len=39), ids)
    static.reset()
    growing, _ = caches("llama")
    short = ids[:, : limit - 13]
    assert_same(generate(model("llama"), growing, short), generate(model("llama"), static, short))


def test_other_implementation_and_other_batch_are_refused() -> None:
    ids, _ = prompt()
    tiny = model("llama")
    _, static = caches("llama")
    generate(tiny, static, ids, max_new_tokens=3)
    with pytest.raises(RedKnotError, match="row"):
        tiny(ids[:, :1].repeat(2, 1), past_key_values=static)
    tiny.set_attn_implementation("sdpa")
    try:
        with pytest.raises(RedKnotError, match="redknot"):
            tiny(ids[:, :1], past_key_values=static)
    finally:
        tiny.set_attn_implementation("redknot")


def compiled(backend: str) -> CompileConfig:
    config = CompileConfig(backend=backend, mode="default" if backend == "inductor" else None, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only unless told
    return config


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2", "gpt-oss"])
def test_compiled_decode_is_one_graph_and_equal(family: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    tiny = model(family)
    ids, _ = prompt()
    growing, static = caches(family, limit=256)
    want = generate(tiny, growing, ids)
    assert_same(want, generate(tiny, static, ids, compile_config=compiled("aot_eager")))
    assert counters["stats"]["unique_graphs"] == 1
    static.reset()  # a second prompt, a reset cache, another cache: the same graph
    assert_same(want, generate(tiny, static, ids, compile_config=compiled("aot_eager")))
    _, another = caches(family, limit=256)
    long = generate(tiny, another, ids, compile_config=compiled("aot_eager"), max_new_tokens=200)
    assert torch.equal(long.sequences[:, :54], want.sequences)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_compiled_padded_batch_and_sampling() -> None:
    torch._dynamo.reset()
    ids, mask = prompt(3)
    growing, static = caches("llama")
    options: dict[str, Any] = dict(do_sample=True, top_k=10)
    torch.manual_seed(1)
    want = generate(model("llama"), growing, ids, mask, **options)
    torch.manual_seed(1)
    assert_same(want, generate(model("llama"), static, ids, mask, compile_config=compiled("aot_eager"), **options))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    torch._dynamo.reset()
    ids, _ = prompt()
    growing, static = caches("llama")
    want = generate(model("llama"), growing, ids)
    assert_same(want, generate(model("llama"), static, ids, compile_config=compiled("inductor")))
    torch._dynamo.reset()


def test_real_model(smollm2: Any) -> None:
    language_model, tokenizer = smollm2
    language_model.set_attn_implementation("redknot")
    profile = mixed(language_model.config, window=32)
    inputs = tokenizer("The library of Alexandria was one of the largest libraries. " * 8, return_tensors="pt")
    growing = RedKnotCache(language_model.config, profile)
    static = RedKnotCache(language_model.config, profile, max_cache_len=256)
    want = generate(language_model, growing, **ids_of(inputs), max_new_tokens=24)
    got = generate(language_model, static, **ids_of(inputs), max_new_tokens=24)
    assert_same(want, got, tolerance=2e-3)


def ids_of(inputs: Any) -> dict[str, torch.Tensor]:
    return {"ids": inputs.input_ids, "mask": inputs.attention_mask}
