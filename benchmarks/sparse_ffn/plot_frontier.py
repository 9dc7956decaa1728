"""Draws results.json of `frontier.py` and, if given, the check of `fit.py`: cost in quality against the share of FFN rows.

python benchmarks/sparse_ffn/plot_frontier.py results.json picture.png [fit.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SIGNS = "os^D"  # of context lengths
FLOOR = 1e-5  # of a logarithmic axis
BAR = 0.008


def plot(report: dict[str, Any], path: Path, fit: dict[str, Any] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timing = report.get("time")
    figure, axes = pyplot.subplots(1, 3 if timing else 2, figsize=(15 if timing else 11, 4.8))
    entries = [
        {**entry, "kind": kind, "context": int(context)}
        for entry in report["quality"]
        for kind, context in [entry["set"].split("-")]
    ]
    contexts = sorted({entry["context"] for entry in entries})
    names = sorted({entry["importance"] for entry in entries} - {"dense", "preset"})
    for axis, kind, value in ((axes[0], "text", "kl"), (axes[1], "needle", "lost")):
        for entry in entries:
            if entry["kind"] == "needle":
                same = [e for e in entries if e["set"] == entry["set"] and e["schedule"] == "dense"]
                if entry["n"] == same[0]["n"]:  # of fewer prompts the dense model finds another share
                    entry["lost"] = entry["match"] - same[0]["match"]
        for number, name in enumerate(names):
            for sign, context in zip(SIGNS, contexts, strict=False):
                found = [e for e in entries if (e["importance"], e["kind"], e["context"]) == (name, kind, context)]
                found = [entry for entry in found if value in entry]
                x = [entry["ffn_rows"] for entry in found]
                y = [max(entry["kl"], FLOOR) if value == "kl" else entry["lost"] for entry in found]
                label = name.replace("attention_norm", "attention_norm (the paper's)") if sign == SIGNS[0] else None
                axis.plot(x, y, sign, color=f"C{number}", label=label, alpha=0.75, markersize=6)
        for sign, context in zip(SIGNS, contexts, strict=False):
            found = [e for e in (fit or {}).get("check", []) if e["context"] == context and _fitted(e["schedule"])]
            x = [e["ffn_rows"] for e in found if kind == "text" or e["needles"]]
            if kind == "text":
                y = [e["kl_text"] for e in found]
            else:
                dense = [e for e in fit["check"] if e["context"] == context and e["schedule"] == "dense"] if fit else []
                y = [e["needle_accuracy"] - dense[0]["needle_accuracy"] for e in found if e["needles"]]
            label = "fitted shares (presets)" if sign == SIGNS[0] else None
            axis.plot(x, y, sign, color="black", label=label if x else None, markersize=8, fillstyle="none")
    axes[0].set(yscale="log", xlabel="share of FFN rows run", ylabel="KL on text (nats per token)")
    axes[0].axhline(BAR, color="grey", linewidth=0.8)
    axes[1].axhline(0, color="grey", linewidth=0.8)
    axes[1].set(xlabel="share of FFN rows run", ylabel="needle exact match, less the dense model's")
    signs = ", ".join(f"{s} {c:,} tokens" for s, c in zip(("circles", "squares", "triangles"), contexts, strict=False))
    axes[0].set_title(signs, fontsize=9)
    axes[0].legend(fontsize=7)
    if timing:
        found = timing["configurations"]
        dense = found[0]
        for entry in found:
            x, y = entry["flops"]["total"] / dense["flops"]["total"], entry["seconds"] / dense["seconds"]
            axes[2].plot(x, y, "o", label=entry["name"])
        axes[2].plot([0.4, 1], [0.4, 1], color="grey", linewidth=0.8)
        axes[2].set(xlabel="FLOPs of the prefill / dense", ylabel="seconds / dense")
        axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _fitted(name: str) -> bool:
    return name.startswith("fitted") and "," not in name


if __name__ == "__main__":
    results, picture, *rest = map(Path, sys.argv[1:])
    plot(json.loads(results.read_text()), picture, json.loads(rest[0].read_text()) if rest else None)
