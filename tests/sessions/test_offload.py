"""A cache that slept in host memory goes on bit by bit (M8), gives its pages back, and comes back when it is used."""

from __future__ import annotations

import pytest
import torch
from session_helpers import feed, make, prompt, steps
from test_save_load import hybrid_model

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import CacheError, PoolExhausted
from redknot_hf.paging.pages import LayerPages
from redknot_hf.sessions import sleep


@pytest.mark.parametrize("wake", ["prefetch", "use"])
@pytest.mark.parametrize("rows", [1, 3])
def test_goes_on_bit_by_bit(tiny, profile, rows, wake):
    cache = make(tiny, profile, rows, 50, rollback=3)
    twin = cache.fork()
    before = cache.memory_report()
    moved = cache.offload()
    assert moved == before.ideal == cache.memory_report().cold
    assert cache.memory_report().hot == 0
    if wake == "prefetch":
        assert cache.prefetch() == moved and cache.prefetch() == 0
        assert isinstance(cache.layers[0].pages, LayerPages)
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))
    assert cache.memory_report().cold == 0


def test_a_sleeping_cache_holds_no_pages(tiny, profile):
    cache = make(tiny, profile, 2, 200)
    assert cache.memory_report().allocated > 0 and cache._pools
    cache.offload()
    assert not cache._pools
    assert cache.memory_report().allocated == cache.memory_report().cold == cache.memory_report().ideal


@pytest.mark.parametrize(
    "use",
    [
        lambda model, cache: feed(model, cache, prompt(2, 9, seed=3)),
        lambda model, cache: cache.crop(-2),
        lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda model, cache: cache.batch_repeat_interleave(2),
        lambda model, cache: cache.batch_select_indices(torch.tensor([1])),
        lambda model, cache: cache.activate_past_recording(),
        lambda model, cache: cache.layers[1].keys,
        lambda model, cache: cache.fork(),
        lambda model, cache: cache.offload(),
        lambda model, cache: None,
    ],
)
def test_every_way_of_using_a_sleeping_cache(tiny, profile, use):
    cache, twin = (make(tiny, profile, 2, 40, rollback=4) for _ in range(2))
    cache.offload()
    one, two = use(tiny, cache), use(tiny, twin)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    if isinstance(one, RedKnotCache):
        assert torch.equal(steps(tiny, one), steps(tiny, two))
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))


def test_forks_keep_their_pages(tiny, profile):
    cache = make(tiny, profile, 2, 40)
    fork, twin = cache.fork(), make(tiny, profile, 2, 40)
    cache.offload()
    first = steps(tiny, fork)
    assert torch.equal(first, steps(tiny, twin))
    assert torch.equal(steps(tiny, cache), first)


def test_shared_rows_sleep_once_and_stay_shared(tiny, profile):
    cache = make(tiny, profile, 1, 200)
    alone = cache.memory_report()
    cache.batch_repeat_interleave(4)
    twin = cache.fork()
    assert cache.offload() == alone.ideal
    cache.prefetch()
    report = cache.memory_report()
    assert report.live - report.tables == alone.live - alone.tables
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))


def test_reset_and_delete_do_not_wake(tiny, profile, monkeypatch):
    cache, other = make(tiny, profile, 1, 40), make(tiny, profile, 1, 40)
    cache.offload(), other.offload()
    monkeypatch.setattr(sleep, "_wake", lambda *_: pytest.fail("woken"))
    cache.reset()
    assert cache.memory_report().live == 0
    del other
    monkeypatch.undo()
    ids = prompt(1, 20)
    assert torch.equal(feed(tiny, cache, ids), feed(tiny, RedKnotCache(tiny.config, profile, page_size=8), ids))


def test_a_sleeping_cache_is_saved_without_waking(tiny, profile, tmp_path, monkeypatch):
    cache = make(tiny, profile, 2, 40)
    cache.save(tmp_path / "awake")
    cache.offload()
    with monkeypatch.context() as patch:
        patch.setattr(sleep, "_wake", lambda *_: pytest.fail("woken"))
        cache.save(tmp_path / "asleep")
    assert (tmp_path / "awake").read_bytes() == (tmp_path / "asleep").read_bytes()


def test_the_layers_left_to_transformers_come_along():
    model = hybrid_model()
    cache = make(model, HeadProfile.uniform(model.config, sink=2, window=9), 2, 40)
    twin = cache.fork()
    cache.offload()
    assert torch.equal(steps(model, cache), steps(model, twin))


def test_the_host_has_no_memory(tiny, profile, monkeypatch):
    cache = make(tiny, profile, 2, 40)
    twin, before = cache.fork(), cache.memory_report()
    calls = []

    def fail_late(rows, dim, dtype, pinned):
        calls.append(rows)
        if len(calls) == 4:
            raise MemoryError
        return torch.empty(rows, dim, dtype=dtype)

    monkeypatch.setattr(sleep, "host_empty", fail_late)
    with pytest.raises(CacheError, match=r"host has no memory for .* tokens of layer 1.*cache\.save"):
        cache.offload()
    assert cache.memory_report() == before
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))


def test_the_device_has_no_memory_to_come_back(tiny, profile, monkeypatch):
    from redknot_hf.paging.pool import PagePool

    cache = make(tiny, profile, 2, 40)
    twin = make(tiny, profile, 2, 40)
    cache.offload()
    with monkeypatch.context() as patch:

        def full(self, count):
            raise PoolExhausted("no memory")

        patch.setattr(PagePool, "reserve", full)
        with pytest.raises(PoolExhausted):
            cache.prefetch()
        with pytest.raises(PoolExhausted):
            steps(tiny, cache, 1)
    assert cache.memory_report().cold > 0 and cache.get_seq_length() == 40
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))


def test_transformers_own_form_moves_one_layer(tiny, profile):
    cache, twin = make(tiny, profile, 2, 40), make(tiny, profile, 2, 40)
    assert cache.offload(0) > 0 and cache.offload(2) > 0
    asleep = [type(layer.pages).__name__ for layer in cache.layers]
    assert asleep == ["SleepingPages", "LayerPages", "SleepingPages"]
    assert cache.prefetch(1) > 0  # the next one that sleeps
    assert [type(layer.pages).__name__ for layer in cache.layers] == ["SleepingPages", "LayerPages", "LayerPages"]
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))
    assert cache.prefetch(1) == 0
