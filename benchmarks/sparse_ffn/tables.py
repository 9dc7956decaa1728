"""Writes the tables of docs/sparse-ffn.md from what `fit.py` and `frontier.py` wrote, and the picture beside them.

    python benchmarks/sparse_ffn/tables.py [--fit FIT.json] [--frontier RESULTS.json] [--docs docs]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; everything else on the page stays. Presets are named by
the bands they hold: a schedule of the fit that is a preset's is called by the preset's name.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from fit import schedule
from plot_frontier import plot

from redknot_hf.sparse_ffn import PRESETS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "h100" / "sparse_ffn"
NAMES = {
    "attention_norm": "`attention_norm` (the paper's)",
    "random": "random rows",
    "ffn_norm": "norm of the FFN's own output (saves nothing)",
    "none": "no rows",
}


def number(value: float | None, error: float | None = None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def fit_table(fit: dict[str, Any]) -> list[str]:
    """One line per schedule and context length."""
    presets = {(preset.schedule.bands, preset.schedule.fill): name for name, preset in PRESETS.items()}
    called = {}
    for name, found in fit["found"].items():
        keeps = {int(layer): keep for layer, keep in found["keeps"].items()}
        own = schedule(keeps, max(keeps) + 1, **found["options"])  # a choice ends with the last layer
        key = (own.bands, own.fill)
        called[f"fitted {name}"] = f"`{presets[key]}`" if key in presets else f"fitted {name}"
    dense = {entry["context"]: entry for entry in fit["check"] if entry["schedule"] == "dense"}
    lines = ["| schedule | context | FFN rows run | KL on text | n | needles, of the dense model's | n |"]
    lines.append("|---|---|---|---|---|---|---|")
    for entry in fit["check"]:
        name = entry["schedule"]
        if name == "dense":
            continue
        start = max((key for key in called if name.startswith(key)), key=len, default=None)
        if start is not None:
            name = called[start] + name[len(start) :].replace("attention_norm", "`attention_norm`")
        needles = ""
        if entry["needles"]:
            needles = f"{entry['needle_accuracy']:.2f} of {dense[entry['context']]['needle_accuracy']:.2f}"
        lines.append(
            f"| {name} | {entry['context']} | {entry['ffn_rows']:.1%} | {number(entry['kl_text'], entry['kl_stderr'])} | "
            f"{entry['n']} | {needles} | {entry['needles'] or ''} |"
        )
    return lines


def frontier_table(report: dict[str, Any]) -> list[str]:
    """One line per schedule, text and needles at every context length beside each other."""
    cells: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in report["quality"]:
        cells[entry["schedule"]][entry["set"]] = entry
    dense = cells.pop("dense")
    parts = sorted(dense, key=lambda part: (not part.startswith("text"), int(part.split("-")[1])))
    head = [
        f"KL at {part.split('-')[1]} (n = {dense[part]['n']})"
        if part.startswith("text")
        else f"needles at {part.split('-')[1]} (n = {dense[part]['n']}, dense {dense[part]['match']:.2f})"
        for part in parts
    ]
    lines = [
        f"| importance, from layer, share kept | FFN rows run | {' | '.join(head)} |",
        "|---" * (2 + len(head)) + "|",
    ]

    def order(item: tuple[str, Any]) -> tuple[Any, ...]:
        found = next(iter(item[1].values()))
        kinds = ["received_attention", "attention_norm", "hidden_change", "random", "ffn_norm", "none"]
        return kinds.index(found["importance"]), -found["ffn_rows"]

    shown = [(name, row) for name, row in cells.items() if " from " in name]
    for name, row in sorted(shown, key=order):
        found = re.fullmatch(r"(\w+) from (\d+)(?: keep ([\d.]+))?", name)
        assert found is not None, name
        label = NAMES.get(found[1], f"`{found[1]}`") + f", {found[2]}" + (f", {found[3]}" if found[3] else "")
        found_cells = []
        for part in parts:
            entry = row.get(part)
            if entry is None:
                found_cells.append("")
                continue
            value = f"{entry['match']:.2f}" if "match" in entry else number(entry["kl"], entry["kl_stderr"])
            found_cells.append(value + ("" if entry["n"] == dense[part]["n"] else f" (n = {entry['n']})"))
        rows = next(row[part]["ffn_rows"] for part in parts if part in row)
        lines.append(f"| {label} | {rows:.1%} | {' | '.join(found_cells)} |")
    return lines


def put(page: str, name: str, lines: list[str]) -> str:
    """The page with these lines between the marks of this name."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(page):
        raise SystemExit(f"the page has no <!-- table: {name} -->")
    return pattern.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, default=RESULTS / "fit.json")
    parser.add_argument("--frontier", type=Path, default=RESULTS / "frontier.json")
    parser.add_argument("--docs", type=Path, default=RESULTS.parents[3] / "docs")
    args = parser.parse_args()
    fit, report = json.loads(args.fit.read_text()), json.loads(args.frontier.read_text())
    path = args.docs / "sparse-ffn.md"
    page = put(path.read_text(), "fit", fit_table(fit))
    path.write_text(put(page, "frontier", frontier_table(report)))
    plot(report, args.docs / "pictures" / "sparse-ffn-frontier.png", fit)


if __name__ == "__main__":
    main()
