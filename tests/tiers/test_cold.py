"""A cold tier changes where tokens are, never what a head sees; and nothing is lost without a word."""

from __future__ import annotations

import errno
import os
import pydoc_data.topics
import weakref

import numpy as np
import pytest
import torch
from session_helpers import feed, make, prompt, steps, tiny_config, tiny_model

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.errors import CacheError, PoolExhausted
from redknot_hf.paging import resident
from redknot_hf.paging.bounds import PICKED, RUNNER_UP, pick_pages, rank_pages, upper_bounds
from redknot_hf.paging.pool import PagePool
from redknot_hf.paging.resident import ResidentPages
from redknot_hf.paging.tiers import TieredPages

KINDS = ["cpu", "disk"]


def assert_same(one: torch.Tensor, two: torch.Tensor) -> None:
    """Equal up to the order in which a matrix product adds: heads are grouped into other calls than without a tier."""
    assert one.shape == two.shape and (one - two).abs().max() <= 1e-6 * max(1.0, two.abs().max()) * 4
    assert torch.equal(one.argmax(-1), two.argmax(-1))


def retrieval_profile(config, near_local=True) -> HeadProfile:
    """Every class: layer 0 global + retrieval, layer 1 retrieval + local, layer 2 all retrieval."""
    classes = [["global", "retrieval"], ["retrieval", "local"], ["retrieval", "retrieval"]]
    return HeadProfile(3, 2, classes, 2, 9)


def all_kept(profile: HeadProfile) -> HeadProfile:
    """The same profile with global heads for retrieval heads."""
    classes = [["global" if kind == "retrieval" else kind for kind in row] for row in profile.head_class]
    return HeadProfile(3, 2, classes, 2, 9)


# ------------------------------------------------------------------------------------------- retrieval heads, exact
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retrieve", [None, 10_000, 1.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_all_far_pages_are_a_global_head(tiny, kind, retrieve, rows):
    profile = retrieval_profile(tiny.config)
    cold = make(tiny, profile, rows, 70, cold=kind, retrieve=retrieve, near_tokens=12)
    plain = make(tiny, all_kept(profile), rows, 70)
    assert isinstance(cold.layers[0].pages, TieredPages) and cold.memory_report().cold > 0
    assert_same(steps(tiny, cold, 30), steps(tiny, plain, 30))
    turn = prompt(rows, 33, seed=5)  # a chunk over cold pages
    assert_same(feed(tiny, cold, turn), feed(tiny, plain, turn))
    assert_same(steps(tiny, cold), steps(tiny, plain))


@pytest.mark.parametrize("near", [1, 5, 8, 16, 500])
def test_any_near_window(tiny, near):
    profile = retrieval_profile(tiny.config)
    cold = make(tiny, profile, 2, 50, cold="cpu", near_tokens=near)
    plain = make(tiny, all_kept(profile), 2, 50)
    assert_same(steps(tiny, cold, 20), steps(tiny, plain, 20))


def test_with_padding(tiny):
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[0, :31], mask[1, :4] = 0, 0
    profile = retrieval_profile(tiny.config)
    cold = make(tiny, profile, 3, 50, mask, cold="cpu", near_tokens=7)
    plain = make(tiny, all_kept(profile), 3, 50, mask)
    assert_same(steps(tiny, cold, 20, mask), steps(tiny, plain, 20, mask))


def test_the_device_holds_the_near_tokens_only(tiny):
    profile = HeadProfile(3, 2, [["retrieval"] * 2] * 3, 0, 0)
    cache = make(tiny, profile, 1, 400, cold="cpu", near_tokens=16)
    report = cache.memory_report()
    token = 16 * 2 * 4
    assert report.hot - report.tables == 3 * 2 * 16 * token  # 16 near tokens are exactly two pages of 8
    assert report.cold == 3 * 2 * 400 * token
    assert report.live == report.hot + report.cold


def test_masks_that_are_not_causal_see_everything(tiny):
    profile = retrieval_profile(tiny.config)
    ids = prompt(1, 40)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., :10, :10] = True  # a bidirectional prefix
    found = []
    for given, options in ((profile, {"cold": "cpu", "near_tokens": 5}), (all_kept(profile), {})):
        cache = RedKnotCache(tiny.config, given, page_size=8, **options)
        with torch.no_grad():
            found.append(tiny(ids, attention_mask=mask, past_key_values=cache).logits)
        found.append(steps(tiny, cache, 4))
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


def test_the_real_model_with_all_far_pages_gives_the_global_text(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The quick brown fox jumps over the lazy dog. " * 20, return_tensors="pt").input_ids
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    profile = HeadProfile(layers, heads, [["retrieval"] * heads] * layers, 0, 0)
    texts = []
    for cache in (
        RedKnotCache(model.config, profile, cold="cpu", near_tokens=64),
        RedKnotCache(model.config, HeadProfile.all_global(model.config)),
    ):
        texts.append(model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)


def test_the_real_model_finds_most_pages_on_the_device(smollm2):
    """Real text: what was read lately and what came close is what comes next; the text does not depend on it."""
    model, tokenizer = smollm2
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text[:6000], return_tensors="pt").input_ids[:, :700]
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    profile = HeadProfile(layers, heads, [["retrieval"] * heads] * layers, 0, 0)
    texts, counts = [], []
    for budget in (None, 0):
        options = dict(cold="cpu", retrieve=8, near_tokens=64, page_size=16, resident_pages=budget)
        cache = RedKnotCache(model.config, profile, **options)
        texts.append(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False))
        counts.append(cache.memory_report().far)
    assert torch.equal(*texts)
    ahead, latest = counts
    assert ahead.asked == latest.asked
    first = ahead.asked / 7  # the first step finds nothing
    assert ahead.late - first < 0.5 * (latest.late - first) and ahead.late - first < 0.15 * (ahead.asked - first)


# -------------------------------------------------------------------------------------------------- picking pages
def test_bounds_bound():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 5, 8, 16, generator=generator)
    q = torch.randn(2, 3, 16, generator=generator) * 3
    bounds = upper_bounds(q, keys.amin(2), keys.amax(2))
    scores = torch.einsum("hgd,hptd->hgpt", q, keys)
    assert (bounds + 1e-4 >= scores.amax(-1)).all()
    one = upper_bounds(q, keys[:, :, 0], keys[:, :, 0])  # a page of one key: the bound is its score
    assert torch.allclose(one, scores[..., 0], atol=1e-4)


def test_bounds_follow_the_pages(tiny):
    """A full page's bounds are those of its tokens after appends, forks, selections, crops and overwriting."""
    profile = retrieval_profile(tiny.config)
    cache = make(tiny, profile, 2, 37, cold="cpu", near_tokens=5)
    fork = cache.fork()
    steps(tiny, fork, 9)
    fork.batch_repeat_interleave(2)
    feed(tiny, fork, torch.tensor([[3], [4], [5], [6]]))
    fork.crop(-11)
    steps(tiny, fork, 21)  # one key in the last page
    for one in (cache, fork):
        for layer in one.layers:
            pages = layer.pages
            archive, bounds = pages.archive, pages.far.bounds
            for row in range(archive.batch_size):
                for head in range(archive.num_heads):
                    for page in range(int(archive.lens[row]) // 8):
                        number = archive.table[row, head, page]
                        keys = archive.pool.k[number]
                        assert torch.equal(bounds.low[number], keys.amin(0))
                        assert torch.equal(bounds.high[number], keys.amax(0))


def test_top_k_and_top_p():
    bounds = torch.tensor([[[1.0, 5.0, 3.0, 4.0]], [[0.0, 0.0, 9.0, 0.0]]])
    assert pick_pages(bounds, 1.0, 2)[0].tolist() == [False, True, False, True]
    assert pick_pages(bounds, 1.0, 0).sum() == 0
    assert pick_pages(bounds, 1.0, 99).all() and pick_pages(bounds, 1.0, None).all()
    chosen = pick_pages(bounds, 1.0, 0.8)
    assert chosen.tolist() == [[False, True, False, True], [False, False, True, False]]
    shares = torch.softmax(bounds, -1)[:, 0]
    for p in (0.1, 0.5, 0.99):
        chosen = pick_pages(bounds, 1.0, p)
        assert ((shares * chosen).sum(1) >= p - 1e-6).all()


@pytest.mark.parametrize("how_many", [0, 2, 5, 0.3, 0.9])
def test_runners_up_come_next(how_many):
    bounds = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(1))
    picked = pick_pages(bounds, 1.0, how_many)
    rank = rank_pages(bounds, 1.0, how_many, 4)
    assert (
        torch.equal(rank == PICKED, picked) and ((rank == RUNNER_UP).sum(1) == (12 - picked.sum(1)).clamp(max=4)).all()
    )
    value = bounds.amax(1) if isinstance(how_many, int) else torch.softmax(bounds, -1).mean(1)
    for head in range(3):
        inside, rest = value[head, rank[head] == RUNNER_UP], value[head, rank[head] == 0]
        assert not len(rest) or inside.min() >= rest.max()
    assert torch.equal(rank_pages(bounds, 1.0, how_many, 0) == PICKED, picked)
    assert (rank_pages(bounds, 1.0, None, 4) == PICKED).all()


def test_a_needle_is_found_by_its_bound(tiny):
    """With one page of a hundred to choose, attention reads the page whose key fits the query."""
    profile = HeadProfile(3, 2, [["retrieval"] * 2] * 3, 0, 0)
    cache = make(tiny, profile, 1, 800, cold="cpu", retrieve=1, near_tokens=8)
    pages = cache.layers[0].pages
    far = pages.far
    needle = 333
    position = np.array([[needle]])
    row = torch.from_numpy(pages.archive.rows(position, np.array([0])).ravel())
    direction = torch.zeros(16)
    direction[3] = 100.0
    pages.archive.pool.k.view(-1, 16)[row] = direction
    pages.archive.pool.v.view(-1, 16)[row] = 7.0
    far.bounds.update(pages.archive, np.zeros(1, np.int64))
    before = far.counts.late
    q = torch.zeros(1, 2, 2, 16)
    q[..., 3] = 10.0
    from redknot_hf.paging.torch_attention import AttentionSpec

    out = far.decode(q, AttentionSpec(0.25))
    assert torch.allclose(out[0, 0], torch.full((2, 16), 7.0), atol=1e-3)
    assert far.counts.late - before == 2 * 2  # the needle's page and the first page, of each of two heads


def test_fewer_pages_are_read_and_the_result_stays_close(tiny):
    profile = retrieval_profile(tiny.config)
    exact = make(tiny, all_kept(profile), 1, 300)
    some = make(tiny, profile, 1, 300, cold="cpu", retrieve=0.9, near_tokens=16)
    few = make(tiny, profile, 1, 300, cold="cpu", retrieve=2, near_tokens=16)
    ids = torch.tensor([[5]])
    reference, close, rough = (feed(tiny, cache, ids) for cache in (exact, some, few))
    assert not torch.equal(reference, rough)
    assert (reference - close).norm() <= (reference - rough).norm()
    assert few.layers[2].pages.far.counts.late == 2 * 3  # two heads: two pages and the first one


@pytest.mark.parametrize("retrieve", [2, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_on_the_device_change_no_result(tiny, retrieve, kind):
    """Kept and fetched ahead, or all fetched anew in every step: the same numbers, through crops, forks, beams and moves."""
    profile = HeadProfile(3, 2, [["retrieval"] * 2] * 3, 0, 0)
    found, counts = [], []
    for budget in (None, 0, 3, 1000, "nothing"):
        options = {"resident_pages": None if budget == "nothing" else budget}
        cache = make(tiny, profile, 2, 300, cold=kind, retrieve=retrieve, near_tokens=16, **options)

        def go(cache, count, budget=budget):
            logits = []
            for _ in range(count):
                logits.append(steps(tiny, cache, 1))
                for layer in cache.layers if budget == "nothing" else ():
                    layer.pages.far.resident = []
            return logits

        logits = go(cache, 12)
        report = cache.memory_report()
        assert report.hot >= report.resident > 0 or budget == "nothing"
        assert report.live == report.hot + report.cold
        cache.reorder_cache(torch.tensor([1, 1]))
        logits += go(cache, 6)
        cache.crop(-15)
        feed(tiny, cache, prompt(2, 20, seed=8))
        logits += go(cache, 6)
        cache.crop(-200)
        feed(tiny, cache, prompt(2, 210, seed=9))
        logits += [*go(cache.fork(), 6), *go(cache, 2)]
        cache.offload()
        assert cache.memory_report().resident == cache.memory_report().hot - cache.memory_report().tables == 0
        logits += go(cache, 6)
        found.append(torch.cat(logits, 1))
        counts.append(cache.memory_report().far)
    assert all(torch.equal(one, found[0]) for one in found[1:])
    twice, latest, three, every, nothing = counts
    assert nothing.asked == twice.asked == latest.asked == every.asked > 0  # the same pages were picked
    for one in counts:
        assert one.asked == one.found + one.late
    assert latest.ahead == nothing.found == 0
    assert nothing.late > latest.late > twice.late >= every.late and three.asked == twice.asked
    page = 2 * 8 * 16 * 4
    assert [one.moved for one in counts] == [(one.late + one.ahead) * page for one in counts]


def test_the_budget_of_a_head(tiny):
    """No more pages are kept than were asked for, unless a step reads more; the longest unwanted makes room."""
    profile = HeadProfile(3, 2, [["retrieval"] * 2] * 3, 0, 0)
    page = 2 * 8 * 16 * 4
    for budget, kept in ((None, 2 * 4), (0, 4), (2, 4), (6, 6), (10**6, None)):
        cache = make(tiny, profile, 1, 400, cold="cpu", retrieve=3, near_tokens=16, resident_pages=budget)
        steps(tiny, cache, 16)
        for layer in cache.layers:
            far = layer.pages.far
            pages = -(-int(layer.pages.oldest.max()) // 8)
            assert far.resident_bytes <= 2 * page * (kept if kept is not None else pages)
            assert far.resident_bytes >= 2 * page * 4
    assert "found on the device" in str(cache.memory_report())


def test_the_least_recently_wanted_page_makes_room():
    here = ResidentPages(2, 4, 3, 5, torch.float32, torch.device("cpu"))
    archive = [torch.arange(40 * 4 * dim, dtype=torch.float32).view(40, 4, dim) for dim in (3, 5)]

    def wanted(*pages):
        one = np.zeros((2, 20), bool)
        one[:, list(pages)] = True
        return one

    def step(*pages, slots=4):
        missing = here.look(wanted(*pages), slots)
        head, page, slot = here.place(missing, wanted(*pages))
        number = torch.from_numpy(page + 20 * head)
        here.fill(head, slot, archive[0][number], archive[1][number])
        k, v = here.read(np.arange(2), np.tile(pages, (2, 1)))
        for half, slab in ((k, archive[0]), (v, archive[1])):
            expected = torch.stack([slab[[page + 20 * head for page in pages]] for head in range(2)])
            assert torch.equal(half[0], expected.flatten(1, 2))
        return sorted(set(np.nonzero(missing[0])[0].tolist()))

    assert step(1, 2) == [1, 2]
    assert step(3, 4) == [3, 4]
    assert step(1) == []
    assert step(5) == [5]  # in the place of 2: 1 was wanted after it
    assert step(1, 3, 4) == [] and step(2) == [2]
    assert step(5) == [5] or here.slots > 4
    assert here.slots == 4 and step(6, 7, 8, 9, 10, 11) == [6, 7, 8, 9, 10, 11] and here.slots == 6
    absent = here.look_for(wanted(6, 12))
    placed = here.place(absent, wanted(6, 7, 9, 10, 11))  # one slot is free to go: that of page 8
    assert placed[1].tolist() == [12, 12]
    source = PagePool(4, 3, 5, torch.float32, torch.device("cpu"))
    source.k, source.v = archive[0], archive[1]
    here.bring(source, placed[1] + 20 * placed[0], placed)
    assert step(6, 7, 9, 10, 11, 12) == []
    here.forget_from(9)
    assert step(12) == [12] and step(7) == []


def test_no_memory_to_fetch_ahead(tiny, monkeypatch):
    """What cannot be fetched ahead is fetched when it is asked for."""
    profile = HeadProfile(3, 2, [["retrieval"] * 2] * 3, 0, 0)
    options = dict(cold="cpu", retrieve=2, near_tokens=16)
    expected = steps(tiny, make(tiny, profile, 2, 300, **options), 12)
    cache = make(tiny, profile, 2, 300, **options)

    def none(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(resident, "_copy", none)
    assert torch.equal(steps(tiny, cache, 12), expected)

    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(resident, "_copy", broken)
    with pytest.raises(RuntimeError, match="something else"):
        steps(tiny, cache, 12)


# ---------------------------------------------------------------------------------- local heads: what left is there
@pytest.mark.parametrize("kind", KINDS)
def test_local_heads_see_the_same_with_and_without(tiny, profile, kind):
    cold, plain = make(tiny, profile, 2, 60, cold=kind), make(tiny, profile, 2, 60)
    assert torch.equal(steps(tiny, cold, 30), steps(tiny, plain, 30))
    assert cold.memory_report().hot - cold.memory_report().tables == (
        plain.memory_report().live - plain.memory_report().tables
    )
    assert plain.dropped_tokens()[2] == [2 * (90 - 11)] * 2
    assert cold.dropped_tokens() == [[0, 0]] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_window_brings_pages_back(tiny, kind):
    """After `set_profile` a head sees exactly what one sees that had the longer window in storage all along."""
    narrow, wide = (HeadProfile.uniform(tiny.config, sink=2, window=w) for w in (9, 40))
    ids = prompt(2, 70)
    cache = RedKnotCache(tiny.config, narrow, page_size=8, prefill="full", cold=kind)
    other = RedKnotCache(tiny.config, wide, page_size=8, prefill="full")
    feed(tiny, cache, ids), feed(tiny, other, ids)
    cache.set_profile(wide)
    assert cache.profile is wide
    assert torch.equal(steps(tiny, cache, 20), steps(tiny, other, 20))


def test_every_change_of_class(tiny):
    """local, global and retrieval heads become one another; the content follows, whichever way it goes."""
    ids = prompt(2, 70)
    maps = {
        "local": HeadProfile.uniform(tiny.config, sink=2, window=9),
        "wide": HeadProfile.uniform(tiny.config, sink=5, window=33),
        "global": HeadProfile.all_global(tiny.config),
        "retrieval": HeadProfile(3, 2, [["retrieval"] * 2] * 3, 0, 0),
        "mixed": retrieval_profile(tiny.config),
    }
    cache = RedKnotCache(tiny.config, maps["mixed"], page_size=8, prefill="full", cold="cpu", near_tokens=12)
    feed(tiny, cache, ids)
    for name in ("local", "wide", "retrieval", "global", "local", "mixed", "global", "wide"):
        twin = RedKnotCache(tiny.config, maps[name], page_size=8, prefill="full", cold="cpu", near_tokens=12)
        feed(tiny, twin, ids)
        fork = cache.fork()
        fork.set_profile(maps[name])
        assert_same(steps(tiny, fork, 6), steps(tiny, twin, 6))
        cache.set_profile(maps[name])


def test_what_was_dropped_is_named(tiny):
    narrow, wide = (HeadProfile.uniform(tiny.config, sink=2, window=w) for w in (9, 40))
    cache = make(tiny, narrow, 1, 60)
    twin, before = cache.fork(), cache.memory_report()
    with pytest.raises(CacheError, match=r"layer 0: head 0 would have to show token 21 of row 0.*cold='cpu'"):
        cache.set_profile(wide)
    assert cache.profile is narrow and cache.memory_report() == before
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))
    cache.set_profile(HeadProfile.uniform(tiny.config, sink=2, window=5))  # narrower needs nothing
    short = make(tiny, narrow, 1, 8)
    short.set_profile(wide)  # nothing has left yet
    assert torch.equal(steps(tiny, short), steps(tiny, make(tiny, wide, 1, 8)))


def test_crop_needs_no_rollback(tiny, profile):
    """Everything is in the archive: taking back 45 tokens equals never having fed them."""
    ids = prompt(2, 90)
    cache = RedKnotCache(tiny.config, profile, page_size=8, cold="cpu")
    other = RedKnotCache(tiny.config, profile, page_size=8)
    feed(tiny, cache, ids[:, :45]), feed(tiny, other, ids[:, :45])
    feed(tiny, cache, ids[:, 45:])
    fork, untouched, twin = cache.fork(), cache.fork(), RedKnotCache(tiny.config, profile, page_size=8)
    cache.crop(-45)
    feed(tiny, twin, ids[:, :45]), feed(tiny, twin, ids[:, 45:])
    assert_same(steps(tiny, untouched, 5), steps(tiny, twin, 5))
    assert torch.equal(steps(tiny, cache, 20), steps(tiny, other, 20))
    fork.crop(-45)  # shared pages were not written to by the other's crop
    other = RedKnotCache(tiny.config, profile, page_size=8)
    feed(tiny, other, ids[:, :45])
    assert_same(steps(tiny, fork, 20), steps(tiny, other, 20))


def test_forks_share_cold_pages(tiny):
    cache = make(tiny, retrieval_profile(tiny.config), 1, 200, cold="cpu", near_tokens=16)
    pool = cache.layers[0].pages.archive.pool
    free = pool.num_free
    forks = [cache.fork() for _ in range(5)]
    assert pool.num_free == free
    for index, fork in enumerate(forks):
        feed(tiny, fork, torch.tensor([[index + 2]]))
    del forks, fork
    assert pool.num_free >= free


# ---------------------------------------------------------------------------------------------- with sessions
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tiny, tmp_path, kind):
    profile = retrieval_profile(tiny.config)
    cache = make(tiny, profile, 2, 60, cold=kind, retrieve=3, near_tokens=12)
    cache.save(tmp_path / "a")
    other = RedKnotCache.load(tmp_path / "a", tiny.config)
    assert other.cold == kind and other.tier.pick == 3
    for one in (cache, other):
        one.crop(-20)
    assert torch.equal(steps(tiny, cache, 20), steps(tiny, other, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_and_back(tiny, kind):
    cache = make(tiny, retrieval_profile(tiny.config), 2, 60, cold=kind, retrieve=2, near_tokens=12)
    twin = cache.fork()
    cold = cache.memory_report().cold
    moved = cache.offload()
    report = cache.memory_report()
    assert report.cold == cold + moved and report.hot == report.tables
    assert torch.equal(steps(tiny, cache, 20), steps(tiny, twin, 20))


def test_freed_with_the_cache(tiny):
    cache = make(tiny, retrieval_profile(tiny.config), 2, 60, cold="cpu", near_tokens=12)
    pool = cache.layers[0].pages.archive.pool
    cache.offload()
    cache.reset()
    assert pool.num_free == pool.num_pages - 1


def test_memory_goes_back_to_the_allocator(tiny):
    """Offloading gives the hot slabs back, forgetting the cold ones, too; a fork keeps what it uses."""
    cache = make(tiny, retrieval_profile(tiny.config), 2, 60, cold="cpu", near_tokens=12)
    hot = weakref.ref(cache.layers[0].pages.pool)
    cold = weakref.ref(cache.layers[0].pages.archive.pool)
    fork, twin = cache.fork(), cache.fork()
    expected = steps(tiny, twin, 3)
    del twin
    cache.offload()
    assert hot() is not None  # the fork's
    del fork
    assert hot() is None and cold() is not None
    assert torch.equal(steps(tiny, cache, 3), expected)
    again = weakref.ref(cache.layers[0].pages.pool)
    cache.reset()
    assert again() is None and cold() is None
    feed(tiny, cache, prompt(2, 60))
    assert torch.equal(steps(tiny, cache, 3), expected)


# ------------------------------------------------------------------------------------------------------- faults
def test_a_full_disk(tiny, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PoolExhausted, match=r"no room for .* bytes of cold pages"):
        make(tiny, retrieval_profile(tiny.config), 1, 20, cold="disk")


def test_no_host_memory(tiny, monkeypatch):
    from redknot_hf.paging.tiers import HostPool

    cache = make(tiny, retrieval_profile(tiny.config), 1, 20, cold="cpu")
    twin = cache.fork()
    slab = HostPool._slab

    def none(self, rows, *rest):
        if rows > 1:
            raise MemoryError
        return slab(self, rows, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(HostPool, "_slab", none)
        with pytest.raises(PoolExhausted, match="no memory on cpu"):
            feed(tiny, cache, prompt(1, 400))
    assert torch.equal(
        steps(tiny, twin, 3), steps(tiny, make(tiny, retrieval_profile(tiny.config), 1, 20, cold="cpu"), 3)
    )


def test_files_have_no_names(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = make(tiny, retrieval_profile(tiny.config), 1, 60, cold="disk")
    assert not list(tmp_path.iterdir()) and cache.memory_report().cold > 0


@pytest.mark.parametrize(
    "options", [{"cold": "gpu"}, {"cold": "cpu", "retrieve": 1.5}, {"cold": "cpu", "retrieve": True}]
)
def test_bad_arguments(tiny, profile, options):
    with pytest.raises(RedKnotError, match=next(iter(options)) + "=|retrieve="):
        RedKnotCache(tiny.config, profile, **options)


def test_unsupported_combinations_are_named(tiny, profile):
    with pytest.raises(RedKnotError, match="max_cache_len"):
        RedKnotCache(tiny.config, profile, cold="cpu", max_cache_len=100)
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    cache = RedKnotCache(model.config, retrieval_profile(tiny_config()), cold="cpu")
    with pytest.raises(CacheError, match="cannot read cold pages"):
        feed(model, cache, prompt(1, 4))
