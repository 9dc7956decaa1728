"""transformers' Cache contract, call by call: what `DynamicCache` does, a RedKnotCache with global heads does, too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from core_models import (
    LOGITS,
    SIZES,
    assert_same,
    forward,
    generate,
    global_cache,
    mixed,
    mixed_cache,
    padded,
    plain_cache,
    tiny,
    tokens,
)
from dense_reference import dense_reference, full_cache
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.errors import CacheError, RollbackExceeded


@pytest.fixture
def llama():
    yield tiny("llama")
    assert tiny("llama").config._attn_implementation == "redknot"


@pytest.fixture
def gemma3():
    """Sliding and full layers."""
    return tiny("gemma3")


def close(one, other, bound=LOGITS):
    torch.testing.assert_close(one, other, atol=bound, rtol=0)


def continued(model, cache, ids):
    """Logits of more tokens on a cache that holds some."""
    return forward(model, ids, cache)


# ------------------------------------------------------------------------------------------------------ lengths
def test_sequence_length_is_logical(llama):
    """Padding and evicted tokens count, as with DynamicCache."""
    ids, mask = padded([20, 5])
    cache, plain = mixed_cache(llama), plain_cache(llama)
    assert cache.get_seq_length() == 0
    forward(llama, ids, cache, mask)
    forward(llama, ids, plain, mask)
    for layer in range(3):
        assert cache.get_seq_length(layer) == plain.get_seq_length(layer) == 20
    assert cache.get_mask_sizes(4, 0) == plain.get_mask_sizes(4, 0) == (24, 0)
    assert cache.batch_size == 2
    assert (cache.is_compileable, cache.is_initialized) == (False, True)
    assert cache.get_max_length() == -1


def test_sliding_layers_are_reported_as_transformers_reports_them(gemma3):
    assert global_cache(gemma3).is_sliding == plain_cache(gemma3).is_sliding == [True, False, True]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_cache_len": 64}, {"cold": "cpu"}, {"cold": "disk", "retrieve": 1}, {"kv_dtype": "int8"}],
    ids=str,
)
def test_a_cache_filled_in_inference_mode_goes_on_outside_it(llama, options):
    """And the other way round: what a step writes into in place belongs to no mode."""
    ids, logits = tokens(40), []
    for modes in ((False, False, False), (True, False, True), (False, True, False)):
        cache = mixed_cache(llama, page_size=4, **options)
        for mode, part in zip(modes, (ids[:, :38], ids[:, 38:39], ids[:, 39:]), strict=True):
            with torch.no_grad(), torch.inference_mode(mode):
                out = forward(llama, part, cache)
        twin = cache.fork()
        logits.append(
            (out.clone(), continued(llama, cache, tokens(1, seed=5)), continued(llama, twin, tokens(1, seed=5)))
        )
    for other in logits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(logits[0], other, strict=True))


# --------------------------------------------------------------------------------------------- rows of the batch
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_reorder_cache_equals_dynamic_cache(name):
    model = tiny(name)
    ids, mask = padded([20, 13, 7])
    order, more = torch.tensor([2, 0, 0]), tokens(1, 3, seed=8)
    outs = []
    for cache in (global_cache(model), plain_cache(model)):
        forward(model, ids, cache, mask)
        cache.reorder_cache(order)
        outs.append(forward(model, more, cache, torch.cat([mask[order], torch.ones(3, 1, dtype=torch.long)], 1)))
    close(*outs)


@pytest.mark.parametrize("chosen", [[1], [2, 0], [0, 0, 1, 2, 2], [True, False, True], [-1, 0]])
def test_batch_select_indices_equals_dynamic_cache(llama, chosen):
    ids, mask = padded([20, 13, 7])
    index = torch.tensor(chosen)
    rows = index.nonzero()[:, 0] if index.dtype == torch.bool else index
    more = tokens(4, len(rows), seed=8)
    mask_more = torch.cat([mask[rows], torch.ones(len(rows), 4, dtype=torch.long)], 1)
    outs = []
    for cache in (global_cache(llama), plain_cache(llama)):
        forward(llama, ids, cache, mask)
        cache.batch_select_indices(index)
        outs.append(forward(llama, more, cache, mask_more))
    close(*outs)


def test_contrastive_path_equals_dynamic_cache(llama):
    """What contrastive search does: repeat every row, look ahead, keep the best candidates, take the token back."""
    ids = tokens(12, 2)
    outs = []
    for cache in (global_cache(llama), plain_cache(llama)):
        seen = [forward(llama, ids, cache)[:, -1]]
        cache.batch_repeat_interleave(3)
        seen.append(forward(llama, tokens(1, 6, seed=4), cache)[:, -1])
        cache.batch_select_indices(torch.tensor([1, 5]))
        seen.append(forward(llama, tokens(2, 2, seed=5), cache)[:, -1])
        cache.crop(-1)
        seen.append(forward(llama, tokens(1, 2, seed=6), cache)[:, -1])
        outs.append(torch.cat(seen))
    close(*outs)


def test_a_prefilled_cache_serves_beams_after_repeat_interleave(llama):
    ids = tokens(20)
    outs = []
    for cache in (global_cache(llama), plain_cache(llama)):
        forward(llama, ids[:, :15], cache)
        cache.batch_repeat_interleave(3)
        outs.append(generate(llama, cache, ids, num_beams=3))
    assert_same(*outs)


def test_rows_share_pages_until_they_differ(llama):
    cache = global_cache(llama, page_size=4)
    forward(llama, tokens(16), cache)
    before = cache.memory_report().live - cache.memory_report().tables
    cache.batch_repeat_interleave(4)
    assert cache.memory_report().live - cache.memory_report().tables == before
    forward(llama, tokens(1, 4), cache)  # a new page for each row, the old ones still shared
    grown = cache.memory_report().live - cache.memory_report().tables
    assert before < grown <= before * 2


# ------------------------------------------------------------------------------------------------ crop and reset
def test_crop_with_a_positive_length_is_a_target(llama):
    """transformers up to 5.19 passes the length to keep."""
    cache = global_cache(llama)
    forward(llama, tokens(20), cache)
    cache.crop(12)
    assert cache.get_seq_length() == 12
    cache.crop(30)
    cache.crop(0)
    assert cache.get_seq_length() == 12


def test_crop_of_padded_rows_equals_dynamic_cache(llama):
    """The tokens taken back are padding in one row and real in another."""
    ids, mask = padded([20, 13, 7], side="right")
    position = (mask.cumsum(1) - 1).clamp(0)
    more, ones = tokens(3, 3, seed=8), torch.ones(3, 3, dtype=torch.long)
    outs = []
    for cache in (global_cache(llama), plain_cache(llama)):
        forward(llama, ids, cache, mask, position_ids=position)
        cache.crop(-9)
        at = mask[:, :11].sum(1)[:, None] + torch.arange(3)
        outs.append(forward(llama, more, cache, torch.cat([mask[:, :11], ones], 1), position_ids=at))
    close(*outs)


def test_crop_beyond_the_rollback_is_refused_and_changes_nothing(llama):
    cache, untouched = mixed_cache(llama), mixed_cache(llama)
    for one in (cache, untouched):
        forward(llama, tokens(30), one)
    with pytest.raises(RollbackExceeded, match="rollback=5"):
        cache.crop(-5)
    assert cache.get_seq_length() == 30
    close(continued(llama, cache, tokens(4)), continued(llama, untouched, tokens(4)), 0)


def test_crop_to_nothing_starts_again(llama):
    cache = mixed_cache(llama, rollback=40)
    forward(llama, tokens(20), cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 0
    close(forward(llama, tokens(9), cache), forward(llama, tokens(9), mixed_cache(llama)), 1e-6)


def test_reset_serves_another_batch_size_and_gives_memory_back(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(50, 2), cache)
    assert cache.memory_report().live
    cache.reset()
    report = cache.memory_report()
    assert (report.live, report.allocated, cache.get_seq_length()) == (0, 0, 0)
    ids, mask = padded([20, 13, 7])
    assert_same(generate(llama, cache, ids, mask), generate(llama, mixed_cache(llama), ids, mask), 0)


def test_a_reset_original_leaves_its_fork_alone(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(30), cache)
    fork, again = cache.fork(), cache.fork()
    cache.reset()
    forward(llama, tokens(30, seed=77), cache)
    close(continued(llama, fork, tokens(5)), continued(llama, again, tokens(5)), 0)


# ------------------------------------------------------------------------------------------- generate() and returns
def test_generate_returns_the_same_cache(llama):
    cache = mixed_cache(llama)
    out = generate(llama, cache, tokens(20))
    assert out.past_key_values is cache
    assert cache.get_seq_length() == out.sequences.shape[1] - 1


def test_multi_turn_with_padding_equals_dynamic_cache(llama):
    ids, mask = padded([20, 9])
    outs = []
    for cache in (global_cache(llama), plain_cache(llama)):
        first = generate(llama, cache, ids, mask)
        more = torch.cat([first.sequences, tokens(6, 2, seed=5)], 1)
        full = torch.cat([mask, torch.ones(2, more.shape[1] - 20, dtype=torch.long)], 1)
        outs.append(generate(llama, cache, more, full))
    assert_same(*outs)


def test_a_mask_wider_than_the_tokens_equals_dynamic_cache(llama):
    ids, mask = padded([20, 9])
    wide = torch.cat([mask, torch.ones(2, 30, dtype=torch.long)], 1)
    close(forward(llama, ids, global_cache(llama), wide), forward(llama, ids, plain_cache(llama), wide))


def test_two_caches_take_turns_on_one_model(llama):
    one, other, ids = mixed_cache(llama), global_cache(llama), tokens(30)
    alone = [forward(llama, ids, mixed_cache(llama)), forward(llama, ids, global_cache(llama))]
    got: list[list[torch.Tensor]] = [[], []]
    for part in ids.split(7, 1):
        got[0].append(forward(llama, part, one))
        got[1].append(forward(llama, part, other))
    close(torch.cat(got[0], 1), alone[0])
    close(torch.cat(got[1], 1), alone[1])


def test_dense_views_equal_the_tensors_of_dynamic_cache(llama):
    """Tools look at layers[i].keys; padding is zero there."""
    ids, mask = padded([20, 9])
    ours, plain = global_cache(llama), plain_cache(llama)
    forward(llama, ids, ours, mask)
    forward(llama, ids, plain, mask)
    real = mask.bool()[:, None, :, None]
    for layer, other in zip(ours.layers, plain.layers, strict=True):
        close(layer.keys, other.keys * real, 1e-6)
        close(layer.values, other.values * real, 1e-6)
    assert global_cache(llama).layers[0].keys is None
    with pytest.raises(CacheError, match="live in pages"):
        ours.layers[0].keys = torch.zeros(1)


def test_copies_share_the_config_and_nothing_else(llama):
    cache = mixed_cache(llama)
    forward(llama, tokens(20), cache)
    twin = copy.deepcopy(cache)
    assert twin.config is cache.config is llama.config
    forward(llama, tokens(3), twin)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (20, 23)
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(cache)


# ------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("implementation", ["redknot", "sdpa"])
def test_forward_with_gradients_enabled_works_and_backward_is_refused(llama, implementation):
    ids = tokens(10)
    llama.set_attn_implementation(implementation)
    try:
        want = forward(llama, ids, global_cache(llama))
        out = llama(ids, past_key_values=global_cache(llama)).logits
        close(out.detach(), want, 0)
        with pytest.raises(RedKnotError, match="train without a cache"):
            out.sum().backward()
    finally:
        llama.zero_grad()
        llama.set_attn_implementation("redknot")


def test_training_without_a_cache_has_the_gradients_of_sdpa():
    torch.manual_seed(0)
    grads = []
    for implementation in ("redknot", "sdpa"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=implementation).train()
        model.gradient_checkpointing_enable()
        ids, mask = padded([20, 9])
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.ravel() for p in model.parameters()]))
    close(*grads, 0)


# ------------------------------------------------------------------------------------------- masks of other shapes
def prefix_mask(length: int, prefix: int, window: int | None = None) -> torch.Tensor:
    at = torch.arange(length)
    seen = (at[:, None] >= at[None]) | ((at[:, None] < prefix) & (at[None] < prefix))
    if window:
        seen &= at[:, None] - at[None] < window
    return seen[None, None]


@pytest.mark.parametrize("additive", [False, True])
def test_a_prefix_mask_equals_sdpa_with_and_without_our_cache(llama, additive):
    ids, mask = tokens(20), prefix_mask(20, 8)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    llama.set_attn_implementation("sdpa")
    want = llama(ids, attention_mask=mask).logits.detach()
    llama.set_attn_implementation("redknot")
    close(forward(llama, ids, None, mask), want, 2e-7)
    close(forward(llama, ids, plain_cache(llama), mask), want, 2e-7)
    close(forward(llama, ids, global_cache(llama), mask), want)


def test_a_prefix_mask_with_local_heads_equals_the_dense_mask(llama):
    ids, mask = tokens(20), prefix_mask(20, 8)
    with dense_reference(llama, mixed(llama.config)):
        want = forward(llama, ids, full_cache(llama.config), mask)
    close(forward(llama, ids, mixed_cache(llama), mask), want)


def test_sliding_and_full_layers_take_each_their_own_mask(gemma3):
    """One mask per kind of layer, as vision models with image blocks pass them; the first layer's is not everybody's."""
    ids = tokens(20)
    masks = {"full_attention": prefix_mask(20, 8), "sliding_attention": prefix_mask(20, 8, 12)}
    want = forward(gemma3, ids, plain_cache(gemma3), masks)
    close(forward(gemma3, ids, global_cache(gemma3), masks), want)


def test_generation_continues_after_a_prefix_mask(llama):
    ids, mask = tokens(20), prefix_mask(20, 8)
    outs = []
    for cache in (global_cache(llama), plain_cache(llama)):
        forward(llama, ids, cache, mask)
        outs.append(generate(llama, cache, torch.cat([ids, ids[:, :1]], 1)))
    assert_same(*outs)


def test_packed_sequences_without_a_cache_equal_sdpa(llama):
    ids = tokens(20)
    position = torch.cat([torch.arange(12), torch.arange(8)])[None]
    got = forward(llama, ids, None, None, position_ids=position, use_cache=False)
    llama.set_attn_implementation("sdpa")
    want = forward(llama, ids, None, None, position_ids=position, use_cache=False)
    llama.set_attn_implementation("redknot")
    close(got, want, 0)
    alone = forward(llama, ids[:, 12:], None, None, use_cache=False)
    close(got[:, 12:], alone)


# ------------------------------------------------------------------------------------ other implementations, in turn
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_is_exact_while_nothing_is_evicted(llama, implementation):
    ids, mask = padded([20, 9])
    want = generate(llama, plain_cache(llama), ids, mask)
    short = HeadProfile.uniform(llama.config, sink=2, window=40)
    llama.set_attn_implementation(implementation)
    try:
        assert_same(generate(llama, global_cache(llama), ids, mask), want)
        assert_same(generate(llama, RedKnotCache(llama.config, short), ids, mask), want)
        cache = mixed_cache(llama)
        with pytest.raises(CacheError, match="set_attn_implementation\\('redknot'\\)"):
            forward(llama, ids, cache, mask)
        assert cache.get_seq_length() == 0
    finally:
        llama.set_attn_implementation("redknot")
    assert_same(generate(llama, cache, ids, mask), generate(llama, mixed_cache(llama), ids, mask), 0)


def test_implementations_take_turns_on_one_cache(llama):
    """redknot, sdpa, redknot over a padded batch, against DynamicCache all along."""
    ids, mask = padded([18, 9])
    ours, plain = global_cache(llama), plain_cache(llama)
    ones = torch.ones(2, 1, dtype=torch.long)
    for step, implementation in enumerate(["redknot", "sdpa", "sdpa", "eager", "redknot", "redknot"]):
        part = ids if step == 0 else tokens(1, 2, seed=step)
        llama.set_attn_implementation(implementation)
        got = forward(llama, part, ours, mask)
        llama.set_attn_implementation("redknot")
        want = forward(llama, part, plain, mask)
        close(got[:, -1], want[:, -1])
        mask = torch.cat([mask, ones], 1)


def test_a_cache_of_a_copied_config_says_what_to_do():
    """The cache cannot see what runs, so nothing consumes its keys: a clear error, not a wrong text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa").eval()
    cache = RedKnotCache(LlamaConfig(**SIZES), HeadProfile.uniform(model.config, sink=1, window=4))
    with pytest.raises(CacheError, match=r"build the cache from model.config|set_attn_implementation"):
        forward(model, tokens(20), cache)


# --------------------------------------------------------------------------------------------------- accelerate
def test_device_map_and_cpu_offload_change_nothing(tmp_path):
    from accelerate import cpu_offload

    source = tiny("llama")
    source.save_pretrained(tmp_path)
    ids = tokens(20)
    want = generate(source, mixed_cache(source), ids)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="redknot", device_map={"": "cpu"})
    assert_same(generate(mapped, mixed_cache(mapped), ids), want, 0)
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="redknot")
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert_same(generate(offloaded, mixed_cache(offloaded), ids), want, 0)
