"""The static form (`max_cache_len`): it can be saved and kept in a store, and says what it cannot do."""

from __future__ import annotations

import weakref

import pytest
import torch
from session_helpers import feed, make, prompt, steps

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import CacheError, RollbackExceeded
from redknot_hf.layer import RedKnotLayer
from redknot_hf.sessions import SessionStore
from redknot_hf.static import StaticRedKnotLayer


def assert_close(one: torch.Tensor, two: torch.Tensor) -> None:
    """Both forms compute the same with other operators."""
    assert (one - two).abs().max() <= 1e-5 * max(1.0, two.abs().max())
    assert torch.equal(one.argmax(-1), two.argmax(-1))


@pytest.mark.parametrize("decoded", [0, 1, 15])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_session_goes_on_in_the_growing_form(tiny, profile, tmp_path, rows, decoded):
    """Saved after compiled steps have counted on the device; bit by bit what a growing cache would have saved."""
    cache = make(tiny, profile, rows, 40, max_cache_len=200)
    assert type(cache.layers[0]) is StaticRedKnotLayer
    if decoded:
        steps(tiny, cache, decoded)
    size = cache.save(tmp_path / "a")
    loaded = RedKnotCache.load(tmp_path / "a", tiny)
    assert type(loaded.layers[0]) is RedKnotLayer and loaded.get_seq_length() == 40 + decoded
    for mine, theirs in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert size < loaded.memory_report().ideal + 8192  # live tokens, not the 200 that there is room for
    turn = prompt(rows, 9, seed=3)
    assert_close(feed(tiny, loaded, turn), feed(tiny, cache, turn))
    assert_close(steps(tiny, loaded, 60), steps(tiny, cache, 60))


def test_with_padding_rollback_and_a_crop(tiny, profile, tmp_path):
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :17], mask[1, :4] = 0, 0
    cache = make(tiny, profile, 3, 30, mask, max_cache_len=200, rollback=6)
    cache.crop(-4)
    cache.save(tmp_path / "a")
    loaded = RedKnotCache.load(tmp_path / "a", tiny)
    mask = mask[:, :26]
    for one in (cache, loaded):
        with pytest.raises(RollbackExceeded):
            one.crop(-4)
        one.crop(-2)
    mask = mask[:, :24]
    assert_close(steps(tiny, loaded, 20, mask), steps(tiny, cache, 20, mask))


def test_an_empty_one(tiny, profile, tmp_path):
    cache = RedKnotCache(tiny.config, profile, page_size=8, max_cache_len=64)
    cache.save(tmp_path / "a")
    ids = prompt(2, 20)
    assert_close(feed(tiny, RedKnotCache.load(tmp_path / "a", tiny), ids), feed(tiny, cache, ids))
    cache.reset()
    cache.save(tmp_path / "b")
    assert RedKnotCache.load(tmp_path / "b", tiny).get_seq_length() == 0


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda cache: cache.offload(), "memory is fixed: build the cache without max_cache_len to offload"),
        (lambda cache: cache.set_profile(HeadProfile.all_global(cache.config)), "page tables are fixed"),
        (lambda cache: cache.freeze(), "memory of the static form is fixed"),
    ],
)
def test_what_fixed_memory_cannot_do_is_said_and_changes_nothing(tiny, profile, use, words):
    cache, twin = (make(tiny, profile, 2, 40, max_cache_len=100) for _ in range(2))
    with pytest.raises(CacheError, match=words):
        use(cache)
    assert cache.profile is profile and cache.prefetch() == 0
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))


def test_a_store_writes_it_to_a_file_at_once(tiny, profile, tmp_path):
    """Its memory cannot be given back piece by piece, so it skips the host."""
    store = SessionStore(tiny, device_bytes=1, folder=tmp_path)
    cache, twin = (make(tiny, profile, 1, 40, max_cache_len=100) for _ in range(2))
    slab = weakref.ref(cache.layers[1].k_pages)
    store.put("a", cache)
    report = store.report()
    assert report.disk == ("a",) and report.device_bytes == 0 and slab() is None
    with pytest.raises(CacheError, match="has left memory"):
        feed(tiny, cache, prompt(1, 1))
    assert_close(steps(tiny, store.get("a")), steps(tiny, twin))
    without = SessionStore(tiny, device_bytes=1)
    with pytest.raises(CacheError, match="memory is fixed"):
        without.put("b", make(tiny, profile, 1, 40, max_cache_len=100))
    assert without.get("b").get_seq_length() == 40  # nothing was lost


def test_generate_goes_on_after_loading(tiny, profile, tmp_path):
    ids = prompt(2, 33)
    cache = RedKnotCache(tiny.config, profile, page_size=8, max_cache_len=80)
    first = tiny.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    cache.save(tmp_path / "a")
    options = {"attention_mask": torch.ones_like(first), "max_new_tokens": 6, "do_sample": False}
    loaded = RedKnotCache.load(tmp_path / "a", tiny)
    one, two = (tiny.generate(first, past_key_values=c, **options) for c in (loaded, cache))
    assert torch.equal(one, two)
