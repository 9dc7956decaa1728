"""What the evaluation is for, on a real model: a needle that the full cache finds and a window does not reach."""

from __future__ import annotations

from redknot_hf import HeadProfile
from redknot_hf.eval.generate import answer
from redknot_hf.eval.methods import build_methods
from redknot_hf.eval.prompts import PromptMaker
from redknot_hf.eval.scoring import found_share


def test_a_needle_far_back(smollm2):
    model, tokenizer = smollm2
    profile = HeadProfile.load("SmolLM2-135M-Instruct")
    maker = PromptMaker(tokenizer, 512)
    rng = maker.rng("test", 0)
    value = str(rng.randint(1_000_000, 9_999_999))
    sentence = f"One of the special magic numbers for winter-river is: {value}."
    context, opening = maker.haystack("Remember the number.\n\n", [(0.05, sentence)], 0)
    example = maker.example(
        "single", 0, context, opening, "\n\nWhat is the special magic number for winter-river?",
        "The special magic number for winter-river is", [value], 10,
    )  # fmt: skip
    scores, sizes = {}, {}
    methods = build_methods(model.config, profile, 512, ["full", "ours", "streaming", "blind"], page_size=16)
    for method in methods:
        found = answer(model, tokenizer, [example], method)
        scores[method.name] = found_share(found.texts[0], example.references)
        sizes[method.name] = found.live_bytes
    assert scores == {"full": 1.0, "ours": 1.0, "streaming": 0.0, "blind": 0.0}
    assert sizes["ours"] < 0.7 * sizes["full"] and sizes["streaming"] >= 0.95 * sizes["ours"]
