"""Write docs/benchmarks.md from the committed results: no number in it is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]


def source(result: Any, device: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    return f"{device}; {versions}. Command: `{result['command']}`"


def cpu(result: Any) -> list[str]:
    rows = [
        [
            row["context"],
            row["cache"],
            row["decode_ms"],
            f"{row['decode_speedup']}x",
            row["prefill_s"],
            f"{row['prefill_speedup']}x",
            f"{row['kv_bytes']['live'] / 1e6:.1f}",
            f"{row['kv_bytes']['allocated'] / 1e6:.1f}",
        ]
        for row in result["rows"]
    ]
    head = [
        "context",
        "cache",
        "decode ms",
        "against Dynamic",
        "prefill s",
        "against Dynamic",
        "KV MB live",
        "allocated",
    ]
    where = source(
        result, f"{result['machine']} CPU, {result['threads']} threads, {result['dtype']}, SmolLM2-135M-Instruct"
    )
    return ["## On a CPU", "", *table(head, rows), "", where, ""]


def decode(result: Any) -> list[str]:
    rows = [
        [row["batch"], row["context"], row["cache"], row["ms"], row.get("run")]
        for row in result["rows"]
        if "cache" in row and row["context"]
    ]
    fits = [[row["context"], row["capacity"], row["largest_batch"]] for row in result["rows"] if "capacity" in row]
    return [
        "## Decoding with an 8B model on a GPU",
        "",
        "Random weights in the shape of Llama-3.1-8B, bf16. 1/8: one of eight KV heads of each layer keeps everything, the "
        "others 64 sinks and a window of 256. DynamicCache is shown with and without cuDNN SDPA, whose planning costs tens "
        "of milliseconds a step.",
        "",
        *table(["batch", "context", "cache", "ms per token", "note"], rows),
        "",
        *table(["context", "cache", "largest batch that fits"], fits),
        "",
        source(result, result["device"]),
        "",
    ]


def rules(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [
        "## Which heads to keep",
        "",
        f"Every rule at every budget, with intervals, on SmolLM2-135M-Instruct: `{path.relative_to(ROOT)}` (and "
        "`rules.png` beside it).",
        "",
    ]


def main() -> int:
    lines = ["# Benchmarks", "", "Made by `python benchmarks/tables.py` from `benchmarks/results/`.", ""]
    if (found := load("cpu/cpu-float32.json")) is not None:
        lines += cpu(found)
    if (found := load("h200/decode.json")) is not None:
        lines += decode(found)
    summary = RESULTS / "h200" / "summary.md"
    if summary.exists():
        lines += [
            "## Bars",
            "",
            "What the project set out to reach on one H200, met or not.",
            "",
            summary.read_text().rstrip(),
            "",
        ]
    lines += rules(RESULTS / "h200" / "profiles" / "results.csv")
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
