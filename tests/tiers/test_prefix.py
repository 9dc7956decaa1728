"""A prefix is paid for once, its children are what they would be alone, and nothing of them remains."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from session_helpers import feed, make, mixed_profile, prompt, steps

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.errors import CacheError, RollbackExceeded
from redknot_hf.paging.frozen import FrozenPages
from redknot_hf.prefix import compress_prefix, measure_prefix


def assert_same(one: torch.Tensor, two: torch.Tensor) -> None:
    """Equal up to the order in which a matrix product adds."""
    assert (one - two).abs().max() <= 4e-6 * max(1.0, two.abs().max())
    assert torch.equal(one.argmax(-1), two.argmax(-1))


def alone(model, profile, ids, suffix):
    """The child computed by itself: the prefix with full attention, then its own tokens."""
    cache = RedKnotCache(model.config, profile, page_size=8, prefill="full")
    feed(model, cache, ids)
    return cache, feed(model, cache, suffix)


def thawed(cache):
    """A fork in ordinary pages of the model's dtype, with the same numbers."""
    twin = cache.fork()
    twin.kv_dtype = None  # so that what comes is not quantised
    twin.set_profile(twin.profile)
    return twin


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_eight_children_cost_the_prefix_once(tiny, profile, kv_dtype):
    ids = prompt(1, 1000)
    cache = compress_prefix(tiny, ids, profile, page_size=8, kv_dtype=kv_dtype)
    report = cache.memory_report()
    pools = list(cache._pools.values())
    stores = {id(layer.pages.store) for layer in cache.layers if isinstance(layer.pages, FrozenPages)}
    token = 2 * 16 * (4 if kv_dtype is None else 1)
    assert report.ideal == (2 * 1000 + 4 * 11) * token

    def used() -> int:
        return sum(pool.num_pages - 1 - pool.num_free for pool in pools)

    before = used()
    assert before == (2 * 125 + 4 if kv_dtype is None else 0)  # the rings' second pages are packed
    children = [cache.fork() for _ in range(8)]
    assert used() == before  # not a page for eight of them
    for index, child in enumerate(children):
        suffix = prompt(1, 5, seed=index + 1)
        if kv_dtype is None:
            expected_cache, expected = alone(tiny, profile, ids, suffix)
        else:
            expected_cache = thawed(cache)
            expected = feed(tiny, expected_cache, suffix)
        assert_same(feed(tiny, child, suffix), expected)
        assert_same(steps(tiny, child, 10), steps(tiny, expected_cache, 10))
        assert stores == {id(layer.pages.store) for layer in child.layers if isinstance(layer.pages, FrozenPages)}
        expected_cache.reset()
    # 15 tokens of a child touch at most 3 pages of each head (all of a ring's 2), in 3 layers of 2 heads
    assert 0 < used() - before <= 8 * 6 * 3
    for child in children[:4]:
        child.reset()  # at once
    assert used() - before <= 4 * 6 * 3
    del children, child
    gc.collect()  # a cache and its layers refer to each other
    assert used() == before and cache.memory_report().live == report.live
    suffix = prompt(1, 5, seed=77)
    expected = alone(tiny, profile, ids, suffix)[1] if kv_dtype is None else feed(tiny, thawed(cache), suffix)
    assert_same(feed(tiny, cache.fork(), suffix), expected)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_eight_children_of_32k_tokens(tiny, kv_dtype):
    """What the prefix and eight children in use hold together: the prefix once, and a page or two for each head of a child."""
    profile = HeadProfile.uniform(tiny.config, sink=4, window=256, global_heads=[(0, 0), (1, 1)])
    cache = RedKnotCache(tiny.config, profile, prefill="full", kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randn(1, 2, 32768, 16, generator=generator) for _ in range(2)]
    cache.adopt(((keys[0], keys[1]) for _ in range(3)), 32768)
    cache.freeze()

    def held(*caches: RedKnotCache) -> int:
        pages = [layer.pages for one in caches for layer in one.layers]
        stores = {id(p.store): p.store.nbytes for p in pages if isinstance(p, FrozenPages)}
        pools = {id(p.pool): p.pool for p in pages}
        entries = {key: [p.table[p.table > 0] for p in pages if id(p.pool) == key] for key in pools}
        live = sum(len(np.unique(np.concatenate(entries[key]))) * pool.page_bytes for key, pool in pools.items())
        return sum(stores.values()) + live

    alone = held(cache)
    assert alone == cache.memory_report().live - cache.memory_report().tables
    children = [cache.fork() for _ in range(8)]
    assert held(cache, *children) == alone
    for index, child in enumerate(children):
        feed(tiny, child, prompt(1, 5, seed=index))
    page = 64 * 2 * 16 * 4
    assert alone < held(cache, *children) <= alone + 8 * 3 * 2 * 2 * page
    assert held(cache, *children) <= (1.15 if kv_dtype is None else 1.45) * alone  # pages of float32 beside int8


def test_children_in_any_order_and_of_children(tiny, profile):
    ids = prompt(1, 100)
    cache = compress_prefix(tiny, ids, profile, page_size=8)
    first = cache.fork()
    feed(tiny, first, prompt(1, 9, seed=1))
    grandchild = first.fork()
    feed(tiny, first, prompt(1, 20, seed=2))
    expected, _ = alone(tiny, profile, ids, prompt(1, 9, seed=1))
    assert torch.equal(steps(tiny, grandchild), steps(tiny, expected))


def test_generate_with_prefix_and_request(tiny, profile):
    ids = prompt(1, 100)
    cache = compress_prefix(tiny, ids, profile, page_size=8)
    both = torch.cat([ids, prompt(1, 7, seed=3)], 1)
    found = tiny.generate(both, past_key_values=cache.fork(), max_new_tokens=6, do_sample=False)
    other = RedKnotCache(tiny.config, profile, page_size=8, prefill="full")
    feed(tiny, other, ids)
    assert torch.equal(found, tiny.generate(both, past_key_values=other, max_new_tokens=6, do_sample=False))
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunks_give_the_same_prefix(tiny, profile, chunk_size):
    ids = prompt(2, 100)
    whole = compress_prefix(tiny, ids, profile, page_size=8)
    parts = compress_prefix(tiny, ids, profile, page_size=8, chunk_size=chunk_size)
    assert parts.profile == whole.profile and parts.memory_report().ideal == whole.memory_report().ideal
    for one, two in zip(whole.layers, parts.layers, strict=True):
        assert (one.keys - two.keys).abs().max() < 1e-5 and (one.values - two.values).abs().max() < 1e-5
    assert (steps(tiny, whole) - steps(tiny, parts)).abs().max() < 1e-4


def test_the_report(tiny, profile):
    ids, probe = prompt(1, 300), prompt(1, 12, seed=9)[0]
    cache = compress_prefix(tiny, ids, profile, page_size=8, probe=probe)
    report = cache.prefix_report
    token = 2 * 16 * 4
    assert report.tokens == 300 and report.dense == 6 * 300 * token and report.ideal == (2 * 300 + 4 * 11) * token
    assert report.live == cache.memory_report().live
    full = make(tiny, HeadProfile.all_global(tiny.config), 1, 300)
    p = feed(tiny, full, probe[None]).log_softmax(-1)
    q = feed(tiny, cache.fork(), probe[None]).log_softmax(-1)
    assert report.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert 0 <= report.same_top1 <= 1 and report.kl > 1e-4
    again = measure_prefix(tiny, cache, ids, probe)
    assert again.kl == pytest.approx(report.kl, rel=1e-3) and again.live == report.live
    exact = compress_prefix(tiny, ids, HeadProfile.all_global(tiny.config), page_size=8, probe=probe)
    assert exact.prefix_report.kl < 1e-9 and exact.prefix_report.same_top1 == 1.0
    assert "% of dense" in str(report)


def test_a_prefix_can_be_saved_once_and_forked_after_loading(tiny, profile, tmp_path):
    ids = prompt(1, 200)
    cache = compress_prefix(tiny, ids, profile, page_size=8)
    cache.save(tmp_path / "prefix")
    loaded = RedKnotCache.load(tmp_path / "prefix", tiny)
    suffix = prompt(1, 5, seed=4)
    assert torch.equal(feed(tiny, loaded.fork(), suffix), feed(tiny, cache.fork(), suffix))


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("tokens", [8192, 8229, 32768])
@pytest.mark.parametrize(("sink", "window"), [(4, 256), (64, 256), (64, 4096)])
def test_bytes_after_compression_are_near_the_ragged_ideal(sink, window, tokens, kv_dtype):
    """The bar: at most 3 % above the ideal at page 64 from 8K tokens on; live pages, and what the allocator holds."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=10, head_dim=64, vocab_size=8
    )
    profile = HeadProfile.uniform(config, sink=sink, window=window, global_heads=0.15)
    cache = RedKnotCache(config, profile, prefill="full", kv_dtype=kv_dtype)
    keys = torch.zeros(1, 3, tokens, 64, dtype=torch.bfloat16)
    cache.adopt(((keys, keys) for _ in range(10)), tokens)
    paged = cache.memory_report()
    assert paged.live - paged.tables == profile.kv_bytes(tokens)
    cache.freeze()
    report = cache.memory_report()
    rows = sum(map(sum, profile.stored_tokens(tokens)))
    assert report.ideal == rows * 64 * 2 * (2 if kv_dtype is None else 1)
    assert report.ideal < report.live <= 1.03 * report.ideal
    assert report.allocated <= 1.04 * report.ideal  # the pools' scratch pages


# measured for 600 to 1,000 tokens of this text: int8 7e-4, fp8 (three bits of mantissa) 1.5e-3
@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 2e-3), (torch.float8_e4m3fn, 4e-3)])
def test_the_real_model_with_a_quantised_prefix(smollm2, kv_dtype, most):
    """Quantising alone (every head global): how far the next-token distributions move, and in how many bytes."""
    import pydoc_data.topics

    model, tokenizer = smollm2
    ids = tokenizer(pydoc_data.topics.topics["specialnames"][:4000], return_tensors="pt").input_ids[:, :664]
    prefix, probe = ids[:, :600], ids[0, 600:]
    profile = HeadProfile.all_global(model.config)
    cache = compress_prefix(model, prefix, profile, kv_dtype=kv_dtype, probe=probe)
    report = cache.prefix_report
    assert 1e-6 < report.kl < most and report.same_top1 >= 0.95
    assert report.live <= 1.03 * report.ideal and report.ideal == report.dense // 4  # of float32
    plain = RedKnotCache(model.config, profile)
    feed(model, plain, prefix)
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 601, dtype=torch.long)}
    one, two = (model.generate(ids[:, :601], past_key_values=c, **given) for c in (cache.fork(), plain))
    assert torch.equal(one, two)


@pytest.mark.parametrize("bad", ["fp16", "float8", torch.float16, torch.uint8, 8, True, ["int8"]])
def test_a_dtype_that_pages_cannot_have(tiny, profile, bad):
    with pytest.raises(RedKnotError, match=r"kv_dtype=.*expected 'fp8'"):
        compress_prefix(tiny, prompt(1, 5), profile, kv_dtype=bad)
    with pytest.raises(RedKnotError, match=r"kv_dtype=.*expected 'fp8'"):
        RedKnotCache(tiny.config, profile, kv_dtype=bad)


@pytest.mark.parametrize(
    ("options", "word"), [({"max_cache_len": 64}, "max_cache_len"), ({"cold": "cpu"}, "cold='cpu'")]
)
def test_what_kv_dtype_does_not_go_with(tiny, profile, options, word):
    with pytest.raises(RedKnotError, match=f"kv_dtype='int8' with {word}"):
        RedKnotCache(tiny.config, profile, kv_dtype="int8", **options)
    if "max_cache_len" in options:
        with pytest.raises(CacheError, match="freeze: the memory of the static form is fixed"):
            RedKnotCache(tiny.config, profile, **options).freeze()


def test_numbers_that_have_no_scale(tiny, profile):
    cache = make(tiny, profile, 1, 40, kv_dtype="int8")
    twin = cache.fork()
    pool = cache.layers[1].pages.pool
    pool.v[int(cache.layers[1].pages.table[0, 0, 0]), 1, 3] = float("nan")
    with pytest.raises(CacheError, match="layer 1: some values are not finite"):
        cache.freeze()
    del twin


# --------------------------------------------------------------------------------------------- frozen pages in use
@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_a_frozen_cache_is_saved_bit_by_bit_and_not_quantised_again(tiny, profile, tmp_path, kv_dtype):
    cache = compress_prefix(tiny, prompt(1, 203), profile, page_size=8, kv_dtype=kv_dtype)
    feed(tiny, cache, prompt(1, 5, seed=2))  # some pages thawed, some tokens behind them
    size = cache.save(tmp_path / "a")
    assert size < cache.memory_report().ideal + 20_000
    loaded = RedKnotCache.load(tmp_path / "a", tiny)
    assert loaded.kv_dtype == cache.kv_dtype and loaded.memory_report().ideal == cache.memory_report().ideal
    loaded.save(tmp_path / "b")
    if kv_dtype is not None:  # otherwise nothing is frozen any more, and pages may lie in another order
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    cache.offload()
    cache.save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    first = steps(tiny, loaded, 150)  # past the next quantisation
    assert torch.equal(first, steps(tiny, cache, 150))
    assert loaded.frozen_until > 203 or kv_dtype is None


def test_what_is_frozen_stays_as_it_is_when_more_is_frozen(tiny):
    """Pages that nobody wrote to keep their bytes, whatever is frozen after them."""
    profile = HeadProfile.all_global(tiny.config)
    cache = compress_prefix(tiny, prompt(1, 80), profile, page_size=8, kv_dtype="int8")
    before = [layer.keys.clone() for layer in cache.layers]
    for more in range(3):
        feed(tiny, cache, prompt(1, 11, seed=more))
        cache.freeze()
    assert isinstance(cache.layers[0].pages, FrozenPages) and not (cache.layers[0].pages.table > 0).any()
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :80], keys)


def test_a_cache_with_kv_dtype_under_generate(tiny, profile):
    """Without a word more: the context is in one byte per channel but for the latest eighth."""
    ids = prompt(2, 900)
    cache = RedKnotCache(tiny.config, HeadProfile.all_global(tiny.config), page_size=8, kv_dtype="int8")
    out = tiny.generate(ids, past_key_values=cache, max_new_tokens=300, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 1200)
    report = cache.memory_report()
    assert report.live <= 0.25 * report.dense * (1 + 4 * 0.125)
    twin = RedKnotCache(tiny.config, HeadProfile.all_global(tiny.config), page_size=8)
    exact = feed(tiny, twin, out[:, :1150])[:, -1]
    other = RedKnotCache(tiny.config, HeadProfile.all_global(tiny.config), page_size=8, kv_dtype="int8")
    feed(tiny, other, out[:, :1149])
    assert (feed(tiny, other, out[:, 1149:1150])[:, -1] - exact).norm() < 0.1 * exact.norm()
    beams = RedKnotCache(tiny.config, profile, page_size=8, kv_dtype="int8")
    feed(tiny, beams, ids[:1, :300])
    beams.batch_repeat_interleave(3)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert tiny.generate(ids[:1, :310], past_key_values=beams, **options).shape == (1, 318)


def test_crop_into_a_frozen_prefix(tiny):
    ids = prompt(1, 80)
    profile = HeadProfile.all_global(tiny.config)
    cache = compress_prefix(tiny, ids, profile, page_size=8, kv_dtype="int8")
    whole, keys = cache.fork(), cache.layers[2].keys.clone()
    cache.crop(-27)
    assert torch.equal(cache.layers[2].keys, keys[:, :, :53]) and torch.equal(whole.layers[2].keys, keys)
    feed(tiny, cache, prompt(1, 9, seed=5))
    assert torch.equal(cache.layers[2].keys[:, :, :53], keys[:, :, :53])
    held = cache.layers[2].pages
    assert not ((held.table > 0) & (held.frozen > 0)).any()
    cache.reset(), whole.reset()
    assert held.pool.num_free == held.pool.num_pages - 1  # no page was lost on the way
    local = compress_prefix(tiny, ids, mixed_profile(tiny.config), page_size=8, kv_dtype="int8")
    with pytest.raises(RollbackExceeded):
        local.crop(-5)
    assert local.get_seq_length() == 80


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"prefill": "windowed"}, "full attention"),
        ({"page_size": 3}, "page_size"),
    ],
)
def test_bad_arguments(tiny, profile, arguments, word):
    arguments = {"ids": prompt(1, 5), **arguments}
    with pytest.raises(RedKnotError, match=word):
        compress_prefix(tiny, profile=profile, **arguments)


def test_another_prefix_is_not_measured(tiny, profile):
    cache = compress_prefix(tiny, prompt(1, 20), profile, page_size=8)
    with pytest.raises(CacheError, match="holds 20 tokens, ids has 21"):
        measure_prefix(tiny, cache, prompt(1, 21), prompt(1, 3))


def test_mixed_profile_is_what_the_helpers_promise(tiny):
    assert mixed_profile(tiny.config).count("local") == 4
