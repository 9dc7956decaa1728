"""`profile_heads` on a tiny model: finds what was planted, repeats, resumes, restores the model, refuses by name."""

from __future__ import annotations

import pytest
import torch
from planted import HEADS, LAYERS, PLANTED, make_planted_model
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

from redknot_hf.errors import RedKnotError
from redknot_hf.heads import HeadProfile
from redknot_hf.heads.profiler import api, profile_heads
from redknot_hf.heads.profiler.collect import Workload, build_prompts
from redknot_hf.heads.profiler.context import prefill, run_suffix
from redknot_hf.heads.profiler.intercept import decoder_layout, intercept
from redknot_hf.heads.profiler.objective import Objective
from redknot_hf.heads.profiler.refine import search_on
from redknot_hf.heads.profiler.tasks import NEEDLE_KINDS
from redknot_hf.heads.profiler.visibility import HeadMap, visible_attention, windowed_handler

FAST = {"context": 768, "gate_steps": 12, "samples": 2, "windows": (16, 32, 64), "mean_window": 32, "progress": False}


def content(profile: HeadProfile) -> tuple:
    """All of a profile that must repeat."""
    meta = {key: value for key, value in profile.metadata.items() if key != "date"}
    return profile.head_class, profile.sink, profile.window, meta


@pytest.fixture(scope="module")
def profile(byte_tokenizer) -> HeadProfile:
    return profile_heads(make_planted_model(), byte_tokenizer, budget=1 / 6, **FAST)


def test_the_planted_head_is_the_only_global_one(profile):
    kept = {(l, h) for l in range(LAYERS) for h in range(HEADS) if profile.head_class[l][h] == "global"}
    assert kept == {PLANTED}


def test_the_planted_head_leads_retrieval_gates_and_kl_but_not_far_mass(profile):
    def leader(name):
        matrix = torch.tensor(profile.metadata["scores"][name])
        return divmod(int(matrix.argmax()), HEADS)

    assert leader("retrieval") == PLANTED
    assert leader("needle_predicted_kl") == PLANTED
    assert leader("gate") == PLANTED
    assert leader("needle_max_far_mass") != PLANTED  # why attention mass is no rule


def test_profile_keeps_the_byte_budget_and_says_what_it_costs(profile, tmp_path):
    local = [
        w
        for row, names in zip(profile.window, profile.head_class, strict=True)
        for w, n in zip(row, names, strict=True)
        if n == "local"
    ]
    assert sum(local) <= 32 * len(local)
    assert set(local) <= {16, 32, 64}
    checked = profile.metadata["validation"]
    assert checked["prefill"] == "windowed" and checked["text"]["kl"] >= 0
    expected = (768 + sum(w + 4 for w in local)) / (6 * 768)
    assert checked["kv_bytes_fraction"] == pytest.approx(expected, abs=1e-4)
    profile.save(tmp_path / "p.json")
    assert content(HeadProfile.load(tmp_path / "p.json"))[:3] == content(profile)[:3]


def test_equal_seeds_give_equal_profiles_and_other_seeds_other_figures(planted_model, byte_tokenizer, profile):
    again = profile_heads(planted_model, byte_tokenizer, budget=1 / 6, **FAST)
    assert content(again) == content(profile)
    other = profile_heads(planted_model, byte_tokenizer, budget=1 / 6, seed=1, **FAST)
    assert other.metadata["scores"] != profile.metadata["scores"]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])  # two scored batches, two of the gates, one of the search
def test_interrupted_and_resumed_equals_uninterrupted(
    planted_model, byte_tokenizer, profile, tmp_path, monkeypatch, stop_after
):
    from redknot_hf.heads.profiler.checkpoint import Checkpoint

    path = tmp_path / "run.safetensors"
    saves = []
    save = Checkpoint.save

    def interrupted(self):
        save(self)
        saves.append(1)
        if len(saves) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile_heads(planted_model, byte_tokenizer, budget=1 / 6, checkpoint=path, **FAST)
    assert path.exists()
    resumed = profile_heads(planted_model, byte_tokenizer, budget=1 / 6, checkpoint=path, **FAST)
    assert content(resumed) == content(profile)
    assert not path.exists()


def test_a_checkpoint_of_another_run_is_refused(planted_model, byte_tokenizer, tmp_path, monkeypatch):
    from redknot_hf.heads.profiler.checkpoint import Checkpoint

    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(Checkpoint, "remove", lambda self: None)
    profile_heads(planted_model, byte_tokenizer, checkpoint=path, validate=False, **FAST)
    with pytest.raises(RedKnotError, match="another model or other arguments"):
        profile_heads(planted_model, byte_tokenizer, checkpoint=path, validate=False, **FAST, seed=1)
    path.write_bytes(b"rubbish")
    with pytest.raises(RedKnotError, match="not a profiler checkpoint"):
        profile_heads(planted_model, byte_tokenizer, checkpoint=path, validate=False, **FAST)


def test_tolerance_takes_the_smallest_budget_that_meets_it(planted_model, byte_tokenizer):
    loose = profile_heads(planted_model, byte_tokenizer, tolerance={"text_kl": 1e3, "needle_kl": 1e3}, **FAST)
    assert loose.metadata["tolerance"]["met"] is True
    assert loose.metadata["budget"]["global_fraction"] == 0.05
    with pytest.warns(UserWarning, match="all heads stay global"):
        strict = profile_heads(planted_model, byte_tokenizer, tolerance=0.0, **FAST)
    assert strict.metadata["tolerance"]["met"] is False
    assert {name for row in strict.head_class for name in row} == {"global"}
    assert strict.metadata["validation"]["text"]["kl"] == pytest.approx(0, abs=1e-5)


def test_the_model_is_left_as_it_was(planted_model, byte_tokenizer):
    planted_model.train()
    planted_model.lm_head.weight.requires_grad_(False)
    before = planted_model.config._attn_implementation
    profile_heads(planted_model, byte_tokenizer, validate=False, **FAST)
    assert planted_model.config._attn_implementation == before
    assert planted_model.training and not planted_model.lm_head.weight.requires_grad
    assert planted_model.model.embed_tokens.weight.requires_grad
    assert all(parameter.grad is None for parameter in planted_model.parameters())
    with pytest.raises(ZeroDivisionError), intercept(planted_model, visible_attention):
        raise ZeroDivisionError
    assert planted_model.config._attn_implementation == before


def test_context_and_suffix_equal_one_forward(planted_model, byte_tokenizer):
    ids = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))
    cache = prefill(planted_model, ids[:, :70], visible_attention)
    first = run_suffix(planted_model, cache, ids[:, 70:], visible_attention)
    again = run_suffix(planted_model, cache, ids[:, 70:], visible_attention)
    with torch.no_grad():
        whole = planted_model(ids, past_key_values=DynamicCache(config=planted_model.config)).logits
    assert torch.equal(first, again)  # a run leaves nothing behind
    assert torch.allclose(first, whole[:, 70:], atol=1e-4)
    # A map changes the result, and in "windowed" mode differently than in "full" mode.
    narrow = windowed_handler(HeadMap.uniform(LAYERS, HEADS, 2, 8))
    full = run_suffix(planted_model, cache, ids[:, 70:], narrow)
    windowed = run_suffix(planted_model, prefill(planted_model, ids[:, :70], narrow), ids[:, 70:], narrow)
    assert (full - first).abs().max() > 1e-3 and (windowed - full).abs().max() > 1e-3


def test_prompts_hold_the_answer_far_away_and_outside_the_suffix_question(byte_tokenizer):
    needles, texts = build_prompts(byte_tokenizer, None, "profile", 10, 3, 1024, 64, seed=3)
    held, _ = build_prompts(byte_tokenizer, None, "validation", 10, 3, 1024, 64, seed=3)
    for sample in needles:
        assert len(sample.context) == 1024
        answer = byte_tokenizer.decode(sample.suffix[sample.answer_start :])
        needle = byte_tokenizer.decode(sample.context[slice(*sample.needle)])
        question = byte_tokenizer.decode(sample.suffix[: sample.answer_start])
        last = answer.split()[-1].strip('."')
        assert last in needle and last not in question
    assert all(len(text.context) == 1024 and len(text.suffix) == 64 for text in texts)
    assert not {tuple(s.context) for s in needles} & {tuple(s.context) for s in held}


def test_layout_is_found_by_structure(planted_model):
    layout = decoder_layout(planted_model)
    assert (layout.num_layers, layout.num_kv_heads, layout.num_query_heads) == (LAYERS, HEADS, 2 * HEADS)
    assert layout.layers == (0, 1)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": 0.2, "tolerance": 0.1}, "both given"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"prefill": "later"}, "prefill is 'later'"),
        ({"windows": (64, 32)}, "windows is"),
        ({"mean_window": 8}, "mean_window is 8"),
        ({"needle_weight": -0.5}, "needle_weight is -0.5"),
        ({"needle_weight": float("nan")}, "needle_weight is nan"),
        ({"context": 64}, "context is 64"),
        ({"tolerance": {"speed": 1}}, "tolerance names 'speed'"),
        ({"tolerance": -1}, "expected a number >= 0"),
        ({"texts": []}, "texts is empty"),
        ({"gate_steps": 0}, "needs gates"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_bad_arguments_are_named(planted_model, byte_tokenizer, arguments, message):
    with pytest.raises(RedKnotError, match=message):
        profile_heads(planted_model, byte_tokenizer, **{**FAST, **arguments})


def test_the_needle_weight_is_what_the_search_minimises(planted_model, byte_tokenizer, monkeypatch):
    seen = []

    def noted(*args, objective, **more):
        seen.append(objective)
        return search_on(*args, objective=objective, **more)

    monkeypatch.setattr(api, "search_on", noted)
    arguments = FAST | {"budget": 1 / 6, "validate": False, "needle_weight": 0.2}
    profile = profile_heads(planted_model, byte_tokenizer, **arguments)
    assert seen == [Objective(text_kl=1.0, needle_kl=0.1, needle_misses=0.05)]
    assert profile.metadata["data"]["needle_weight"] == 0.2


def test_an_encoder_decoder_is_refused_by_name():
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(RedKnotError, match="T5ForConditionalGeneration is an encoder-decoder"):
        profile_heads(T5ForConditionalGeneration(config), None, **FAST)


@pytest.mark.parametrize("prefill_mode", ["windowed", "full"])
def test_the_work_of_a_gpu_batches_and_prompts_of_the_search(planted_model, byte_tokenizer, monkeypatch, prefill_mode):
    """What only a GPU does by default, run here with small numbers."""
    load = Workload(
        needles=4, texts=2, held_needles=4, held_texts=2, rows=64, text_sketches=4, needle_sketches=2, gate_steps=12,
        batch=2, search_needles=6, search_texts=2, search_rows=48, rounds=3, lengths=(1, 2, 4), singles=4, search_sketches=2,
        deployed=True, together=1, finalists=3, deployed_rounds=1, kinds=NEEDLE_KINDS,
    )  # fmt: skip
    monkeypatch.setattr("redknot_hf.heads.profiler.api.workload", lambda *_: load)
    seen = []
    search_on = api.search_on

    def spy(model, layout, prompts, **arguments):
        seen.append((len(prompts), arguments["mode"]))
        return search_on(model, layout, prompts, **arguments)

    monkeypatch.setattr(api, "search_on", spy)
    profile = profile_heads(planted_model, byte_tokenizer, budget=1 / 3, prefill=prefill_mode, **FAST)
    assert seen == [(4, prefill_mode)]  # three batches of needles, one of texts
    selection = profile.metadata["selection"]
    costs = [one["cost"] for one in selection["search"]]
    assert costs == sorted(costs, reverse=True) and costs[0] == min(selection["measured"].values())
    assert ("deployed" in selection) == ("deployed_search" in selection) == (prefill_mode == "windowed")
    if prefill_mode == "windowed":
        paid = selection["deployed"]
        assert paid[selection["chosen"]] == min(paid.values()) == selection["deployed_search"][0]["cost"]
        assert 2 <= len(paid) <= 3
    assert sum(name == "global" for row in profile.head_class for name in row) == 2
    assert profile.metadata["validation"]["needle"]["n"] == 4
