"""Reuse on a GPU: the same as on the CPU, whichever way the entries come."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.segments import sha256_kernel
from redknot_hf.segments.prompt import SegmentedPrompt
from redknot_hf.segments.stores import SegmentStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

_random = np.random.default_rng(3)
HEADER = _random.integers(2, 97, 5).tolist()
DOCUMENTS = [_random.integers(2, 97, n).tolist() for n in (130, 41, 1, 325)]
QUERY = _random.integers(2, 97, 7).tolist()
SEGMENTS = [DOCUMENTS[i] for i in (3, 0, 2, 0, 1)]


@pytest.fixture(scope="module")
def models():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(7)
    cpu = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval().float()
    gpu = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval().float()
    gpu.load_state_dict(cpu.state_dict())
    return cpu, gpu.cuda()


def profile_of(model, windowed):
    if not windowed:
        return HeadProfile.all_global(model.config)
    return HeadProfile.uniform(model.config, sink=2, window=40, global_heads=[(0, 1), (2, 0), (3, 1)])


def logits_of(model, built):
    ids = built["input_ids"]
    with torch.no_grad():
        return model(ids[:, -1:], past_key_values=built["past_key_values"]).logits[0, -1].float().cpu()


def store_of(kind, folder):
    if kind == "file":
        return SegmentStore(f"file://{folder}")
    return SegmentStore("memory://", device="cuda" if kind == "device" else "cpu", pin_memory=kind == "pinned")


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("kind", ["device", "host", "pinned", "file"])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("selector", ["boundary", "blend", "kv_deviation"])
def test_a_build_equals_the_one_on_the_cpu(models, tmp_path, kind, windowed, selector, kv_dtype):
    found = []
    for model, store in zip(models, (SegmentStore("memory://"), store_of(kind, tmp_path)), strict=True):
        prompt = SegmentedPrompt(model, None, store, profile_of(model, windowed), header=HEADER, kv_dtype=kv_dtype)
        for _ in range(2):  # the second time from the store
            built = prompt.build(SEGMENTS, QUERY, 0.3, selector)
        assert all(segment.hit for segment in built.account.segments)
        assert built.account.seconds["total"] > 0
        found.append(logits_of(model, built))
    assert (found[0] - found[1]).abs().max() < 2e-3 * found[0].abs().max()


@pytest.mark.parametrize("windowed", [False, True])
def test_ratio_one_is_the_full_prefill(models, windowed):
    model = models[1]
    profile = profile_of(model, windowed)
    prompt = SegmentedPrompt(model, None, "memory://", profile, header=HEADER)
    built = prompt.build(SEGMENTS, QUERY, 1.0)
    with torch.no_grad():
        full = model(built["input_ids"], past_key_values=RedKnotCache(model.config, profile)).logits[0, -1].cpu()
    assert built.account.exact
    assert (full - logits_of(model, built)).abs().max() < 2e-3 * full.abs().max()


@pytest.mark.parametrize("hashed_by", ["gpu", "threads"])
def test_a_damaged_file_is_found_while_the_gpu_works(models, tmp_path, caplog, monkeypatch, hashed_by):
    model = models[1]
    if hashed_by == "threads":
        monkeypatch.setattr(sha256_kernel, "ready", lambda device: False)
    else:
        end = time.monotonic() + 60
        while not sha256_kernel.ready(next(model.parameters()).device):
            assert time.monotonic() < end, "the hash kernel is not compiled"
            time.sleep(0.1)
    prompt = SegmentedPrompt(model, None, f"file://{tmp_path}", profile_of(model, False), header=HEADER)
    want = logits_of(model, prompt.build(SEGMENTS, QUERY, 0.3))
    victim = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[-100] ^= 64
    victim.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        built = prompt.build(SEGMENTS, QUERY, 0.3)
    assert [s.tier for s in built.account.segments].count("computed") == 1
    assert len([r for r in caplog.records if "damaged" in r.message]) == 1
    assert torch.equal(want, logits_of(model, built))
