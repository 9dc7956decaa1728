"""Wrong input is one line that names the cause and the cure, and leaves the cache as it was.

`survives` is the second half of that sentence: after the refusal the same cache goes on like one that never saw it.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from core_models import CONFIGS, SIZES, forward, generate, global_cache, mixed, mixed_cache, padded, tiny, tokens
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.errors import CacheError, PoolExhausted, ProfileError
from redknot_hf.paging.pool import PagePool


@pytest.fixture
def llama():
    yield tiny("llama")
    assert tiny("llama").config._attn_implementation == "redknot"


@contextlib.contextmanager
def refused(*words: str, kind: type[Exception] = RedKnotError):
    """The error is ours, one line, and says all of ``words``."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert isinstance(caught.value, RedKnotError) and "\n" not in text
    for word in words:
        assert word in text, text


def survives(model, cache, ids, mask=None):
    """``cache`` holds ``ids`` and continues like a fresh cache that was fed the same."""
    fresh = mixed_cache(model)
    forward(model, ids, fresh, mask)
    more = torch.tensor([[5]]).expand(len(ids), 1)
    after = None if mask is None else torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], 1)
    assert cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(
        forward(model, more, cache, after), forward(model, more, fresh, after), atol=1e-6, rtol=0
    )


# ------------------------------------------------------------------------------------------- building the cache
def test_a_profile_of_another_shape(llama):
    small = HeadProfile.all_global(LlamaConfig(**{**SIZES, "num_hidden_layers": 2}))
    with refused("2 layers x 3 KV heads", "3 layers x 3 KV heads", "all_global"):
        RedKnotCache(llama.config, small)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda p: p.head_class[1].__setitem__(2, "lokal"), ("head_class[1][2]", "'lokal'", "'local'")),
        (lambda p: p.window[0].__setitem__(1, 0), ("window[0][1]", "0")),
        (lambda p: p.sink[0].__setitem__(1, -1), ("sink[0][1]", "-1")),
        (lambda p: p.window[0].__setitem__(1, 2.5), ("window[0][1]", "2.5")),
        (lambda p: p.head_class.pop(), ("head_class", "2 rows", "3")),
    ],
)
def test_a_bad_cell_is_named(llama, change, words):
    profile = mixed(llama.config)
    change(profile)
    with refused(*words, kind=ProfileError):
        RedKnotCache(llama.config, profile)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(page_size=48), ("page_size=48", "power of two")),
        (dict(page_size=0), ("page_size=0", "power of two")),
        (dict(page_size=2048), ("page_size=2048", "1 to 1024")),
        (dict(page_size=64.0), ("page_size=64.0",)),
        (dict(rollback=-1), ("rollback=-1", "0 or more")),
        (dict(rollback=True), ("rollback=True",)),
        (dict(prefill="all"), ("prefill='all'", "'windowed' or 'full'")),
        (dict(max_cache_len=0), ("max_cache_len=0",)),
        (dict(max_cache_len=True), ("max_cache_len=True",)),
        (dict(page_size=True), ("page_size=True", "power of two")),
        (dict(retrieve=4), ("retrieve=4", "cold='drop'", "cold='cpu'")),
        (dict(resident_pages=4), ("resident_pages=4", "cold='drop'", "cold='cpu'")),
        (dict(tp_rank=2, tp_size=2), ("tp_rank=2", "tp_size=2")),
    ],
)
def test_a_bad_option_is_named(llama, options, words):
    with refused(*words):
        RedKnotCache(llama.config, **options)


def test_something_that_is_no_config(llama):
    with refused("config=LlamaForCausalLM", "model.config"):
        RedKnotCache(llama)
    with refused("nowhere.json"):
        RedKnotCache(llama.config, "nowhere.json")


def test_local_head_counts_that_do_not_fit_are_refused_not_guessed(llama):
    """A tensor-parallel rank feeds a share of the heads; which one must not be guessed."""
    cache = RedKnotCache(llama.config, mixed(llama.config), tp_rank=0, tp_size=3)
    with refused("3 KV heads", "for_model(model, profile)", kind=CacheError):
        forward(llama, tokens(5), cache)


# ----------------------------------------------------------------------------------------------- using the cache
def test_another_batch_size(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(20), cache)
    with refused("1 row(s)", "3 are fed", "batch_repeat_interleave", "reset()", kind=CacheError):
        forward(llama, tokens(1, 3), cache)
    survives(llama, cache, tokens(20))


def test_beams_on_a_cache_prefilled_with_one_row(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(20), cache)
    with refused("batch_repeat_interleave(num_beams)", kind=CacheError):
        generate(llama, cache, torch.cat([tokens(20), tokens(1)], 1), num_beams=3)
    survives(llama, cache, tokens(20))


@pytest.mark.parametrize("change", [dict(num_key_value_heads=2), dict(head_dim=32)])
def test_another_model_of_another_shape(llama, change):
    cache = mixed_cache(llama)
    forward(llama, tokens(20), cache)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **change}), attn_implementation="redknot").eval()
    with refused("a cache serves one model", kind=CacheError):
        forward(other, tokens(1), cache)
    survives(llama, cache, tokens(20))


def test_another_dtype(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(20), cache)
    torch.manual_seed(0)
    half = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="redknot", dtype=torch.bfloat16)
    with refused("torch.float32", "torch.bfloat16", kind=CacheError):
        forward(half.eval(), tokens(1), cache)
    survives(llama, cache, tokens(20))


@pytest.mark.parametrize("new", [1, 3])
def test_a_mask_too_narrow_for_what_the_cache_holds(llama, new):
    """A mask of the new tokens alone; transformers would take the past for padding."""
    ids, mask = padded([20, 9])
    cache = mixed_cache(llama)
    forward(llama, ids, cache, mask)
    with refused(f"attention_mask has {new} columns", "20 tokens", f"{20 + new} columns", kind=CacheError):
        forward(llama, tokens(new, 2), cache, torch.ones(2, new, dtype=torch.long))
    survives(llama, cache, ids, mask)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("change", ["one token more", "as many elsewhere"])
def test_a_changed_mask_of_the_past(llama, new, change):
    ids, mask = padded([20, 9])
    cache = mixed_cache(llama)
    forward(llama, ids, cache, mask)
    past = mask.clone()
    if change == "one token more":
        past[1, 10] = 1
    else:
        past[1, 10], past[1, 19] = 1, 0
    bad = torch.cat([past, torch.ones(2, new, dtype=torch.long)], 1)
    with refused("mask of past tokens must not change", kind=CacheError):
        forward(llama, tokens(new, 2), cache, bad)
    survives(llama, cache, ids, mask)


def test_an_own_mask_over_a_filled_cache(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(20), cache)
    with refused("already holds 20 tokens", "DynamicCache"):
        forward(llama, tokens(4), cache, torch.ones(1, 1, 4, 24, dtype=torch.bool))
    survives(llama, cache, tokens(20))


def test_more_tokens_than_max_cache_len(llama):
    cache = mixed_cache(llama, max_cache_len=16)
    with refused("max_cache_len=16", "20 come", kind=CacheError):
        forward(llama, tokens(20), cache)
    forward(llama, tokens(10), cache)
    with refused("10 are stored and 7 come", kind=CacheError):
        forward(llama, tokens(7), cache)
    assert int(cache.get_seq_length()) == 10
    with refused("max_cache_len=16", kind=CacheError):
        generate(llama, mixed_cache(llama, max_cache_len=16), tokens(10))


def test_dropout_while_training(llama):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_dropout=0.1), attn_implementation="redknot")
    with refused("model.eval()"):
        forward(model.train(), tokens(5), global_cache(model))


def test_rows_and_tokens_that_are_not_there(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(20), cache)
    with refused("crop(-30)", "20 tokens"):
        cache.crop(-30)
    for method in ("reorder_cache", "batch_select_indices"):
        with refused(method, "row 1", "1 rows"):
            getattr(cache, method)(torch.tensor([0, 1]))
    with refused("batch_select_indices", "mask of 2 entries", "1 rows"):
        cache.batch_select_indices(torch.tensor([True, False]))
    with refused("batch_repeat_interleave(0)", "1 or more"):
        cache.batch_repeat_interleave(0)
    survives(llama, cache, tokens(20))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_generate_without_use_cache(name):
    """generate() would feed the whole text again and again into a cache that keeps it: refused, not a wrong text."""
    with refused("use_cache=False", "20 of them"):
        generate(tiny(name), mixed_cache(tiny(name)), tokens(20), use_cache=False)


# ------------------------------------------------------------------------------------------- interrupted forwards
class Interruption(Exception):
    pass


@contextlib.contextmanager
def failing(module):
    """``module`` raises when it is called."""

    def fail(*_):
        raise Interruption

    handle = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Interruption):
            yield
    finally:
        handle.remove()


PLACES = {
    "before the first layer": lambda m: m.model.layers[0],
    "in the first layer": lambda m: m.model.layers[0].mlp,
    "in the second layer": lambda m: m.model.layers[1].mlp,
    "in the last layer": lambda m: m.model.layers[2].mlp,
    "after the layers": lambda m: m.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["prompt", "token", "chunk"])
def test_a_forward_interrupted(llama, place, when):
    """Whole layers or none: the forward counts or it does not, or the next one says so and reset() cures it."""
    cache = mixed_cache(llama)
    if when != "prompt":
        forward(llama, tokens(20), cache)
    count = {"prompt": 20, "token": 1, "chunk": 6}[when]
    with failing(PLACES[place](llama)):
        forward(llama, tokens(count, seed=3), cache)
    before = 0 if when == "prompt" else 20
    if place in ("before the first layer", "after the layers", "in the last layer"):
        assert cache.get_seq_length() == before + (0 if place == "before the first layer" else count)
    else:
        with refused("reset()", kind=CacheError):
            forward(llama, tokens(4, seed=4), cache)
    cache.reset()
    forward(llama, tokens(20), cache)
    survives(llama, cache, tokens(20))


def test_an_exception_in_a_stopping_criterion_leaves_a_usable_cache(llama):
    cache = mixed_cache(llama)

    def stop(ids, scores, **_):
        if ids.shape[1] == 24:
            raise Interruption
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(Interruption):
        generate(llama, cache, tokens(20), stopping_criteria=[stop])
    held = cache.get_seq_length()
    text = generate(llama, mixed_cache(llama), tokens(20)).sequences
    assert held == 23
    got = generate(llama, cache, text[:, :24], max_new_tokens=5)
    assert torch.equal(got.sequences, text[:, :29])


# ------------------------------------------------------------------------------------------------- out of memory
def exhausted(self, count, spare=None):
    raise PoolExhausted("no memory")


@pytest.mark.parametrize("when", ["prompt", "chunk"])
def test_a_full_pool_refuses_the_forward_and_keeps_the_cache(llama, when, monkeypatch):
    cache, other = mixed_cache(llama, page_size=4), mixed_cache(llama)
    forward(llama, tokens(20), other)
    if when == "chunk":
        forward(llama, tokens(20), cache)
    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "reserve", exhausted)
        with refused(kind=PoolExhausted):
            forward(llama, tokens(20, seed=4), cache)
    if when == "prompt":
        forward(llama, tokens(20), cache)
    torch.testing.assert_close(forward(llama, tokens(3), cache), forward(llama, tokens(3), other), atol=1e-6, rtol=0)


def test_a_full_pool_in_the_middle_of_decoding_leaves_other_caches_alone(llama):
    """Pools of fixed capacity that two forks share."""
    cache = mixed_cache(llama, page_size=4)
    forward(llama, tokens(20), cache)
    pools = list(cache._pools.values())
    fork = cache.fork()
    for pool in pools:
        pool.capacity = pool.num_pages - 1
    with refused("free pages", "bytes", "max_cache_len larger", kind=PoolExhausted):
        for _ in range(200):
            forward(llama, tokens(1), cache)
    cache.reset()
    survives(llama, fork, tokens(20))
    fork.reset()
    assert all(pool.num_free == pool.num_pages - 1 for pool in pools)
