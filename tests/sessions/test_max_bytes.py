"""`max_bytes`: page pools stay below a ceiling, and what is refused leaves the session as it was."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from session_helpers import feed, make, prompt, steps

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import CacheError, PoolExhausted
from redknot_hf.paging.pool import PagePool, PoolCeiling


def held(*caches) -> int:
    pools = {id(pool): pool for cache in caches for pool in cache._pools.values()}
    return sum(pool.allocated_bytes for pool in pools.values())


def profiles(config):
    return {
        "global": HeadProfile.all_global(config),
        "mixed": HeadProfile.uniform(config, sink=2, window=9, global_heads=[(0, 0), (1, 1)]),
    }


@pytest.mark.parametrize("kind", ["global", "mixed"])
@pytest.mark.parametrize("step", [1, 7])
def test_the_pools_stay_below_it_and_nothing_is_lost(tiny, kind, step):
    """Fed until it is refused: the session is there, bit by bit, and goes on when the ceiling is raised."""
    profile = profiles(tiny.config)[kind]
    limit = 2 * held(make(tiny, profile, 2, 40))
    cache, twin = (RedKnotCache(tiny.config, profile, page_size=8, max_bytes=bound) for bound in (limit, None))
    assert cache.max_bytes == limit and twin.max_bytes is None
    text = prompt(2, 2000)
    fed = 0
    with pytest.raises(PoolExhausted, match=rf"max_bytes={limit:,} of this cache.*cache\.max_bytes") as caught:
        while fed < 2000:
            assert torch.equal(*(feed(tiny, one, text[:, fed : fed + step]) for one in (cache, twin)))
            fed += step
            assert held(cache) <= limit
    assert "Nothing that is stored is lost" in str(caught.value)
    assert cache.get_seq_length() == fed >= 40 and held(cache) <= limit
    assert held(cache) >= 0.6 * limit, "it was refused long before the ceiling"
    fork = cache.fork()
    assert fork.max_bytes == limit
    del fork
    cache.max_bytes = None
    assert torch.equal(steps(tiny, cache, 20), steps(tiny, twin, 20))


@pytest.mark.parametrize("what", ["grow", "begin"])
def test_pools_that_grow_on_two_threads_do_not_count_on_the_same_room(monkeypatch, what):
    """Both have looked before either has taken anything: one gets the room, the other one is refused."""
    ceiling = PoolCeiling()
    make = lambda: PagePool(8, 16, 16, torch.float32, torch.device("cpu"), ceiling=ceiling)  # noqa: E731
    pools = [make(), make()]
    ceiling.max_bytes = ceiling.held + 30 * pools[0].page_bytes
    slab, waiting = PagePool._slab, threading.Event()

    def slow(self, *given):
        waiting.wait(0.3)  # long enough for the other thread to ask
        return slab(self, *given)

    monkeypatch.setattr(PagePool, "_slab", slow)
    refused: list[PoolExhausted] = []

    def run(pool: PagePool) -> None:
        try:
            if what == "grow":
                pool.reserve(20)
            else:
                pools.append(PagePool(8, 16, 16, torch.float32, torch.device("cpu"), 19, ceiling))
        except PoolExhausted as error:
            refused.append(error)

    threads = [threading.Thread(target=run, args=(pool,)) for pool in list(pools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1 and "max_bytes" in str(refused[0])
    assert ceiling.held == sum(pool.allocated_bytes for pool in pools) <= ceiling.max_bytes
    monkeypatch.setattr(PagePool, "_slab", slab)
    ceiling.max_bytes *= 3
    pools[0].reserve(25)
    pools[1].reserve(25)
    assert ceiling.held == sum(pool.allocated_bytes for pool in pools) <= ceiling.max_bytes


def test_a_growth_that_fails_gives_its_room_back(monkeypatch):
    ceiling = PoolCeiling()
    pool = PagePool(8, 16, 16, torch.float32, torch.device("cpu"), ceiling=ceiling)
    ceiling.max_bytes = 100 * pool.page_bytes

    def none(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "_slab", none)
        for _ in range(3):
            with pytest.raises(PoolExhausted, match="no memory on cpu"):
                pool.reserve(60)
            with pytest.raises(PoolExhausted, match="no memory on cpu"):
                PagePool(8, 16, 16, torch.float32, torch.device("cpu"), 60, ceiling)
    assert ceiling.held == pool.allocated_bytes
    pool.reserve(90)


def test_a_prompt_that_does_not_fit_leaves_its_past(tiny):
    profile = HeadProfile.all_global(tiny.config)
    cache = make(tiny, profile, 1, 40, max_bytes=2 * held(make(tiny, profile, 1, 40)))
    with pytest.raises(PoolExhausted, match="max_bytes"):
        feed(tiny, cache, prompt(1, 400))
    assert cache.get_seq_length() == 40
    assert torch.equal(steps(tiny, cache, 5), steps(tiny, make(tiny, profile, 1, 40), 5))


def test_forks_count_together_and_give_back(tiny):
    profile = HeadProfile.all_global(tiny.config)
    root = make(tiny, profile, 1, 64, max_bytes=3 * held(make(tiny, profile, 1, 64)))
    children, text = [root.fork() for _ in range(8)], prompt(1, 48, seed=4)
    with pytest.raises(PoolExhausted):
        for child in children:
            feed(tiny, child, text)
    assert held(root, *children) <= root.max_bytes
    served = [child.get_seq_length() == 112 for child in children]
    assert any(served) and not all(served)
    children = children[: sum(served)] + children[-1:]
    children[0].reset()  # its pages serve another one
    feed(tiny, children[-1], text)
    assert children[-1].get_seq_length() == 112
    expected = make(tiny, profile, 1, 64)
    feed(tiny, expected, text)
    assert torch.equal(steps(tiny, children[-1], 3), steps(tiny, expected, 3))


def test_moved_loaded_and_frozen_ones_are_below_it_too(tiny, tmp_path):
    profile = profiles(tiny.config)["mixed"]
    cache = make(tiny, profile, 2, 60)
    limit = cache.max_bytes = 4 * held(cache)
    twin = cache.fork()
    cache.offload()
    cache.prefetch()
    cache.freeze()
    cache.save(tmp_path / "s")
    loaded = RedKnotCache.load(tmp_path / "s", tiny)
    assert loaded.max_bytes is None  # a matter of the process, not of the session
    loaded.max_bytes = 100
    with pytest.raises(PoolExhausted, match="max_bytes=100"):
        steps(tiny, loaded, 40)
    for one in (cache, loaded):
        one.max_bytes = limit
    assert torch.equal(steps(tiny, cache, 10), steps(tiny, twin, 10)[:, :10])
    cache.offload()
    twin.reset()
    gc.collect()
    cache.max_bytes = 100
    with pytest.raises(PoolExhausted, match="max_bytes=100"):
        cache.prefetch()
    cache.max_bytes = limit
    assert cache.prefetch() > 0


def test_the_static_form(tiny):
    profile = HeadProfile.all_global(tiny.config)
    with pytest.raises(PoolExhausted, match="max_bytes=10,000 of this cache"):
        make(tiny, profile, 1, 40, max_cache_len=64, max_bytes=10_000)
    make(tiny, profile, 1, 40, max_cache_len=64, max_bytes=1 << 20)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "1GiB", True])
def test_bad_values(tiny, profile, bad):
    with pytest.raises(CacheError, match=r"max_bytes=.*expected a number of bytes"):
        RedKnotCache(tiny.config, profile, max_bytes=bad)
    cache = RedKnotCache(tiny.config, profile)
    with pytest.raises(CacheError, match=r"max_bytes=.*expected a number of bytes"):
        cache.max_bytes = bad
    assert cache.max_bytes is None
