"""Rows to tables: means with intervals, CSV, JSON, one picture. Knows nothing of how rows were made."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..heads.profiler.validation import rounded
from .scoring import bootstrap, interval
from .tasks import TASKS

__all__ = ["COLUMNS", "plot", "summarise", "table", "write_csv", "write_json"]

COLUMNS = (
    "task", "context", "method", "n", "value", "low", "high", "measure", "kl", "top1", "f1", "kv_bytes", "live_bytes",
    "bytes_of_full", "prefill_s", "decode_s", "seconds",
)  # fmt: skip


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per (task, context, method), in the order in which they first appear.

    Random maps are pooled into one entry "random": the mean over its draws, with an interval over all their prompts.

    Returns:
        Dictionaries with `COLUMNS`: value (share of references found, or perplexity) with its 95 % interval, bytes of one
        row after the context, medians of seconds per prompt. Seconds of a batch are divided by its rows.
    """
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        method = "random" if row["method"].startswith("random-") else row["method"]
        groups.setdefault((row["task"], row["context"], method), []).append(row)
    dense = {key[:2]: group[0]["live_bytes"] for key, group in groups.items() if key[2] == "full"}
    found = []
    for (task, context, method), group in groups.items():
        scores = [float(row["score"]) for row in group]
        mean = statistics.fmean(scores)
        if TASKS[task].score is None:
            low, high = bootstrap(scores, 2000)
            value, low, high = math.exp(mean), math.exp(low), math.exp(high)
        else:
            value, (low, high) = mean, interval(scores)
        entry: dict[str, Any] = {
            "task": task,
            "context": context,
            "method": method,
            "n": len(group),
            "value": value,
            "low": low,
            "high": high,
            "measure": TASKS[task].measure,
        }
        for extra in ("kl", "top1", "f1"):
            given = [row[extra] for row in group if extra in row]
            entry[extra] = statistics.fmean(given) if given else None
        for size in ("kv_bytes", "live_bytes"):
            entry[size] = round(statistics.fmean(row[size] for row in group))
        whole = dense.get((task, context))
        entry["bytes_of_full"] = entry["live_bytes"] / whole if whole else None
        entry["prefill_s"] = statistics.median(row["prefill_s"] for row in group)
        entry["decode_s"] = statistics.median(row["decode_s"] for row in group)
        entry["seconds"] = entry["prefill_s"] + entry["decode_s"]
        found.append(rounded(entry))
    return found


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as text for a terminal, one block per context length."""
    lines: list[str] = []
    for context in sorted({entry["context"] for entry in entries}):
        here = [entry for entry in entries if entry["context"] == context]
        lines += [
            f"context {context} tokens",
            f"  {'task':22}{'method':11}{'n':>5}{'score':>9}  {'95 % interval':17}{'KV':>9}{'of full':>9}"
            f"{'prefill s':>11}{'answer s':>10}  ",
        ]
        last = ""
        for entry in here:
            name = TASKS[entry["task"]].title
            text = TASKS[entry["task"]].score is None
            form = "{:.3f}" if not text else "{:.2f}"
            span = f"[{form.format(entry['low'])}, {form.format(entry['high'])}]"
            share = "-" if entry["bytes_of_full"] is None else f"{entry['bytes_of_full']:.1%}"
            extra = ""
            if text and entry["kl"] is not None:
                extra = f"  KL {entry['kl']:.4f}, same top token {entry['top1']:.1%}"
            elif entry["f1"] is not None:
                extra = f"  F1 {entry['f1']:.3f}"
            lines.append(
                f"  {name if name != last else '':22}{entry['method']:11}{entry['n']:>5}{form.format(entry['value']):>9}  "
                f"{span:17}{entry['live_bytes'] / 1e6:>7.1f}MB{share:>9}{entry['prefill_s']:>11.3f}{entry['decode_s']:>10.3f}"
                f"{extra}"
            )
            last = name
        lines.append("")
    return "\n".join(lines)


def write_csv(entries: Sequence[dict[str, Any]], path: str | Path) -> None:
    """The entries with `COLUMNS`, one a line."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in entry.items()} for entry in entries)


def write_json(head: dict[str, Any], entries: Sequence[dict[str, Any]], path: str | Path) -> None:
    """What was measured, and the entries."""
    Path(path).write_text(json.dumps({**head, "results": list(entries)}, indent=1) + "\n", encoding="utf-8")


_COLOURS = {
    "full": "#4d4d4d", "ours": "#c0392b", "window": "#7fb3d5", "streaming": "#2e86c1", "random": "#b7950b",
    "blind": "#d5d8dc",
}  # fmt: skip


def pyplot_for(feature: str) -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        MissingExtraError: matplotlib is not installed; ``feature`` is what needs it.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError(feature, "matplotlib", "eval") from error
    return pyplot


def plot(entries: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """One panel per task, bars per method, grouped by context length; perplexity is shown as KL where there is one.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = pyplot_for("the plot of an evaluation")
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    contexts = sorted({entry["context"] for entry in entries})
    methods = [m for m in _COLOURS if any(entry["method"] == m for entry in entries)]
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 2.7 * lines + 0.5), squeeze=False)
    for number, name in enumerate(tasks):
        axis = axes[number // columns][number % columns]
        text = TASKS[name].score is None
        for place, method in enumerate(methods):
            for group, context in enumerate(contexts):
                entry = next(
                    (e for e in entries if (e["task"], e["context"], e["method"]) == (name, context, method)), None
                )
                if entry is None or (text and method == "blind"):
                    continue
                x = group + (place - (len(methods) - 1) / 2) * 0.8 / len(methods)
                height = entry["value"]
                spread = [[height - entry["low"]], [entry["high"] - height]]
                axis.bar(
                    x, height, 0.8 / len(methods), color=_COLOURS[method], yerr=spread, ecolor="#888888",
                    error_kw={"lw": 0.8}, label=method if group == 0 else None,
                )  # fmt: skip
        axis.set_title(TASKS[name].title, fontsize=10)
        axis.set_xticks(range(len(contexts)), [f"{c} tokens" for c in contexts], fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        if text:
            axis.set_ylabel("perplexity (lower is better)", fontsize=8)
        else:
            axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    for number in range(len(tasks), lines * columns):
        axes[number // columns][number % columns].axis("off")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_COLOURS[m]) for m in methods]
    figure.legend(handles, methods, loc="lower center", ncols=len(methods), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 0.97 if title else 1))
    figure.savefig(path, dpi=130, metadata={"Software": None} if str(path).endswith(".png") else None)
    pyplot.close(figure)
