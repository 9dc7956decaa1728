"""The comparison says so where ours loses, and the page shows what the committed rows say."""

from __future__ import annotations

import importlib.util
import json
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
