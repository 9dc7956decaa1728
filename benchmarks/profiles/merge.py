"""Join outputs of compare_rules.py: maps, results and rows of several runs in one folder, tables and picture made again.

    python benchmarks/profiles/merge.py OUT RUN [RUN ...] [--without ours]

OUT may be one of the runs. An entry (rule, budget, window, mode) is taken from the first run that has it. Runs must have
seen the same prompts: that is checked on what "all global" answered. Each run's environment is kept under "merged".
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import paired
from compare_rules import identity, write
from plot_rules import plot

Entry = dict[str, Any]


def read(folder: Path) -> tuple[dict[str, Any], list[Entry], list[Entry], list[Entry]]:
    """Environment, maps, results and rows of one run."""
    document = json.loads((folder / "results.json").read_text())
    maps = json.loads((folder / "maps.json").read_text())["maps"]
    rows = json.loads(gzip.decompress((folder / "rows.json.gz").read_bytes()))
    return document["environment"], maps, document["results"], rows


def full_answers(rows: list[Entry]) -> dict[str, list[Any]]:
    """What the full cache answered at each set of needles; half of the long ones are used with windowed prefill."""
    whole = next(row for row in rows if row["mode"] == "full")
    return {name: [(prompt[0], prompt[4]) for prompt in whole[name]] for name in ("needle_short", "needle_long")}


def join(runs: list[Path], without: list[str]) -> tuple[dict[str, Any], list[Entry], list[Entry], list[Entry]]:
    """As `read`, of all runs together; of all but the first, no rules whose name starts with one of `without`."""
    environment, *parts = read(runs[0])
    answers = full_answers(parts[2])
    for folder in runs[1:]:
        other, *more = read(folder)
        if full_answers(more[2]) != answers:
            raise SystemExit(f"{folder}: the full cache answered otherwise than in {runs[0]}; other prompts or model")
        for old, new in zip(parts, more, strict=True):
            known = {identity(entry) for entry in old}
            old += [e for e in new if identity(e) not in known and not e["rule"].startswith(tuple(without))]
        environment.setdefault("merged", []).append(other)
    return environment, *parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--without", nargs="*", default=[], help="rules of later runs that are left out")
    args = parser.parse_args()
    environment, maps, results, rows = join(args.runs, args.without)
    results.sort(key=lambda e: (e["mode"], e["window"], not e["rule"].startswith("all global")))  # stable
    for entry in (*maps, *results):
        if entry["profile"] and not (args.out / entry["profile"]).exists():
            entry["profile"] = None
    (args.out / "maps.json").write_text(json.dumps({"environment": environment, "maps": maps}) + "\n")
    write(args.out, environment, results, rows)
    paired.write(rows, args.out / "paired.csv")
    plot(args.out / "results.json", args.out / "rules.png")


if __name__ == "__main__":
    main()
