"""Several prompts in one call: each row is the prompt that is built alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from splice_models import FAMILIES, tiny

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.segments.prompt import SegmentedPrompt

_random = np.random.default_rng(13)
HEADER, A, B, C = (_random.integers(2, 97, n).tolist() for n in (5, 43, 17, 29))
QUERIES = [_random.integers(2, 97, n).tolist() for n in (6, 1, 11)]
PROMPTS = [[A, B], [C], [B, C, A]]


def profiles(model) -> list[HeadProfile]:
    return [
        HeadProfile.all_global(model.config),
        HeadProfile.uniform(model.config, sink=2, window=8, global_heads=0.5),
    ]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_prompts_built_alone(family, which):
    model = tiny(family)
    prompt = SegmentedPrompt(model, None, "memory://", profiles(model)[which], header=HEADER)
    together = prompt.build_many(PROMPTS, QUERIES, 0.2)
    longest = together["input_ids"].shape[1]
    alone = [prompt.build(segments, query, 0.2) for segments, query in zip(PROMPTS, QUERIES, strict=True)]
    assert longest == max(built["input_ids"].shape[1] for built in alone) == together["past_key_values"].seen + 1
    for row, built in enumerate(alone):
        n = built["input_ids"].shape[1]
        assert together["input_ids"][row, longest - n :].tolist() == built["input_ids"][0].tolist()
        assert together["attention_mask"][row].tolist() == [0] * (longest - n) + [1] * n
        mine, theirs = together.accounts[row], built.account
        assert (mine.recomputed, mine.reused, mine.tokens) == (theirs.recomputed, theirs.reused, theirs.tokens)
        assert [s.id for s in mine.segments] == [s.id for s in theirs.segments]
    with torch.no_grad():
        many = model.generate(
            **together, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for row, built in enumerate(alone):
            n = built["input_ids"].shape[1]
            one = model.generate(
                **built, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            assert many.sequences[row, longest:].tolist() == one.sequences[0, n:].tolist()
            for x, y in zip(many.logits, one.logits, strict=True):
                assert (x[row] - y[0]).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_at_ratio_one_every_row_is_a_full_prefill(family):
    model = tiny(family)
    prompt = SegmentedPrompt(model, None, "memory://", profiles(model)[0], header=HEADER)
    built = prompt.build_many([[C], [B, C, A]], ["", QUERIES[0]][1:] * 2, 1.0)
    assert all(account.exact for account in built.accounts)
    with torch.no_grad():
        positions = (built["attention_mask"].cumsum(1) - 1)[:, -1:]
        mine = model(
            built["input_ids"][:, -1:],
            attention_mask=built["attention_mask"],
            position_ids=positions,
            past_key_values=built["past_key_values"],
        ).logits[:, -1]
        for row, mask in enumerate(built["attention_mask"].bool()):
            cache = RedKnotCache(model.config, profiles(model)[0])
            full = model(built["input_ids"][row, mask][None], past_key_values=cache).logits[0, -1]
            assert (full - mine[row]).abs().max() < 3e-5


def test_a_row_of_one_token_and_a_batch_of_one():
    model = tiny("llama")
    prompt = SegmentedPrompt(model, None, "memory://", profiles(model)[0], header=None)
    built = prompt.build_many([[], [A, B]], [[7], QUERIES[0]], 0.2)
    assert built["attention_mask"].sum(1).tolist() == [1, len(A) + len(B) + 6]
    out = model.generate(**built, max_new_tokens=4, do_sample=False)
    alone = model.generate(torch.tensor([[7]]), max_new_tokens=4, do_sample=False)
    assert out[0, -4:].tolist() == alone[0, -4:].tolist()
    one = prompt.build_many([[A, B]], [QUERIES[0]], 0.2)
    same = model.generate(**one, max_new_tokens=4, do_sample=False)
    assert same[0, -4:].tolist() == out[1, -4:].tolist()


def test_the_cache_of_a_batch_goes_on_like_any_other():
    model = tiny("llama")
    prompt = SegmentedPrompt(model, None, "memory://", profiles(model)[0], header=HEADER)
    built = prompt.build_many(PROMPTS, QUERIES, 0.2)
    twin = built["past_key_values"].fork()
    first = model.generate(**built, max_new_tokens=6, do_sample=False)
    again = model.generate(**{**built, "past_key_values": twin}, max_new_tokens=6, do_sample=False)
    assert torch.equal(first, again)
    chosen = torch.tensor([2, 0])
    built = prompt.build_many(PROMPTS, QUERIES, 0.2)
    built["past_key_values"].batch_select_indices(chosen)
    some = model.generate(
        built["input_ids"][chosen],
        attention_mask=built["attention_mask"][chosen],
        past_key_values=built["past_key_values"],
        max_new_tokens=6,
        do_sample=False,
    )
    assert torch.equal(some[:, -6:], first[chosen, -6:])


def test_what_is_no_batch_is_refused():
    prompt = SegmentedPrompt(tiny("llama"), None, "memory://", profiles(tiny("llama"))[0], header=HEADER)
    for segments, queries in (([], []), ([[A]], [QUERIES[0], QUERIES[1]]), (["ab"], [QUERIES[0]]), ([[A]], "a")):
        with pytest.raises(RedKnotError, match="build_many"):
            prompt.build_many(segments, queries)
    with pytest.raises(RedKnotError, match="build_many"):
        prompt.build([A], [QUERIES[0]])


def test_rows_of_a_real_model_answer_as_they_do_alone(smollm2):
    model, tokenizer = smollm2
    was = model.config._attn_implementation
    model.set_attn_implementation("redknot")
    try:
        prompt = SegmentedPrompt(
            model, tokenizer, "memory://", HeadProfile.all_global(model.config), header="Answer briefly.\n\n"
        )
        texts = [
            "The ferry Amsel was built in 1931. Its captain is called Jonas Weber.\n\n",
            "The red house on the hill belongs to a baker. She sells bread on Mondays and cakes on Fridays.\n\n",
            "The code of the garden gate is 4711. Nobody has changed it since the spring.\n\n",
        ]
        a, b, c = prompt.add_many(texts)
        segments = [[a, b, c], [c, a], [b]]
        queries = [
            "Question: What is the code of the garden gate?\nAnswer: The code of the garden gate is",
            "Question: Who is the captain of the ferry?\nAnswer: The captain of the ferry is called",
            "Question: When does the baker sell cakes?\nAnswer: On",
        ]
        together = prompt.build_many(segments, queries)
        out = model.generate(**together, max_new_tokens=8, do_sample=False)[:, together["input_ids"].shape[1] :]
        assert any(together["attention_mask"][:, 0] == 0) and "4711" in tokenizer.decode(out[0])
        for row, (mine, query) in enumerate(zip(segments, queries, strict=True)):
            built = prompt.build(mine, query)
            alone = model.generate(**built, max_new_tokens=8, do_sample=False)[0, built["input_ids"].shape[1] :]
            end = alone.tolist()
            assert out[row].tolist()[: len(end)] == end
    finally:
        model.set_attn_implementation(was)
