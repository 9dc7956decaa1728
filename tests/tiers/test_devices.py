"""Cold tiers, frozen prefixes and offloading on the compute device: the same bodies on the CPU and on a GPU.

On a GPU pages are read by the kernels where they serve them, host memory is page-locked and copies run on streams of
their own. What a head sees must not depend on any of it.
"""

from __future__ import annotations

import copy
import pydoc_data.topics

import numpy as np
import pytest
import torch
from session_helpers import prompt, steps_on, tiny_model
from test_cold import all_kept, retrieval_profile

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.paging.frozen import FrozenPages
from redknot_hf.paging.tiers import _Tray
from redknot_hf.prefix import compress_prefix
from redknot_hf.sessions.sleep import SleepingPages

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
)
SAME = 3e-4  # float32 by the kernels against float32 by torch, in a model whose weights are six times the usual ones


@pytest.fixture(scope="module", params=["cpu", CUDA])
def model(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return tiny_model(head_dim=64).to(request.param)


def feed(model, cache, ids):
    with torch.no_grad():
        return model(ids.to(model.device), past_key_values=cache, use_cache=True).logits


def make(model, profile, rows=1, tokens=100, **options) -> RedKnotCache:
    cache = RedKnotCache(model.config, profile, page_size=16, **options)
    feed(model, cache, prompt(rows, tokens))
    return cache


def assert_same(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() <= SAME * max(1.0, float(two.abs().max()))
    assert torch.equal(one.argmax(-1), two.argmax(-1))


def on_gpu(model) -> bool:
    return model.device.type == "cuda"


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("rows", [1, 3])
def test_all_far_pages_are_a_global_head(model, kind, rows):
    profile = retrieval_profile(model.config)
    cold = make(model, profile, rows, 300, cold=kind, near_tokens=32)
    plain = make(model, all_kept(profile), rows, 300)
    archive = cold.layers[0].pages.archive.pool
    assert archive.k.device.type == "cpu" and archive.k.is_pinned() == (on_gpu(model) and kind == "cpu")
    assert cold.layers[0].pages.far.bounds.low.device.type == model.device.type
    assert (plain.layers[0].kernel is not None) == on_gpu(model)
    fork = cold.fork()
    assert_same(steps_on(model, cold, 20), steps_on(model, plain, 20))
    turn = prompt(rows, 90, seed=5)  # a chunk over cold pages
    assert_same(feed(model, cold, turn), feed(model, plain, turn))
    cold.crop(-50)
    plain.reset()
    feed(model, plain, torch.cat([prompt(rows, 300).to(model.device)], 1))
    assert_same(steps_on(model, fork, 20), steps_on(model, plain, 20))


def test_local_heads_get_back_what_left_their_windows(model):
    narrow, wide = (HeadProfile.uniform(model.config, sink=2, window=w) for w in (9, 130))
    cache = make(model, narrow, 2, 200, prefill="full", cold="cpu")
    other = make(model, wide, 2, 200, prefill="full")
    cache.set_profile(wide)
    assert_same(steps_on(model, cache, 30), steps_on(model, other, 30))


def test_the_same_pages_are_picked_as_on_the_cpu(model):
    """Some far pages of many, by their bounds: as many and, up to rounding, the same result."""
    twin = copy.deepcopy(model).to("cpu")
    found = []
    for one in (model, twin):
        cache = make(one, retrieval_profile(one.config), 1, 600, cold="cpu", retrieve=3, near_tokens=32)
        logits = feed(one, cache, torch.tensor([[5]]))
        found.append((logits.cpu(), [layer.pages.far.counts.late for layer in cache.layers]))
    assert found[0][1] == found[1][1] and found[0][1][2] >= 2 * 3
    assert_same(found[0][0], found[1][0])


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("retrieve", [3, 0.8])
def test_fetched_ahead_or_late_the_numbers_are_the_same(model, kind, retrieve):
    """Streams order what is fetched ahead, what is fetched late and what is read, however busy the device is."""
    profile = retrieval_profile(model.config)
    found, counts = [], []
    for budget in (None, 0, 5, 1000):
        options = dict(cold=kind, retrieve=retrieve, near_tokens=32, resident_pages=budget)
        cache = make(model, profile, 2, 900, **options)
        logits = []
        for step in range(24):
            if on_gpu(model) and step % 3 == 0:
                torch.cuda._sleep(5_000_000)
            logits.append(steps_on(model, cache, 1))
            if step == 10:
                cache.reorder_cache(torch.tensor([1, 0]))
            if step == 15:
                cache.crop(-6)
            if step == 20:
                cache.offload()
        found.append(torch.cat(logits, 1))
        counts.append(cache.memory_report().far)
    assert all(torch.equal(one, found[0]) for one in found[1:])
    assert counts[1].ahead == 0 < counts[0].ahead and counts[0].late < counts[1].late
    assert len({one.asked for one in counts}) == 1


@pytest.mark.parametrize("options", [{}, {"cold": "cpu", "near_tokens": 32}, {"cold": "cpu", "retrieve": 3}])
def test_offloaded_and_back_bit_by_bit(model, options):
    profile = retrieval_profile(model.config)
    cache = make(model, profile, 2, 2000, **options)
    twin = cache.fork()
    expected = steps_on(model, twin, 20)
    del twin  # it holds on to the pools that it shares
    held = torch.cuda.memory_allocated() if on_gpu(model) else 0
    pools = sum(pool.allocated_bytes for pool in cache._pools.values())
    moved = cache.offload()
    sleeper = cache.layers[0].pages
    assert isinstance(sleeper, SleepingPages) and sleeper.keys.device.type == "cpu"
    if on_gpu(model):
        assert sleeper.keys.is_pinned() and sleeper.values.is_pinned()
        torch.cuda.synchronize()
        assert held - torch.cuda.memory_allocated() >= 0.9 * pools
    assert cache.prefetch() == moved > 0
    assert (cache.layers[0].kernel is not None) == (on_gpu(model) and not options)
    assert torch.equal(steps_on(model, cache, 20), expected)


def test_tokens_of_a_tray_are_a_chunk():
    """Tokens that came one by one to the archive, each in one piece, read as the chunk that they are."""
    tokens = [torch.randn(2, 3, 1, 8) for _ in range(7)]
    with torch.inference_mode():  # the steps that follow may run in another mode
        tray = _Tray(9, tokens[0], tokens[0][..., :4], pinned=False)
    for place, token in enumerate(tokens):
        tray.k[place].copy_(token)
        tray.v[place].copy_(token[..., 4:])
        assert tray.k[place].is_contiguous() and tray.v[place].is_contiguous()
    k, v = tray.side_by_side(1, 6)
    assert torch.equal(k, torch.cat(tokens[1:], 2)[..., :8]) and torch.equal(v, torch.cat(tokens[1:], 2)[..., 4:])


@pytest.mark.parametrize("near", [32, 256])
def test_many_tokens_one_by_one_reach_the_archive(model, near):
    """More decode steps than are ever under way, chunks between them: what is read back is what was stored."""
    profile = retrieval_profile(model.config)
    cold = make(model, profile, 2, 20, cold="cpu", near_tokens=near)
    plain = make(model, all_kept(profile), 2, 20)
    text = prompt(2, 400, seed=1)
    fed = 0
    for width in [1] * 150 + [3] + [1] * 70 + [40] + [1] * 90:
        one, other = (feed(model, cache, text[:, fed : fed + width]) for cache in (cold, plain))
        assert (one - other).abs().max() <= SAME * other.abs().max()
        fed += width
    for layer, twin in zip(cold.layers, plain.layers, strict=True):
        if layer.pages.far is None:
            continue
        positions = np.broadcast_to(np.arange(20 + fed), (2, 20 + fed))
        mine = layer.pages.archive.gather(positions, layer.pages.far.rows_of_archive())
        for half, expected in zip(mine, twin.pages.gather(positions, layer.pages.far.heads), strict=True):
            assert (half - expected.cpu()).abs().max() <= SAME * expected.abs().max()


def test_copies_wait_for_the_work_before_them(model):
    """Offload, prefetch and go on at once, while the device is still busy: streams order it, no host waits."""
    cache = make(model, retrieval_profile(model.config), 2, 500)
    expected = steps_on(model, cache.fork(), 3)
    for _ in range(3):
        if on_gpu(model):
            torch.cuda._sleep(20_000_000)
        cache.offload()
        cache.prefetch()
    assert torch.equal(steps_on(model, cache, 3), expected)


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_children_of_a_frozen_prefix(model, kv_dtype):
    profile = HeadProfile.uniform(model.config, sink=2, window=40, global_heads=[(0, 0), (1, 1)])
    ids = prompt(1, 1000).to(model.device)
    cache = compress_prefix(model, ids, profile, page_size=16, kv_dtype=kv_dtype)
    assert all(isinstance(layer.pages, FrozenPages) for layer in cache.layers)
    if kv_dtype is not None:
        assert cache.memory_report().live < 0.3 * make(model, profile, 1, 1000).memory_report().live
    plain = cache.fork()
    plain.kv_dtype = None
    plain.set_profile(profile)  # in ordinary pages, the same numbers
    assert (plain.layers[0].kernel is not None) == on_gpu(model)
    children = [cache.fork() for _ in range(3)]
    assert (children[0].layers[0].kernel is not None) == (on_gpu(model) and kv_dtype is None)
    expected = steps_on(model, plain, 60)
    for child in children[:2]:
        assert_same(steps_on(model, child, 60), expected)
    sleeper = children[2]
    sleeper.offload()
    assert sleeper.memory_report().hot == 0
    assert_same(steps_on(model, sleeper, 60), expected)
    both = torch.cat([ids, prompt(1, 7, seed=3).to(model.device)], 1)
    one, two = (
        model.generate(both, past_key_values=c, max_new_tokens=8, do_sample=False, disable_compile=True)
        for c in (cache.fork(), make_plain(model, cache))
    )
    assert torch.equal(one, two)


def make_plain(model, cache):
    plain = cache.fork()
    plain.kv_dtype = None
    plain.set_profile(cache.profile)
    return plain


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_real_model_reads_far_pages_as_a_global_head(smollm2, device):
    """SmolLM2 on real text: all far pages give the global text, and some give one text however they come."""
    if device == "cuda":
        smollm2 = copy.deepcopy(smollm2[0]).to(device), smollm2[1]  # the fixture serves other tests on the CPU
    real, tokenizer = smollm2
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text[:6000], return_tensors="pt").input_ids[:, :600].to(device)
    layers, heads = real.config.num_hidden_layers, real.config.num_key_value_heads
    profile = HeadProfile(layers, heads, [["retrieval"] * heads] * layers, 0, 0)
    caches = [RedKnotCache(real.config, HeadProfile.all_global(real.config))]
    for options in ({}, {"retrieve": 8}, {"retrieve": 8, "resident_pages": 0}):
        caches.append(RedKnotCache(real.config, profile, cold="cpu", near_tokens=64, page_size=16, **options))
    texts = [real.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False) for cache in caches]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[2], texts[3])
