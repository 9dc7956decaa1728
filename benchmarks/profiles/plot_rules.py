"""Draw results.json of compare_rules.py: text KL, needle KL and needle accuracy over the budget, one line per rule.

python benchmarks/profiles/plot_rules.py results.json rules.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PANELS = (
    ("text", "kl", "KL on text (nats per token)", True),
    ("needle_short", "kl", "KL at the needle's answer, short context", True),
    ("needle_short", "accuracy", "needle accuracy, short context", False),
    ("needle_long", "accuracy", "needle accuracy, long context", False),
)


def plot(source: Path, target: Path) -> None:
    """One row of panels per mode and window. Random draws are grey; dotted lines are all local and the full cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results: list[dict[str, Any]] = json.loads(Path(source).read_text())["results"]
    groups = sorted({(entry["window"], entry["mode"]) for entry in results})
    figure, axes = plt.subplots(len(groups), len(PANELS), figsize=(5 * len(PANELS), 4.2 * len(groups)), squeeze=False)
    names = dict.fromkeys(entry["rule"] for entry in results)
    rules = [rule for rule in names if not rule.startswith(("all ", "profile "))]  # one colour in all panels
    for axis_row, (window, mode) in zip(axes, groups, strict=True):
        part = [entry for entry in results if (entry["window"], entry["mode"]) == (window, mode)]
        for axis, (group, key, title, log) in zip(axis_row, PANELS, strict=True):
            for i, rule in enumerate(rules):
                points = sorted((entry for entry in part if entry["rule"] == rule), key=lambda entry: entry["budget"])
                x = [100 * entry["budget"] for entry in points]
                y = [entry[group][key] for entry in points]
                bounds = [entry[group][f"{key}_95"] for entry in points]
                random = rule.startswith("random")
                color = "0.75" if random else f"C{i % 10}"
                width = 3 if rule == "ours" else 2 if rule.startswith("ours") else 1.2
                axis.plot(x, y, color=color, lw=width, marker="o", ms=4 if rule == "ours" else 2.5, label=rule)
                if rule == "ours":
                    axis.fill_between(x, [b[0] for b in bounds], [b[1] for b in bounds], color=color, alpha=0.2)
            for entry in part:
                if entry["rule"] == "all local":
                    axis.axhline(entry[group][key], color="k", ls=":", lw=1)
                if entry["rule"] == "all global" and key == "accuracy":
                    axis.axhline(entry[group][key], color="k", ls="--", lw=1)
            if log:
                axis.set_yscale("log")
            axis.set_title(f"{title}\nprefill={mode}, local heads keep {window} tokens on average", fontsize=10)
            axis.set_xlabel("global heads (%)")
    figure.tight_layout(rect=(0, 0.7 / figure.get_figheight(), 1, 1))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=7, fontsize=9)
    figure.savefig(target, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
