"""Draws results.json of `frontier.py`: KL and needle accuracy against the share of FFN rows, time against FLOPs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5))
    names = sorted({entry["importance"] for entry in report["quality"]} - {"dense"})
    for number, name in enumerate(names):
        for axis, kind, value in ((axes[0], "text", "kl"), (axes[1], "needle", "match")):
            points = [
                (entry["ffn_rows"], max(entry[value], 1e-5) if value == "kl" else entry[value])
                for entry in report["quality"]
                if entry["importance"] == name and entry["set"].startswith(kind)
            ]
            if points:
                x, y = zip(*sorted(points), strict=True)
                axis.plot(x, y, "o", color=f"C{number}", label=name, alpha=0.7)
    axes[0].set(yscale="log", xlabel="share of FFN rows run", ylabel="KL on text (nats per token)")
    axes[0].axhline(0.008, color="grey", linewidth=0.8)
    axes[1].set(xlabel="share of FFN rows run", ylabel="needle exact match")
    for entry in report["quality"]:
        if entry["importance"] == "dense" and "match" in entry:
            axes[1].axhline(entry["match"], color="grey", linewidth=0.8)
    axes[0].legend(fontsize=7)
    timing = report.get("time")
    if timing:
        entries = timing["configurations"]
        dense = entries[0]
        for entry in entries:
            x, y = entry["flops"]["total"] / dense["flops"]["total"], entry["seconds"] / dense["seconds"]
            axes[2].plot(x, y, "o", label=entry["name"])
        axes[2].plot([0.4, 1], [0.4, 1], color="grey", linewidth=0.8)
        axes[2].set(xlabel="FLOPs of the prefill / dense", ylabel="seconds / dense")
        axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_name("frontier.png"))
