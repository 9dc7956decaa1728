"""generate() on a GPU: the kernels against the CPU's torch path and against sdpa, eager and compiled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "static"))
from models import CONFIGS, assert_same, generate, mixed, model, prompt

from redknot_hf import HeadProfile, RedKnotCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(autouse=True)
def exact_float32() -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "chunked prefill": dict(prefill_chunk_size=7),
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CONFIGS)
def test_gpu_equals_cpu(family: str, mode: str, rows: int) -> None:
    if mode == "prompt lookup" and rows > 1:
        pytest.skip("assisted decoding takes one row")
    tiny = model(family)
    ids, mask = prompt(rows)
    want = generate(tiny, RedKnotCache(tiny.config, mixed(tiny.config), page_size=16), ids, mask, **MODES[mode])
    on_gpu = gpu_model(family)
    cache = RedKnotCache(on_gpu.config, mixed(on_gpu.config), page_size=16)
    got = generate(on_gpu, cache, ids.cuda(), mask.cuda(), disable_compile=True, **MODES[mode])
    assert torch.equal(want.sequences, got.sequences.cpu())
    worst = max((x - y.cpu()).abs().max().item() for x, y in zip(want.logits, got.logits, strict=True))
    assert worst < 2e-4, worst
    assert cache.paged_layers[0].kernel is not None, "the kernels must have run"


GPU: dict[str, Any] = {}


def gpu_model(family: str) -> Any:
    if family not in GPU:
        tiny = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="redknot").eval()
        tiny.load_state_dict(model(family).state_dict())
        GPU[family] = tiny.cuda()
    return GPU[family]


def bigger(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=997, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=8192, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="redknot", dtype=dtype).eval().cuda()


@pytest.mark.parametrize("length", [300, 3000])
def test_m0_bfloat16_within_the_spread_of_eager_and_sdpa(length: int) -> None:
    tiny = bigger(torch.bfloat16)
    ids = torch.randint(2, 997, (2, length), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    logits = {}
    for name in ("eager", "sdpa", "redknot"):
        tiny.set_attn_implementation(name)
        cache = (
            DynamicCache(config=tiny.config)
            if name != "redknot"
            else RedKnotCache(tiny.config, HeadProfile.all_global(tiny.config))
        )
        with torch.no_grad():
            tiny(ids[:, :-8], past_key_values=cache)
            logits[name] = torch.cat(
                [tiny(t, past_key_values=cache).logits for t in ids[:, -8:].split(1, 1)], 1
            ).float()
    spread = (logits["eager"] - logits["sdpa"]).abs().max()
    ours = (logits["redknot"] - logits["eager"]).abs().max()
    assert ours <= 2 * spread + 1e-3, (ours, spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    tiny = bigger(dtype)
    profile = HeadProfile.uniform(tiny.config, sink=4, window=64, global_heads={(0, 0), (2, 1)})
    ids, mask = prompt(2, 200, device="cuda")
    want = generate(tiny, RedKnotCache(tiny.config, profile), ids, mask, max_new_tokens=40)
    static = RedKnotCache(tiny.config, profile, max_cache_len=512)
    got = generate(tiny, static, ids, mask, max_new_tokens=40)
    if dtype == torch.float32:
        assert_same(want, got, 2e-4)
    else:
        # compiled code fuses and so rounds bf16 elsewhere: compare the logits of the tokens both chose
        first = [(x - y).abs().max().item() for x, y in zip(want.logits[:4], got.logits[:4], strict=True)]
        assert max(first) < 0.1, first
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1, "generate() must have compiled the decode step"
    static.reset()
    again = generate(tiny, static, ids, mask, max_new_tokens=200)
    assert torch.equal(again.sequences[:, :240], got.sequences)
    assert counters["stats"]["unique_graphs"] == graphs, "no recompilation over 200 steps and a second prompt"
    torch._dynamo.reset()


@pytest.mark.parametrize("static", [False, True])
def test_no_host_synchronisation_in_a_decode_step(static: bool) -> None:
    tiny = bigger(torch.bfloat16)
    profile = HeadProfile.uniform(tiny.config, sink=4, window=64, global_heads={(0, 0)})
    cache = RedKnotCache(tiny.config, profile, max_cache_len=1024 if static else None)
    ids, _ = prompt(2, 200, device="cuda")
    token, position = ids[:, :1], torch.full((2, 1), 200, device="cuda")
    with torch.no_grad():
        tiny(ids, past_key_values=cache)
        for i in range(3):  # compiles the kernels
            tiny(token, past_key_values=cache, position_ids=position + i)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(8):
                tiny(token, past_key_values=cache, position_ids=position + 3 + i)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
def test_repeated_launches_give_what_the_operators_give(rows: int, dtype: torch.dtype) -> None:
    """Over many pages, with a fork that shares them for a while, and with steps on a stream of their own."""
    tiny = bigger(dtype)
    profile = HeadProfile.uniform(tiny.config, sink=4, window=64, global_heads={(0, 0), (2, 1)})
    ids, mask = prompt(rows, 200, device="cuda")
    runs: list[list[torch.Tensor]] = []
    for repeat in (True, False):
        cache = RedKnotCache(tiny.config, profile, page_size=16)
        logits, other, repeated = [], torch.cuda.Stream(), 0
        with torch.no_grad():
            tiny(ids, attention_mask=mask, past_key_values=cache)
            for step in range(60):
                if not repeat:
                    for layer in cache.paged_layers:
                        layer.kernel.replays = False
                stream = other if 20 <= step < 30 else torch.cuda.current_stream()
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    got = tiny(ids[:, step : step + 1], past_key_values=cache, position_ids=mask.sum(1)[:, None] + step)
                torch.cuda.synchronize()
                logits.append(got.logits)
                repeated += all(layer.kernel.replay is not None for layer in cache.paged_layers)
                if step == 40:
                    fork = cache.fork()
        runs.append(logits)
        assert repeated > 40 if repeat else repeated == 0, repeated
        assert fork.get_seq_length() == 241
    for one, same in zip(*runs, strict=True):
        assert torch.equal(one, same)


def test_left_padded_batch_equals_single_rows() -> None:
    tiny = bigger(torch.float32)
    profile = HeadProfile.uniform(tiny.config, sink=4, window=64, global_heads={(0, 0), (2, 1)})
    ids, mask = prompt(3, 150, device="cuda")
    batch = generate(tiny, RedKnotCache(tiny.config, profile), ids, mask, disable_compile=True)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        single = generate(tiny, RedKnotCache(tiny.config, profile), alone, disable_compile=True)
        assert torch.equal(single.sequences[0, alone.shape[1] :], batch.sequences[row, ids.shape[1] :])
