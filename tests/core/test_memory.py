"""Memory as the allocator has it: the ragged ideal rounded up to pages, constant for local heads, given back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from core_models import (
    FAMILIES,
    SINK,
    WINDOW,
    forward,
    generate,
    global_cache,
    mixed,
    mixed_cache,
    padded,
    tiny,
    tokens,
)

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import PoolExhausted
from redknot_hf.layer import Handle
from redknot_hf.paging.pool import PagePool

TOKEN_BYTES = 2 * 16 * 4  # K and V, 16 channels, fp32


@pytest.fixture
def llama():
    return tiny("llama")


def rounded(stored: int, page_size: int) -> int:
    return -(-stored // page_size) * page_size * TOKEN_BYTES


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_live_bytes_are_the_ragged_ideal_rounded_up_to_pages(name, page_size):
    model = tiny(name)
    lengths = [50, 23, 4]
    ids, mask = padded(lengths)
    cache = mixed_cache(model, page_size=page_size)
    profile = mixed(model.config)
    forward(model, ids, cache, mask)
    report = cache.memory_report()
    for layer in range(3):
        own = cache.layers[layer].model_window or 10**9
        for head in range(3):
            kept = []
            for length in lengths:
                if profile.head_class[layer][head] == "local" and profile.window[layer][head] < own:
                    room = profile.sink[layer][head] + profile.window[layer][head]
                else:
                    room = own
                kept.append(min(length, room))
            assert report.ideal_per_head[layer][head] == sum(kept) * TOKEN_BYTES
            assert report.live_per_head[layer][head] == sum(rounded(count, page_size) for count in kept)
    assert report.live == sum(map(sum, report.live_per_head)) + report.tables
    assert report.dense == 3 * 3 * 3 * 50 * TOKEN_BYTES
    assert report.allocated == sum(pool.allocated_bytes for pool in cache._pools.values()) + report.tables
    slabs = [slab for pool in cache._pools.values() for slab in (pool.k, pool.v)]
    assert report.allocated - report.tables == sum(slab.untyped_storage().nbytes() for slab in slabs)


def test_kv_bytes_of_the_profile_is_what_the_allocator_holds(llama):
    profile = mixed(llama.config)
    for length in (3, 11, 12, 40, 65):
        cache = RedKnotCache(llama.config, profile, page_size=16)
        forward(llama, tokens(length, 2), cache)
        report = cache.memory_report()
        assert report.live - report.tables == profile.kv_bytes(length, 2, torch.float32, 16)


def test_local_heads_do_not_grow_while_decoding(llama):
    cache = RedKnotCache(llama.config, HeadProfile.uniform(llama.config, SINK, WINDOW, {(0, 0)}), page_size=4)
    forward(llama, tokens(30), cache)
    first = cache.memory_report()
    for step in range(60):
        forward(llama, tokens(1, seed=step), cache)
    last = cache.memory_report()
    for layer in range(3):
        for head in range(3):
            if (layer, head) != (0, 0):
                assert last.live_per_head[layer][head] == first.live_per_head[layer][head]
    assert last.live_per_head[0][0] == rounded(90, 4)
    assert last.allocated - last.tables < 2 * (last.live - last.tables) + 16 * 4 * TOKEN_BYTES


def test_freed_pages_are_used_again(llama):
    """Many prompts one after the other in forks of one cache: the slabs stop growing after the first."""
    root = mixed_cache(llama, page_size=4)
    forward(llama, tokens(10), root)
    sizes = []
    for turn in range(12):
        fork = root.fork()
        forward(llama, tokens(60, seed=turn), fork)
        sizes.append(fork.memory_report().allocated - fork.memory_report().tables)
        fork.reset()
    assert len(set(sizes[2:])) == 1, sizes


def test_growing_holds_one_layers_slab_twice_and_not_the_whole_cache(llama, monkeypatch):
    slabs, peak = [], 0
    make = PagePool._slab

    def slab(pool, *args):
        nonlocal peak
        new = make(pool, *args)
        slabs.append(weakref.ref(new.untyped_storage()))
        peak = max(peak, sum(storage.nbytes() for ref in slabs if (storage := ref()) is not None))
        return new

    monkeypatch.setattr(PagePool, "_slab", slab)
    cache = mixed_cache(llama, page_size=4)
    for seed in range(4):
        forward(llama, tokens(60, seed=seed), cache)
    report = cache.memory_report()
    sizes = [slab.untyped_storage().nbytes() for pool in cache._pools.values() for slab in (pool.k, pool.v)]
    assert len(sizes) == 6 and sum(sizes) == report.allocated - report.tables
    assert sum(sizes) < peak <= sum(sizes) + max(sizes)


def test_a_crop_gives_pages_back(llama):
    cache = global_cache(llama, page_size=4)
    forward(llama, tokens(40), cache)
    before = cache.memory_report().live
    cache.crop(-20)
    after = cache.memory_report()
    assert after.live < before and after.ideal == 9 * 20 * TOKEN_BYTES


def test_dropped_caches_return_their_pages_to_the_pool(llama):
    root = mixed_cache(llama, page_size=4)
    forward(llama, tokens(40), root)
    pools = list(root._pools.values())
    free = [pool.num_free for pool in pools]
    for seed in range(5):
        fork = root.fork()
        fork.batch_repeat_interleave(3)
        forward(llama, tokens(9, 3, seed=seed), fork)
        del fork
    gc.collect()
    live = sum(int((layer.pages.table > 0).sum()) for layer in root.paged_layers)
    assert sum(pool.num_pages - 1 - pool.num_free for pool in pools) == live
    assert all(pool.num_free >= before for pool, before in zip(pools, free, strict=True))


def test_staged_prompts_are_not_kept_alive(llama):
    """The key tensor carries a handle that holds it: once stored, that cycle must be broken without the collector."""
    gc.collect()
    gc.disable()
    try:
        cache = mixed_cache(llama)
        forward(llama, tokens(40), cache)
        handles = [thing for thing in gc.get_objects() if type(thing) is Handle and thing.layer.cache is cache]
        assert len(handles) <= 1  # the last layer's, for the check at the next forward
        assert all(handle.k is None and handle.v is None for handle in handles)
        assert all(layer.pending is None for layer in cache.paged_layers)
    finally:
        gc.enable()


def test_a_cache_frees_its_slabs_without_the_collector(llama):
    cache = mixed_cache(llama)
    generate(llama, cache, tokens(40))
    slabs = [weakref.ref(pool.k) for pool in cache._pools.values()]
    gc.collect()
    gc.disable()
    try:
        cache.reset()
        assert all(slab() is None for slab in slabs)
    finally:
        gc.enable()


@pytest.mark.parametrize("limit", [None, 100])
def test_a_cache_that_ran_out_of_memory_frees_its_slabs_without_the_collector(llama, limit, monkeypatch):
    """Who catches the error and tries a smaller batch must find the memory free."""
    slabs = []
    make = PagePool._slab

    def slab(pool, *args):
        if len(slabs) == 4:
            raise torch.OutOfMemoryError("no more")
        slabs.append(weakref.ref(new := make(pool, *args)))
        return new

    monkeypatch.setattr(PagePool, "_slab", slab)
    gc.collect()
    gc.disable()
    try:
        cache = mixed_cache(llama, max_cache_len=limit)
        with pytest.raises((PoolExhausted, torch.OutOfMemoryError)):
            forward(llama, tokens(40), cache)
        del cache
        assert len(slabs) == 4 and all(ref() is None for ref in slabs)
    finally:
        gc.enable()


def test_beams_share_the_prompt(llama):
    """Four beams of a long prompt hold little more than one."""
    ids = tokens(200)
    one, four = global_cache(llama, page_size=4), global_cache(llama, page_size=4)
    forward(llama, ids, one)
    forward(llama, ids, four)
    four.batch_repeat_interleave(4)
    generate(llama, four, torch.cat([ids, ids[:, :1]], 1), num_beams=4)
    alone, shared = one.memory_report(), four.memory_report()
    assert shared.live - shared.tables < 1.5 * (alone.live - alone.tables)
    held = sum(len(np.unique(layer.pages.table[layer.pages.table > 0])) for layer in four.paged_layers)
    assert held * 4 * TOKEN_BYTES == shared.live - shared.tables
