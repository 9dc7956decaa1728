"""The runner: rows, resuming, batches, bytes, and a reference that must come out exactly."""

from __future__ import annotations

import json
import math

import pytest
import torch

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import PoolExhausted, RedKnotError
from redknot_hf.eval import Evaluation, evaluate
from redknot_hf.eval.generate import answer
from redknot_hf.eval.methods import Method, build_methods
from redknot_hf.eval.prompts import PromptMaker
from redknot_hf.eval.report import summarise
from redknot_hf.eval.run import read_rows
from redknot_hf.eval.tasks import make_examples

TOKENS = 600


@pytest.fixture(scope="module")
def profile(tiny_model):
    return HeadProfile.uniform(tiny_model.config, sink=4, window=60, global_heads={(0, 1), (1, 0)})


def small(**other):
    return Evaluation(
        **{"tasks": ("single", "ppl"), "contexts": (TOKENS,), "n": 3, "random_maps": 1, "page_size": 16, **other}
    )


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def test_rows_and_resuming(tiny_model, byte_tokenizer, profile, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = evaluate(tiny_model, byte_tokenizer, profile, small(), path)
    assert len(rows) == 2 * 3 * 6
    head, again = read_rows(path)
    assert again == rows and head["dtype"] == "float32" and head["settings"]["n"] == 3

    # an interruption in the middle of a line: that row is made again, the others are not
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], lines[20][:30]]))
    made = []
    from redknot_hf.eval import run

    real = run.answer
    monkeypatch.setattr(
        run, "answer", lambda m, t, group, method: made.append(method.name) or real(m, t, group, method)
    )
    resumed = evaluate(tiny_model, byte_tokenizer, profile, small(), path)
    key = lambda row: (row["task"], row["index"], row["method"])  # noqa: E731
    assert sorted(without_times(resumed), key=key) == sorted(without_times(rows), key=key)
    assert resumed[:19] == rows[:19] and len(made) <= 1

    # the same in the middle of a batch: no row comes twice
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:10]) + "\n")
    batched = evaluate(tiny_model, byte_tokenizer, profile, small(batch_tokens=3 * TOKENS), path)
    assert sorted(map(key, batched)) == sorted(map(key, rows))
    path.write_text("\n".join(lines) + "\n")

    more = evaluate(tiny_model, byte_tokenizer, profile, small(n=4), path)
    assert len(more) == 2 * 4 * 6 and without_times(more)[: len(rows)] == without_times(resumed)
    for change, word in (
        (small(seed=1), "seed"),
        (small(prefill="full"), "prefill"),
        (small(texts=["Other."]), "texts"),
    ):
        with pytest.raises(RedKnotError, match=f"made with {word}="):
            evaluate(tiny_model, byte_tokenizer, profile, change, path)
    with pytest.raises(RedKnotError, match="another profile"):
        evaluate(tiny_model, byte_tokenizer, HeadProfile.all_global(tiny_model.config), small(), path)
    path.write_text("{}\n")
    with pytest.raises(RedKnotError, match="no file of rows"):
        evaluate(tiny_model, byte_tokenizer, profile, small(), path)


@pytest.mark.parametrize("prefill", ["windowed", "full"])
def test_a_batch_answers_as_its_rows_alone(tiny_model, byte_tokenizer, profile, prefill):
    """Questions of a batch have different lengths: they are padded between context and question."""
    examples = make_examples("multiquery", PromptMaker(byte_tokenizer, TOKENS), 4)
    assert len({len(e.question) for e in examples}) > 1
    for method in build_methods(tiny_model.config, profile, TOKENS, prefill=prefill, page_size=16, random_maps=1):
        together = answer(tiny_model, byte_tokenizer, examples, method).texts
        alone = [answer(tiny_model, byte_tokenizer, [e], method).texts[0] for e in examples]
        assert together == alone, method.name
        assert len(set(alone)) > 1, "all answers alike would hide a mix-up of rows"


def test_answers_are_what_generate_gives(tiny_model, byte_tokenizer, profile):
    examples = make_examples("single", PromptMaker(byte_tokenizer, TOKENS), 2)
    for name in ("full", "ours"):
        (method,) = build_methods(tiny_model.config, profile, TOKENS, [name], page_size=16)
        for example in examples:
            ids = torch.tensor([[*example.context, *example.question]])
            cache = method.make_cache()
            with torch.no_grad():
                tiny_model(ids[:, : len(example.context)], past_key_values=cache)
            out = tiny_model.generate(
                ids, past_key_values=cache, max_new_tokens=example.max_new_tokens, do_sample=False, pad_token_id=0
            )
            expected = byte_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer(tiny_model, byte_tokenizer, [example], method).texts == [expected]


def test_bytes_are_read_off_the_caches(tiny_model, byte_tokenizer, profile):
    examples = make_examples("single", PromptMaker(byte_tokenizer, TOKENS), 3)
    full, ours, streaming, blind = build_methods(
        tiny_model.config, profile, TOKENS, ["full", "ours", "streaming", "blind"], page_size=16
    )
    token = 2 * 8 * 4  # K and V of one head: 8 numbers of 4 bytes
    found = answer(tiny_model, byte_tokenizer, examples, full)
    assert found.kv_bytes == found.live_bytes == 4 * TOKENS * token
    cache = RedKnotCache(tiny_model.config, profile, page_size=16)
    with torch.no_grad():
        tiny_model(torch.tensor([e.context for e in examples]), past_key_values=cache)
    report = cache.memory_report()
    found = answer(tiny_model, byte_tokenizer, examples, ours)
    assert found.live_bytes == report.live // 3 and found.kv_bytes == report.allocated // 3
    assert report.live // 3 >= (2 * TOKENS + 2 * 64) * token
    # never fewer than ours, and at most one page per head more
    same = answer(tiny_model, byte_tokenizer, examples, streaming).live_bytes
    assert (2 * TOKENS + 2 * 64) * token <= same < found.live_bytes + 4 * 16 * token
    assert answer(tiny_model, byte_tokenizer, examples, blind).live_bytes == 0


def test_an_exact_profile_has_no_distance_from_the_full_cache(tiny_model, byte_tokenizer, profile, tmp_path):
    exact = HeadProfile.all_global(tiny_model.config)
    rows = evaluate(tiny_model, byte_tokenizer, exact, small(tasks=("ppl",), methods=("full", "ours")), tmp_path / "a")
    by = {(r["method"], r["index"]): r for r in rows}
    for index in range(3):
        assert abs(by["ours", index]["kl"]) < 1e-6 and by["ours", index]["top1"] == 1.0
        assert by["ours", index]["score"] == pytest.approx(by["full", index]["score"], abs=1e-5)
    rows = evaluate(
        tiny_model, byte_tokenizer, profile, small(tasks=("ppl",), methods=("full", "ours")), tmp_path / "b"
    )
    assert all(row["kl"] > 1e-3 for row in rows if row["method"] == "ours"), "a real window must show"


def test_perplexity_is_that_of_a_forward_over_the_whole_text(tiny_model, byte_tokenizer, profile, tmp_path):
    rows = evaluate(tiny_model, byte_tokenizer, profile, small(tasks=("ppl",), methods=("full",)), tmp_path / "a")
    for row, example in zip(rows, make_examples("ppl", PromptMaker(byte_tokenizer, TOKENS), 3), strict=True):
        ids = torch.tensor([[*example.context, *example.question]])
        with torch.no_grad():
            logits = tiny_model(ids).logits[0, TOKENS - 1 : -1].float()
        assert row["score"] == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, ids[0, TOKENS:])), abs=1e-4
        )
    (entry,) = summarise(rows)
    assert entry["value"] == pytest.approx(math.exp(sum(r["score"] for r in rows) / 3), rel=1e-3)
    assert entry["low"] <= entry["value"] <= entry["high"]


def test_a_wrong_answer_scores_nothing_and_a_right_one_everything(
    tiny_model, byte_tokenizer, profile, tmp_path, monkeypatch
):
    """The scores come from the generated text: a model that is made to say the reference is right, another is wrong."""
    from redknot_hf.eval import run

    real = run.answer

    def oracle(model, tokenizer, group, method: Method):
        found = real(model, tokenizer, group, method)
        if method.name == "ours":
            found.texts = [f"it is {' and '.join(e.references)}." for e in group]
        elif method.name == "window":
            found.texts = [f"it is {e.references[0]}." for e in group]
        else:
            found.texts = [f"it is 9{e.references[0]}." for e in group]
        return found

    monkeypatch.setattr(run, "answer", oracle)
    rows = evaluate(tiny_model, byte_tokenizer, profile, small(tasks=("single", "multivalue")), tmp_path / "rows")
    value = {(e["task"], e["method"]): (e["value"], e["low"], e["high"]) for e in summarise(rows)}
    assert value["single", "ours"][0] == 1.0 and value["single", "ours"][1] < 0.5
    assert value["multivalue", "ours"][0] == 1.0 and value["multivalue", "window"] == (0.25, 0.25, 0.25)
    assert value["single", "full"][0] == value["single", "random"][0] == 0.0


def test_settings_are_checked_before_anything_runs(tiny_model, byte_tokenizer, profile, tmp_path):
    for change, message in (
        ({"tasks": ("nope",)}, "'nope' is no task"),
        ({"tasks": ("qa",)}, "needs --data"),
        ({"contexts": (32,)}, "too few"),
        ({"contexts": (4000,)}, "4096 positions"),
        ({"n": 0}, "--n 0"),
        ({"prefill": "some"}, "--prefill 'some'"),
    ):
        with pytest.raises(RedKnotError, match=message):
            evaluate(tiny_model, byte_tokenizer, profile, small(**change), tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_every_row_is_json(tiny_model, byte_tokenizer, profile, tmp_path):
    evaluate(tiny_model, byte_tokenizer, profile, small(tasks=("kv_short",), n=1), tmp_path / "rows")
    for line in (tmp_path / "rows").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, PoolExhausted])
def test_a_batch_too_large_for_the_device_is_made_in_halves(
    tiny_model, byte_tokenizer, profile, tmp_path, monkeypatch, error
):
    """The same rows as without batches, in the order of the prompts; a single prompt that does not fit is an error."""
    from redknot_hf.eval import run

    alone = evaluate(tiny_model, byte_tokenizer, profile, small(n=5), tmp_path / "alone.jsonl")
    room = 2

    def short(real):
        def made(*args):
            group = next(a for a in args if isinstance(a, (list, tuple)) and a)
            if len(group) > room:
                raise error("no room")
            return real(*args)

        return made

    for name in ("answer", "continue_text"):
        monkeypatch.setattr(run, name, short(getattr(run, name)))
    rows = evaluate(tiny_model, byte_tokenizer, profile, small(n=5, batch_tokens=5 * TOKENS), tmp_path / "batch.jsonl")
    of = {(r["task"], r["method"], r["index"]): r for r in rows}
    assert len(of) == len(rows) == len(alone)
    for row in alone:
        other = of[row["task"], row["method"], row["index"]]
        assert other["score"] == pytest.approx(row["score"], abs=1e-4), row
        assert other.get("answer") == row.get("answer")
    assert [r["index"] for r in rows if (r["task"], r["method"]) == ("single", "ours")] == list(range(5))
    room = 0
    with pytest.raises(error, match="no room"):
        evaluate(tiny_model, byte_tokenizer, profile, small(n=1), tmp_path / "none.jsonl")
