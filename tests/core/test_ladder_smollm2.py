"""The ladder on a real model: SmolLM2-135M-Instruct, 30 layers of 9 query heads over 3 KV heads, 64 channels.

fp32 on the CPU unless a test says otherwise. Prompts are short: what length does to speed is measured elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from core_models import forward, generate
from dense_reference import dense_reference, full_cache
from transformers import DynamicCache

from redknot_hf import HeadProfile, RedKnotCache

TEXT = (
    "A ring buffer keeps the last values that were written to it. When it is full, the next value takes the place of the "
    "oldest one. Sailors measured speed with a rope and knots: the rope ran out behind the ship, and a sailor counted "
    "the knots that passed through his hands in half a minute. The word is still the unit of speed at sea. "
)
LOGITS = 2e-4  # of logits up to 30: fp32 rounding over 30 layers


@pytest.fixture(scope="module")
def model(smollm2):
    model = smollm2[0]
    before = model.config._attn_implementation
    model.set_attn_implementation("redknot")
    yield model
    model.set_attn_implementation(before)


@pytest.fixture(scope="module")
def ids(smollm2):
    return smollm2[1](TEXT, return_tensors="pt")["input_ids"][:, :72]


def exact(model, **options):
    return RedKnotCache(model.config, HeadProfile.all_global(model.config), **options)


def profile_of(model):
    """A third of the heads global, the others four sinks and windows of 16 and 24."""
    keep = {(l, h) for l in range(30) for h in range(3) if (l + h) % 3 == 0}
    profile = HeadProfile.uniform(model.config, sink=4, window=16, global_heads=keep)
    for layer in range(0, 30, 2):
        profile.window[layer] = [24 if w else 0 for w in profile.window[layer]]
    profile.validate()
    return profile


def mixed(model, **options):
    return RedKnotCache(model.config, profile_of(model), **options)


def by_sdpa(model, run):
    model.set_attn_implementation("sdpa")
    try:
        return run()
    finally:
        model.set_attn_implementation("redknot")


def assert_same(one, other, bound=LOGITS):
    assert torch.equal(one.sequences, other.sequences)
    assert max((a - b).abs().max() for a, b in zip(one.logits, other.logits, strict=True)) <= bound


def test_m0_greedy_text_equals_dynamic_cache_and_sdpa(model, ids):
    want = by_sdpa(model, lambda: generate(model, DynamicCache(config=model.config), ids, max_new_tokens=24))
    assert_same(generate(model, exact(model), ids, max_new_tokens=24), want)


def test_m0_in_bf16_stays_within_the_spread_of_eager_and_sdpa(smollm2_path, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    logits = {}
    for name in ("sdpa", "eager", "redknot"):
        model.set_attn_implementation(name)
        cache = exact(model) if name == "redknot" else DynamicCache(config=model.config)
        parts = [forward(model, ids[:, :60], cache)[:, -1:]]  # a prompt, then single tokens
        parts += [forward(model, ids[:, at : at + 1], cache) for at in range(60, 72)]
        logits[name] = torch.cat(parts, 1).float()
    spread = (logits["sdpa"] - logits["eager"]).abs()
    ours = (logits["redknot"] - logits["sdpa"]).abs()
    assert ours.max() <= 1.5 * spread.max()
    assert ours.mean() <= 1.5 * spread.mean()


def test_m4_local_windows_equal_the_dense_mask(model, ids):
    with dense_reference(model, profile_of(model)):
        want = forward(model, ids, full_cache(model.config))
    got = forward(model, ids, mixed(model))
    assert (got - want).abs().max() <= LOGITS
    assert (want - forward(model, ids, exact(model))).abs().max() > 1  # the windows matter


def test_m4_decoding_equals_the_dense_mask(model, ids):
    with dense_reference(model, profile_of(model)):
        want = generate(model, full_cache(model.config), ids, max_new_tokens=12)
    assert_same(generate(model, mixed(model, page_size=16), ids, max_new_tokens=12), want)


def test_m7_chunks_equal_one_prefill(model, ids):
    want = forward(model, ids, mixed(model))
    cache = mixed(model)
    got = torch.cat([forward(model, part, cache) for part in ids.split(25, 1)], 1)
    assert (got - want).abs().max() <= LOGITS


def test_m8_a_fork_continues_bitwise(model, ids):
    root = mixed(model)
    forward(model, ids[:, :70], root)
    fork = root.fork()
    assert_same(generate(model, fork, ids, max_new_tokens=6), generate(model, root, ids, max_new_tokens=6), 0)


def test_m9_padded_rows_equal_each_row_alone(model, ids):
    lengths = [72, 40, 55]
    batch, mask = torch.zeros(3, 72, dtype=torch.long), torch.zeros(3, 72, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch[row, 72 - length :], mask[row, 72 - length :] = ids[0, :length], 1
    together = generate(model, mixed(model), batch, mask, max_new_tokens=8)
    for row, length in enumerate(lengths):
        alone = generate(model, mixed(model), ids[:, :length], max_new_tokens=8)
        assert torch.equal(together.sequences[row, 72:], alone.sequences[0, length:])
        off = max((a[row] - b[0]).abs().max() for a, b in zip(together.logits, alone.logits, strict=True))
        assert off <= LOGITS


@pytest.mark.parametrize("options", [dict(prompt_lookup_num_tokens=5), dict(num_beams=3)], ids=["lookup", "beams"])
def test_m10_equals_dynamic_cache(model, ids, options):
    text = torch.cat([ids[:, :36], ids[:, :36]], 1)
    settings = dict(max_new_tokens=10, **options)
    want = by_sdpa(model, lambda: generate(model, DynamicCache(config=model.config), text, **settings))
    assert_same(generate(model, exact(model), text, **settings), want)


@pytest.mark.parametrize("options", [dict(prompt_lookup_num_tokens=5), dict(num_beams=3)], ids=["lookup", "beams"])
def test_m10_with_local_heads_equals_the_dense_mask(model, ids, options):
    text = torch.cat([ids[:, :36], ids[:, :36]], 1)
    settings = dict(max_new_tokens=10, **options)
    with dense_reference(model, profile_of(model)):
        want = generate(model, full_cache(model.config), text, **settings)
    assert_same(generate(model, mixed(model), text, **settings), want)
