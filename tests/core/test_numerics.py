"""Numbers that are not numbers, rows that see nothing, half precision, memory that others have used."""

from __future__ import annotations

import pytest
import torch
from core_models import (
    CONFIGS,
    LOGITS,
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
from transformers import AutoModelForCausalLM

CACHES = {"global": global_cache, "mixed": mixed_cache}
SHAPES = ["llama", "gemma3", "gpt_oss"]


def close(one, other, bound=LOGITS):
    torch.testing.assert_close(one, other, atol=bound, rtol=0)


def embeddings(model, ids, broken=None):
    """Input embeddings, one row of them NaN."""
    out = model.get_input_embeddings()(ids).detach().clone()
    if broken is not None:
        out[broken] = float("nan")
    return out


@torch.no_grad()
def feed(model, embeds, cache, mask=None):
    return model(inputs_embeds=embeds, past_key_values=cache, attention_mask=mask).logits


@pytest.fixture(params=SHAPES)
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("lengths", [[20, 20, 20], [20, 13, 7]])
def test_nan_in_one_row_stays_in_its_row(model, kind, lengths):
    ids, mask = padded(lengths)
    good, bad = CACHES[kind](model, page_size=4), CACHES[kind](model, page_size=4)
    want = feed(model, embeddings(model, ids), good, mask)
    got = feed(model, embeddings(model, ids, 1), bad, mask)
    for row in (0, 2):
        close(got[row][mask[row].bool()], want[row][mask[row].bool()])
    assert got[1, -1].isnan().all()
    for step in range(12):  # past several page borders and turns of the rings
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        more = tokens(1, 3, seed=step)
        want, got = forward(model, more, good, mask), forward(model, more, bad, mask)
        close(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("kind", CACHES)
def test_pages_that_held_nan_are_clean_for_the_next_user(model, kind):
    """reset(), a dropped fork and a dropped row give pages back to a pool that others draw from."""
    ids = tokens(30)
    root = CACHES[kind](model, page_size=4)
    forward(model, ids[:, :9], root)
    broken = root.fork()
    feed(model, embeddings(model, ids, 0), broken)
    broken.batch_repeat_interleave(2)
    broken.batch_select_indices(torch.tensor([1]))
    broken.reset()
    pools = [pool for pool in root._pools.values()]
    assert any(pool.k.isnan().any() for pool in pools)  # they are there, in free pages
    fresh = CACHES[kind](model, page_size=4)
    forward(model, ids[:, :9], fresh)
    for step in range(12):
        close(forward(model, tokens(2, seed=step), root), forward(model, tokens(2, seed=step), fresh))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("following", [1, 2])
def test_nan_that_was_cropped_away_is_gone(model, kind, following):
    ids = tokens(30)
    cropped, fresh = CACHES[kind](model, page_size=16, rollback=8), CACHES[kind](model, page_size=16, rollback=8)
    forward(model, ids[:, :20], cropped)
    feed(model, embeddings(model, ids[:, 20:26], 0), cropped)
    cropped.crop(-6)
    forward(model, ids[:, :20], fresh)
    for step in range(10):
        more = tokens(following, seed=step)
        close(forward(model, more, cropped), forward(model, more, fresh))


@pytest.mark.parametrize("kind", CACHES)
def test_a_row_that_is_all_padding_changes_no_other_row(model, kind):
    """Such a row sees nothing: its logits are finite and the others' are those without it."""
    ids, mask = padded([20, 13])
    three, mask3 = torch.cat([ids, torch.zeros_like(ids[:1])]), torch.cat([mask, torch.zeros_like(mask[:1])])
    with_row, without = CACHES[kind](model), CACHES[kind](model)
    got, want = forward(model, three, with_row, mask3), forward(model, ids, without, mask)
    close(got[:2][mask.bool()], want[mask.bool()])
    assert got.isfinite().all()
    for step in range(3):
        ones = torch.ones(2, 1, dtype=torch.long)
        mask, mask3 = torch.cat([mask, ones], 1), torch.cat([mask3, torch.tensor([[1], [1], [step > 0]])], 1)
        more = tokens(1, 3, seed=step)
        got, want = forward(model, more, with_row, mask3), forward(model, more[:2], without, mask)
        close(got[:2], want)
        assert got.isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_the_spread_of_eager_and_sdpa(name, dtype):
    torch.manual_seed(0)
    half = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager", dtype=dtype).eval()
    ids, mask = padded([30, 17])
    eager = forward(half, ids, plain_cache(half), mask)[:, -1]
    full = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    full.load_state_dict(half.state_dict())
    exact = forward(full, ids, plain_cache(full), mask)[:, -1]
    half.set_attn_implementation("redknot")
    ours = forward(half, ids, global_cache(half), mask)[:, -1]
    assert ours.dtype == dtype
    spread = (eager - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * spread


def test_large_fp16_scores_do_not_overflow():
    """Scores beyond 65504 before the softmax; sdpa's own result is finite, ours equals it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa", dtype=torch.float16).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(300)
            layer.self_attn.k_proj.weight.mul_(300)
    ids = tokens(30)
    want = forward(model, ids, plain_cache(model))
    model.set_attn_implementation("redknot")
    got = forward(model, ids, global_cache(model))
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, atol=2e-2, rtol=0)
    assert forward(model, ids, mixed_cache(model)).isfinite().all()


def test_a_seed_decides_the_text(model):
    ids = tokens(20)
    runs = [generate(model, mixed_cache(model), ids, do_sample=True, top_k=0, max_new_tokens=20) for _ in range(2)]
    assert_same(*runs, 0)


@pytest.mark.parametrize("name", SHAPES)
def test_to_the_last_position_the_model_has(name):
    """512 positions: the prompt and every decode step up to the last, windows evicted dozens of times over."""
    model = tiny(name)
    limit, prompt = model.config.max_position_embeddings, 480
    text = tokens(limit, 2, seed=3)
    want = {}
    for kind, profile in (("global", None), ("mixed", mixed(model.config))):
        with dense_reference(model, profile):
            want[kind] = forward(model, text, full_cache(model.config))
    for kind, make in CACHES.items():
        cache = make(model)
        got = [forward(model, text[:, :prompt], cache)]
        got += [forward(model, text[:, at : at + 1], cache) for at in range(prompt, limit)]
        assert cache.get_seq_length() == limit
        close(torch.cat(got, 1), want[kind], 3e-5)


@pytest.mark.slow
def test_smollm2_to_its_last_position(smollm2):
    """8,192 tokens of real text positions in one prompt: logits and the token that follows are those of DynamicCache."""
    model, tokenizer = smollm2
    limit = model.config.max_position_embeddings
    ids = tokenizer(
        "".join(f"Line {n}: {n * n % 977} bees in hive {n % 41}. " for n in range(1200)), return_tensors="pt"
    )
    ids = ids["input_ids"][:, : limit - 1]
    assert ids.shape[1] == limit - 1
    with torch.no_grad():
        want = [model(ids, past_key_values=(theirs := plain_cache(model)), logits_to_keep=1).logits]
        got = [model(ids, past_key_values=(ours := global_cache(model)), logits_to_keep=1).logits]
        following = want[0][:, -1:].argmax(-1)
        want.append(model(following, past_key_values=theirs).logits)
        got.append(model(following, past_key_values=ours).logits)
    close(torch.cat(got, 1), torch.cat(want, 1), 2e-3)
    assert ours.get_seq_length() == limit
