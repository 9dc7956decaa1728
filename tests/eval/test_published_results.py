"""The comparison says so where ours loses, and the page shows what the committed rows say."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("kvpress_compare", ROOT / "benchmarks" / "kvpress" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(method, level, kl, hit, allocated):
    return [
        {"task": task, "index": i, "method": method, "level": level, "kl": kl + 0.001 * i, "hit": hit, "top1": 1.0, "nll": 1.0,
         "allocated": allocated, "visible": allocated, "dense": 100}
        for task in ("single", "kv_short", "ppl") for i in range(12)
    ]  # fmt: skip


def test_a_loss_is_called_one(compare):
    found = compare.summarise(
        rows("ours", 0.5, 0.2, False, 50) + rows("better", 0.5, 0.1, True, 50) + rows("worse", 0.5, 0.3, False, 100)
    )
    of = {(e["method"], e["task"]): e for e in found}
    for task in ("needle", "key-value", "text"):
        assert of["better", task]["kl_ahead"] == "theirs" and of["worse", task]["kl_ahead"] == "ours"
        assert of["better", task]["kl_difference"] == pytest.approx(0.1)
    assert of["better", "needle"]["hit_ahead"] == "theirs" and of["worse", "needle"]["hit_ahead"] == "even"
    assert of["worse", "needle"]["allocated"] == 1.0 and of["ours", "needle"]["allocated"] == 0.5
    assert "hit_ahead" not in of["better", "text"]
    text = compare.markdown(found, [], [])
    assert text.count("theirs") == 5 and "| better | 50% | 50% | 1.00 [0.76, 1.00]" in text


def test_equal_bytes_are_those_that_a_press_allocates(compare):
    """A press that cuts meets ours at its level; one that only masks meets ours at the dense bytes. A loss is in bold."""
    measured = (
        rows("ours", 0.5, 0.2, False, 50) + rows("ours", 1.0, 0.0, True, 99)
        + rows("cuts", 0.5, 0.1, True, 50) + rows("masks", 0.5, 0.1, False, 100)
    )  # fmt: skip
    found = {(e["press"], e["measure"]): e for e in compare.equal_bytes(measured)}
    assert len(found) == 2 * 5
    cut, masked = found["cuts", "text KL"], found["masks", "text KL"]
    assert (cut["allocated_ours"], cut["allocated"], cut["ahead"]) == (0.5, 0.5, "theirs") and not cut[
        "at_least_as_good"
    ]
    assert (masked["allocated_ours"], masked["allocated"], masked["ahead"]) == (0.99, 1.0, "ours")
    assert cut["ours"] - cut["theirs"] == pytest.approx(0.1) and masked["ours"] - masked["theirs"] == pytest.approx(
        -0.1
    )
    lines = compare.bar(list(found.values()))
    assert sum(line.count("**0.") for line in lines) == 5  # every measure against "cuts"
    assert "is at least as good by the mean in 5; in 5 of the other 5" in "\n".join(lines)


def test_joined_files_must_be_of_one_profile_and_dtype(compare, tmp_path):
    heads = [{"prompts": "a", "profile": name, "device": name, "command": f"run {name}"} for name in "xxy"]
    row = {"task": "ppl", "index": 0}
    text = "\n".join(json.dumps(line) for line in (heads[0], row, heads[1], row))
    (tmp_path / "ours.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    head, found = compare.load(tmp_path / "ours.jsonl")
    assert head["command"] == "run x" and found == [row, row]
    (tmp_path / "kvpress.jsonl").write_text("\n".join(json.dumps(line) for line in (*heads, row)))
    with pytest.raises(SystemExit, match="different profile"):
        compare.load(tmp_path / "kvpress.jsonl")


def test_the_table_is_of_the_committed_rows(compare, tmp_path, monkeypatch):
    committed = ROOT / "benchmarks" / "results" / "kvpress"
    shutil.copytree(committed, tmp_path / "kvpress")
    (tmp_path / "kvpress" / "table.md").unlink()
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "kvpress")])
    compare.main()
    for name in ("table.md", "results.csv", "results.json"):
        assert (tmp_path / "kvpress" / name).read_text() == (committed / name).read_text(), name


def test_prompts_must_be_the_same(compare, tmp_path, monkeypatch):
    for name, digest in (("ours", "a"), ("kvpress", "b")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompts": digest}) + "\n")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="different prompts"):
        compare.main()


@pytest.mark.skipif(
    not list((ROOT / "benchmarks" / "results" / "eval").glob("*/rows.jsonl.gz")), reason="no committed rows"
)
def test_the_page_shows_the_committed_results():
    script = ROOT / "benchmarks" / "eval" / "tables.py"
    assert subprocess.run([sys.executable, script, "--check"], cwd=ROOT).returncode == 0
