"""The committed comparison of head rules: tables say what the rows of every prompt say, and joining runs keeps both."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks/results/h200/profiles"


@pytest.fixture
def merge(monkeypatch):
    folder = ROOT / "benchmarks/profiles"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("merge")
    for path in folder.glob("*.py"):  # plain names, which other benchmarks may have too
        sys.modules.pop(path.stem, None)


def table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((COMMITTED / name).read_text().splitlines()))


def test_tables_are_means_of_the_rows(merge):
    _, maps, results, rows = merge.read(COMMITTED)
    by_name = {merge.identity(row): row for row in rows}
    assert len(by_name) == len(results) == len({merge.identity(e) for e in results})
    assert by_name.keys() <= {merge.identity(e) for e in maps}
    for result, line in zip(results, table("results.csv"), strict=True):
        row = by_name[merge.identity(result)]
        kl = [prompt[1] for prompt in row["text"]]
        hits = [prompt[3] for prompt in row["needle_short"]]
        assert float(line["text_kl"]) == pytest.approx(sum(kl) / len(kl), abs=2e-5)
        assert float(line["short_accuracy"]) == pytest.approx(sum(hits) / len(hits), abs=1e-5)
        assert int(line["text_n"]) == len(kl) == 100


def test_differences_are_of_the_same_prompts(merge, monkeypatch):
    monkeypatch.setattr(merge.paired, "interval", lambda values: (sum(values) / len(values), 0.0, 0.0))
    lines = {tuple(line.values())[:5]: line for line in table("paired.csv")}
    found = list(merge.paired.compare(merge.read(COMMITTED)[3]))
    assert len(found) == len(lines)
    for line in found:
        committed = lines[tuple(map(str, line.values()))[:5]]
        assert line["text_kl"] == pytest.approx(float(committed["text_kl"]), abs=1e-5)


def test_joined_runs_keep_the_first_and_add_what_is_new(merge, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(COMMITTED, other)
    document = json.loads((other / "results.json").read_text())
    for entry in document["results"]:
        entry["text"]["kl"] = -1.0
    new, left_out = [entry for entry in document["results"] if entry["rule"] == "gates"][-2:]
    new["window"] = left_out["window"] = 1024  # which no committed entry has
    left_out["rule"] = "ours, again"
    (other / "results.json").write_text(json.dumps(document))
    before = merge.read(COMMITTED)[2]
    environment, _, results, _ = merge.join([COMMITTED, other], ["ours"])
    assert results[:-1] == before
    assert results[-1]["window"] == 1024 and results[-1]["text"]["kl"] == -1.0
    assert environment["merged"][-1] == document["environment"]

    rows = merge.read(other)[3]
    rows[0]["needle_short"][0][4] = not rows[0]["needle_short"][0][4]  # another answer of the full cache
    (other / "rows.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    with pytest.raises(SystemExit, match="other prompts or model"):
        merge.join([COMMITTED, other], [])
