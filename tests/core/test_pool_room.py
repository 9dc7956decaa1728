"""Pools that begin with the room they need, counts of references, and page tables that go up when a kernel first reads them."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from core_models import assert_same, forward, generate, global_cache, mixed_cache, tiny, tokens

from redknot_hf import HeadProfile, kernel_path
from redknot_hf.errors import PoolExhausted
from redknot_hf.layer import Step
from redknot_hf.paging.pages import LayerPages
from redknot_hf.paging.pool import PagePool, PoolCeiling
from redknot_hf.paging.torch_attention import AttentionSpec

CPU = torch.device("cpu")
KINDS = {"global": global_cache, "mixed": mixed_cache}


@pytest.fixture
def llama():
    return tiny("llama")


def pool_of(**options) -> PagePool:
    return PagePool(4, 8, 8, torch.float32, CPU, **options)


def begin(cache) -> None:
    """What the first layer of a forward over 50 tokens does before anything is stored."""
    step = Step(0, 50, 1)
    step.resolve(None, np.zeros(1, np.int64))
    layer = cache.layers[0]
    layer.lazy_initialization(*[torch.zeros(1, 3, 50, 16)] * 2)
    layer._ready(step)


# ----------------------------------------------------------------------------------------------------------------- room


def test_room_is_free_and_counted_and_the_pool_still_grows():
    ceiling = PoolCeiling()
    pool = pool_of(ceiling=ceiling, room=9)
    assert (pool.num_pages, pool.num_free, pool.capacity) == (10, 9, None)
    assert ceiling.held == pool.allocated_bytes == 10 * pool.page_bytes
    assert sorted(pool.alloc(12).tolist()) == list(range(1, 13))
    ceiling.max_bytes = ceiling.held + 9 * pool.page_bytes
    with pytest.raises(PoolExhausted, match="max_bytes"):
        pool_of(ceiling=ceiling, room=9)
    pool_of(ceiling=ceiling, room=8)


@pytest.mark.parametrize("kind", KINDS)
def test_pools_of_a_prompt_are_made_in_the_size_that_growing_gave(llama, kind, monkeypatch):
    made: list[int] = []
    slab = PagePool._slab

    def counted(self, rows, *given):
        made.append(rows)
        return slab(self, rows, *given)

    monkeypatch.setattr(PagePool, "_slab", counted)
    cache = KINDS[kind](llama, page_size=4)
    forward(llama, tokens(50), cache)
    pools = list(cache._pools.values())
    assert len(pools) == len(cache.layers)
    assert len(made) == 2 * (len(pools) + 1), "the first layer's pool alone is there before its size is known"
    for layer, pool in zip(cache.layers, pools, strict=True):
        grown = pool_of()
        grown.reserve(LayerPages(grown, layer.sink, layer.window, 1).pages_wanted(np.array([50])))
        assert pool.num_pages == grown.num_pages


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_that_cannot_be_made_leaves_none_behind(llama, kind, half, monkeypatch):
    """The third layer's, its keys or its values: no pool of later layers stays, and a smaller prompt is served."""
    cache = KINDS[kind](llama, page_size=4)
    slab, made, slabs = PagePool._slab, [], []

    def short(self, rows, *given):
        made.append(rows)
        if len(made) == 4 + 2 + half + 1:  # two for the first layer and two that it grows into; two of the second
            raise torch.OutOfMemoryError(f"Tried to allocate {rows}")
        found = slab(self, rows, *given)
        slabs.append(weakref.ref(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "_slab", short)
        with pytest.raises(
            PoolExhausted, match=r"no memory on cpu to grow the page pool from 1 to \d+ pages"
        ) as caught:
            begin(cache)
    assert f"from 1 to {made[-1]} pages" in str(caught.value) and "fewer global heads" in str(caught.value)
    first = cache.layers[0].pages.pool
    assert [pool is first for pool in cache._pools.values()] == [True]
    assert not any(ref() is not None for ref in slabs[4:])
    assert cache.ceiling.held == first.allocated_bytes, "while the error is still at hand, too"
    begin(cache)  # the same forward again
    assert len(cache._pools) == len(cache.layers) and cache.layers[0].pages.pool is first
    cache.reset()
    assert_same(generate(llama, cache, tokens(20)), generate(llama, KINDS[kind](llama), tokens(20)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_ceiling_is_asked_for_all_of_them_before_one_is_made(llama, kind):
    whole = KINDS[kind](llama, page_size=4)
    forward(llama, tokens(50), whole)
    held = whole.ceiling.held
    for bound, fits in ((held, True), (held - 1, False)):
        cache = KINDS[kind](llama, page_size=4, max_bytes=bound)
        if fits:
            assert torch.equal(
                forward(llama, tokens(50), cache), forward(llama, tokens(50), KINDS[kind](llama, page_size=4))
            )
            assert cache.ceiling.held == held
            continue
        with pytest.raises(PoolExhausted, match="max_bytes"):
            begin(cache)
        first = cache.layers[0].pages.pool
        assert cache.ceiling.held == first.allocated_bytes == first.page_bytes
        cache.reset()
        forward(llama, tokens(20), cache)


def test_a_profile_that_is_edited_is_read_anew(llama):
    profile = HeadProfile.uniform(llama.config, sink=2, window=9)
    cache = mixed_cache(llama)
    cache.profile = profile
    heads = profile.num_kv_heads
    sink, window, _ = cache.geometry(0, heads, None)
    assert (sink == 2).all() and (window == 9).all()
    sink += 1
    window += 1  # the caller's own
    assert [x.tolist() for x in cache.geometry(0, heads, None)[:2]] == [[2] * heads, [9] * heads]
    profile.window[0][0], profile.head_class[0][1] = 5, "global"
    sink, window, _ = cache.geometry(0, heads, None)
    assert (sink[0], window[0], sink[1], window[1]) == (2, 5, 0, 1 << 30)


# ----------------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("room", [30, 5000])
def test_references_are_counted_one_by_one(room):
    generator = np.random.default_rng(2)
    pool = pool_of(room=room)
    pages = pool.alloc(25)
    want = {int(page): 1 for page in pages}
    for _ in range(50):
        some = generator.choice(np.append(pages, [0, 0]), int(generator.integers(0, 12))).astype(np.int32)
        pool.share(some.reshape(1, 1, -1))
        for page in some[some > 0].tolist():
            want[page] += 1
        assert all(pool.refs[page] == count for page, count in want.items())
        if generator.random() < 0.7:
            pool.release(some)
            for page in some[some > 0].tolist():
                want[page] -= 1
        assert all(pool.refs[page] == count for page, count in want.items())
    assert pool.refs[0] == 1 and pool.num_free == room - 25


def test_what_was_kept_behind_a_run_that_is_gone_is_anybodys():
    generator = np.random.default_rng(5)
    for _ in range(40):
        pool = pool_of(room=60)
        runs = [pool.alloc_runs(1, int(generator.integers(1, 5)), int(generator.integers(5, 9)))[0] for _ in range(6)]
        for run in generator.permutation(6)[:4]:
            gone = runs[run][int(generator.integers(0, len(runs[run]))) :]
            kept = pool._spare.copy()
            pool.release(gone)
            for page in gone + 1:
                while page < pool.num_pages and kept[page]:
                    kept[page], page = False, page + 1
            assert (pool._spare == kept).all()


# ---------------------------------------------------------------------------------------------------------- the kernels


@pytest.mark.parametrize("first", ["append", "decode", "prefill", "step_one"])
def test_tables_go_up_when_a_kernel_first_reads_them_and_after_every_change(first, monkeypatch):
    uploads: list[int] = []
    upload = kernel_path.upload
    monkeypatch.setattr(kernel_path, "upload", lambda *given: uploads.append(1) or upload(given[0].copy(), *given[1:]))
    torch.manual_seed(0)
    pool = PagePool(4, 16, 16, torch.float32, CPU)
    sink, window = np.array([0, 2]), np.array([1 << 30, 6])
    pages = LayerPages(pool, sink, window, 1, 0)
    layer = kernel_path.KernelLayer(pages)
    pages.prepare(np.array([3]))
    pages.prepare(np.array([30]))
    assert not uploads
    lengths = kernel_path.Lengths(torch.zeros(1, dtype=torch.int32), torch.full((1,), 20, dtype=torch.int32), None)
    k, v, q = (torch.randn(1, 2, 20, 16) for _ in range(3))
    spec = AttentionSpec(0.25)
    run = {
        "append": lambda layer: layer.append(k, v, lengths),
        "decode": lambda layer: layer.decode(q[:, :, -1:], spec, lengths),
        "prefill": lambda layer: layer.prefill(q, k, v, spec, lengths, 0, False),
        "step_one": lambda layer: layer.step_one(
            k[:, :, :1], v[:, :, :1], q[:, :, :1], 0.25, 0.0, None, 0,
            kernel_path.Lengths(lengths.before, lengths.before + 1, None),
        ),
    }[first]  # fmt: skip
    run(layer)
    assert len(uploads) == 5 and layer.order.tolist() == [0, 1] and layer.ring.tolist() == [1 << 30, 6]
    run(layer)
    assert len(uploads) == 5
    pages.prepare(np.array([60]))
    run(layer)
    assert len(uploads) == 9 and torch.equal(layer.table, torch.from_numpy(pages.table))


def test_the_static_form_has_its_tables_before_a_step_can_be_captured(llama):
    cache = global_cache(llama, max_cache_len=64, page_size=16)
    forward(llama, tokens(10), cache)
    for layer in cache.layers:
        assert layer.block_table is layer.kernel.table and layer.kernel.version == layer.pages.version
