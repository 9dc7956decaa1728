"""`redknot eval` from the command line: files, JSON, one-line errors."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from redknot_hf import HeadProfile
from redknot_hf.cli import main
from redknot_hf.errors import RedKnotError
from redknot_hf.eval.documents import read_questions, read_texts
from redknot_hf.eval.report import COLUMNS


@pytest.fixture
def base(tiny_folder, tiny_model, tmp_path):
    profile = HeadProfile.uniform(tiny_model.config, sink=4, window=60, global_heads={(0, 1), (1, 0)})
    profile.save(tmp_path / "p.json")
    return ["eval", tiny_folder, "--profile", str(tmp_path / "p.json"), "--device", "cpu", "--no-progress"]


def test_results_in_every_form(base, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*base, "--tasks", "single,ppl", "--contexts", "600,700", "--n", "2", "--out", str(out)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "single needle" in text and "streaming" in text and "[0.000, 0.658]" in text  # 0 of 2: Wilson
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert {(r["task"], r["context"], r["method"]) for r in rows} == {
        (t, c, m)
        for t in ("single", "ppl")
        for c in ("600", "700")
        for m in ("full", "ours", "window", "streaming", "random", "blind")
    }
    full = next(r for r in rows if r["method"] == "full" and r["context"] == "600")
    assert float(full["bytes_of_full"]) == 1.0 and int(full["kv_bytes"]) == 600 * 4 * 2 * 8 * 4
    assert next(r for r in rows if r["method"] == "random")["n"] == "6", "three draws pooled"
    assert (out / "results.png").stat().st_size > 10_000

    assert main([*arguments, "--json"]) == 0  # nothing is left to do: the same numbers again
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "results.json").read_text())
    assert [str(e["value"]) for e in found["results"]] == [r["value"] for r in rows]
    assert found["settings"]["contexts"] == [600, 700] and "torch" in found["versions"]


QUESTION = {
    "question": "Who?",
    "answer": "Ada",
    "context": {"title": ["A", "B"], "sentences": [["Ada did. ", "Yes."], ["No."]]},
}


def test_questions_in_all_known_forms(tmp_path):
    forms = {
        "columns.jsonl": json.dumps(QUESTION) + "\n",
        "pairs.json": json.dumps([{**QUESTION, "context": [["A", ["Ada did. ", "Yes."]], ["B", ["No."]]]}]),
        "nq.jsonl": json.dumps(
            {
                "question": "Who?",
                "answers": ["Ada"],
                "ctxs": [{"title": "A", "text": "Ada did. Yes."}, {"title": "B", "text": "No."}],
            }
        ),
        "wrapped.json": json.dumps({"data": [QUESTION]}),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        (question,) = read_questions(tmp_path / name)
        assert question.answers == ("Ada",) and question.documents == (("A", "Ada did. Yes."), ("B", "No."))
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write(forms["columns.jsonl"])
    assert len(read_questions(tmp_path)) == 5
    (tmp_path / "t.txt").write_text("Plain.")
    assert read_texts(tmp_path) == ["Plain."]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"question": "Who?"}', "record 1 is no question"),
        ('{"question": "Who?", "answer": "", "context": [["A", "b"]]}', "record 1 is no question"),
        ("[1]", "record 1 is no question"),
        ("{", "not JSON"),
        ("", "no questions"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_damaged_questions_are_named(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RedKnotError, match=message):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    "change, message",
    [
        (["--tasks", "chess"], "--tasks: 'chess' is no task"),
        (["--tasks", "qa"], "task qa needs --data"),
        (["--data", "/nowhere"], "no such file"),
        (["--methods", "magic"], "'magic' is unknown"),
        (["--prefill", "half"], "--prefill 'half'"),
        (["--profile", "/nowhere.json"], "nowhere.json"),
        (["--dtype", "int3"], "--dtype 'int3'"),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, capsys, change, message):
    assert main([*base, "--contexts", "600", "--n", "1", "--out", str(tmp_path / "o"), *change]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("redknot: error:")]
    assert len(lines) == 1 and message in lines[0]
