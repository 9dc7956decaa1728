"""Models whose layers are not all plain attention: hybrids, shared keys, chunks, encoder and decoder."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import transformers
from core_models import LOGITS, assert_same, forward, generate, padded, tokens
from dense_reference import dense_reference, full_cache
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    DynamicCache,
    EncoderDecoderCache,
    MBartConfig,
)

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError

sys.path.append(str(Path(__file__).resolve().parents[1] / "families"))
from family_check import mixed_profile
from tiny_families import tiny_model

SPREAD = 1e-4  # gemma4's own fp32 error against fp64 scores is 4e-5
HYBRIDS = ["qwen3_next", "lfm2", "jamba", "nemotron_h", "olmo_hybrid", "recurrent_gemma"]
SHARING = ["gemma3n_text", "gemma4_text"]
CHUNKED = ["llama4_text"]


@functools.cache
def model_of(family):
    try:
        model = tiny_model(family)
        generate(model, plain(model), tokens(5), max_new_tokens=2)
    except Exception as problem:  # an older transformers
        pytest.skip(
            f"{family} does not run with an ordinary cache in transformers {transformers.__version__}: {problem}"
        )
    model.set_attn_implementation("redknot")
    return model


def ours(model, profile=None, **options):
    return RedKnotCache(model.config, profile or HeadProfile.all_global(model.config), page_size=4, **options)


def plain(model):
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("family", HYBRIDS + SHARING + CHUNKED)
def test_beams_equal_dynamic_cache(family):
    model = model_of(family)
    ids, mask = padded([20, 13])
    options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert_same(
        generate(model, ours(model), ids, mask, **options), generate(model, plain(model), ids, mask, **options), SPREAD
    )


@pytest.mark.parametrize("family", HYBRIDS + SHARING + CHUNKED)
def test_multi_turn_equals_dynamic_cache(family):
    model = model_of(family)
    outs = []
    for cache in (ours(model), plain(model)):
        first = generate(model, cache, tokens(20), max_new_tokens=5)
        text = torch.cat([first.sequences, tokens(1, seed=3)], 1)
        outs.append(generate(model, cache, text, torch.ones_like(text), max_new_tokens=5))
    assert_same(*outs, SPREAD)


# recurrent_gemma keeps its recurrent state in the model, not in the cache: with DynamicCache, too, caches share it
@pytest.mark.parametrize("family", [*HYBRIDS[:-1], *SHARING, *CHUNKED])
def test_a_fork_leaves_the_original_alone(family):
    """Layers that stay with transformers are copied."""
    model = model_of(family)
    root, alone = ours(model), ours(model)
    forward(model, tokens(20), root)
    forward(model, tokens(20), alone)
    fork = root.fork()
    forward(model, tokens(1, seed=4), fork)
    got, want = forward(model, tokens(1, seed=5), root), forward(model, tokens(1, seed=5), alone)
    torch.testing.assert_close(got, want, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("chunk", [1, 6, 19])
def test_chunks_over_shared_keys_equal_the_dense_mask(family, chunk):
    """Layers that share keys attend over the chunk that an earlier layer staged: eviction has to wait for them."""
    model, ids = model_of(family), tokens(20)
    profile = mixed_profile(model.config)
    with dense_reference(model, profile):
        want = forward(model, ids, full_cache(model.config))
    cache = ours(model, profile)
    got = torch.cat([forward(model, part, cache) for part in ids.split(chunk, 1)], 1)
    torch.testing.assert_close(got, want, atol=SPREAD, rtol=0)


@pytest.mark.parametrize("family", SHARING)
def test_shared_keys_survive_crop_fork_and_assisted_decoding(family):
    model = model_of(family)
    ids = torch.cat([tokens(12)] * 2, 1)
    profile = mixed_profile(model.config)
    with dense_reference(model, profile):
        want = generate(model, full_cache(model.config), ids, prompt_lookup_num_tokens=3)
    assert_same(generate(model, ours(model, profile), ids, prompt_lookup_num_tokens=3), want, SPREAD)
    cache, fresh = ours(model, rollback=4), ours(model, rollback=4)
    forward(model, ids, cache)
    cache.crop(-4)
    forward(model, ids[:, :20], fresh)
    twin = cache.fork()
    for one in (cache, twin):
        reference = fresh.fork()
        torch.testing.assert_close(
            forward(model, tokens(3), one), forward(model, tokens(3), reference), atol=LOGITS, rtol=0
        )
    assert cache.memory_report().ideal == twin.memory_report().ideal


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_without_attention_stay_with_transformers(family):
    model = model_of(family)
    cache, reference = ours(model), plain(model)
    for layer, other in zip(cache.layers, reference.layers, strict=True):
        assert layer in cache.paged_layers or type(layer) is type(other)
    assert 0 < len(cache.paged_layers) < len(cache.layers) or family in ("lfm2", "recurrent_gemma")


# ----------------------------------------------------------------------------------------------- encoder and decoder
SEQ2SEQ = {"bart": BartConfig, "mbart": MBartConfig}


@functools.cache
def seq2seq(name):
    torch.manual_seed(0)
    config = SEQ2SEQ[name](
        vocab_size=97,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        init_std=0.3,
    )
    return AutoModelForSeq2SeqLM.from_config(config, attn_implementation="redknot").eval()


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(num_beams=3, num_return_sequences=3)])
def test_the_self_attention_half_of_an_encoder_decoder_cache(name, options):
    model = seq2seq(name)
    ids, mask = padded([20, 13])
    outs = []
    for half in (ours(model), plain(model)):
        outs.append(generate(model, EncoderDecoderCache(half, plain(model)), ids, mask, **options))
    assert_same(*outs)
    assert outs[0].past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_local_heads_in_a_decoder_equal_the_dense_mask(name):
    model = seq2seq(name)
    profile = HeadProfile.uniform(model.config, sink=1, window=3, global_heads={(0, 0), (1, 2)})
    ids, mask = padded([20, 13])
    with dense_reference(model, profile):
        want = generate(model, EncoderDecoderCache(full_cache(model.config), plain(model)), ids, mask)
    got = generate(model, EncoderDecoderCache(ours(model, profile), plain(model)), ids, mask)
    assert_same(got, want)


def test_cross_attention_into_a_redknot_cache_is_refused():
    """A RedKnotCache passed alone would take the encoder's keys, too."""
    model = seq2seq("bart")
    ids, mask = padded([20, 13])
    with pytest.raises(ValueError, match=r"EncoderDecoderCache|both directions"):
        generate(model, ours(model), ids, mask)
    with pytest.raises(RedKnotError) as caught:
        generate(model, EncoderDecoderCache(ours(model), ours(model)), ids, mask)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["falcon", "bloom", "mpt"])  # (GPT-J, too, up to transformers 5.23)
def test_a_family_that_cannot_switch_its_attention_is_refused_before_it_runs(family):
    """Local heads would never be used there. All heads global is exact, in the family's own attention."""
    model = tiny_model(family)
    with pytest.raises(RedKnotError, match=f"{type(model.config).__name__}: transformers cannot change"):
        RedKnotCache(model.config, mixed_profile(model.config))
    model.config.use_cache = True  # MPT's own default is False
    cache = RedKnotCache(model.config, HeadProfile.all_global(model.config))
    assert_same(generate(model, cache, tokens(12)), generate(model, plain(model), tokens(12)), SPREAD)
