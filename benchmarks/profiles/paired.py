"""Ours against every other rule on the same prompts: differences of means with 95 % intervals (bootstrap over prompts).

    python benchmarks/profiles/paired.py rows.json.gz paired.csv

Text KL: negative is better. Accuracies: positive is better.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (("text_kl", "text", 1), ("accuracy_short", "needle_short", 3), ("accuracy_long", "needle_long", 3))
"""Name, set of prompts, index in a prompt's row."""


def interval(differences: Sequence[float], draws: int = 1000) -> tuple[float, float, float]:
    """Mean and percentile interval."""
    rng, n = random.Random(0), len(differences)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(draws))
    return sum(differences) / n, means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def compare(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One line per map of ours and other rule at the same budget, window and mode."""
    places = ("mode", "window", "budget")
    for mine in rows:
        if not mine["rule"].startswith("ours") or "chosen for" in mine["rule"]:
            continue
        for other in rows:
            if other["rule"].startswith("ours") or any(other[key] != mine[key] for key in places):
                continue
            line = {**{key: other[key] for key in places}, "ours": mine["rule"], "rule": other["rule"]}
            for name, group, index in COLUMNS:
                pairs = zip(mine[group], other[group], strict=True)
                mean, low, high = interval([float(a[index]) - float(b[index]) for a, b in pairs])
                line |= {name: round(mean, 5), f"{name}_low": round(low, 5), f"{name}_high": round(high, 5)}
            yield line


def write(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """The table as CSV; nothing if there is nothing to compare."""
    lines = list(compare(rows))
    if lines:
        with open(target, "w", newline="") as file:
            table = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(lines)


if __name__ == "__main__":
    with gzip.open(sys.argv[1], "rt") as source:
        write(json.load(source), Path(sys.argv[2]))
