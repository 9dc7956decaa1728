"""Write docs/benchmarks.md and the README's table from the committed results: no number there is typed by hand.

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
        [row["shape"], row["batch"], row["context"], row["cache"], row["ms"], row.get("run")]
        for row in result["rows"]
        if "cache" in row and row["context"]
    ]
    fits = [
        [row["shape"], row["context"], row["capacity"], row["largest_batch"]]
        for row in result["rows"]
        if "capacity" in row
    ]
    return [
        "## Decoding with an 8B model on a GPU",
        "",
        "Random weights in the shape of Llama-3.1-8B or Qwen3-8B, bf16. 1/8: one of eight KV heads of each layer keeps "
        "everything, the others 64 sinks and a window of 256. DynamicCache is shown with and without cuDNN SDPA, whose "
        "planning costs tens of milliseconds a step.",
        "",
        *table(["shape", "batch", "context", "cache", "ms per token", "note"], rows),
        "",
        *table(["shape", "context", "cache", "largest batch that fits"], fits),
        "",
        source(result, result["device"]),
        "",
    ]


def caches(path: Path) -> list[str]:
    """What `redknot bench` wrote, as a table; sizes in MB of 10^6 bytes."""
    found = json.loads(path.read_text())
    rows = [
        [
            row["name"],
            None if row["first_token_s"] is None else f"{row['first_token_s'] * 1e3:.1f}",
            None if row["decode_ms"] is None else f"{row['decode_ms']:.2f}",
            None if row["kv_bytes"] is None else f"{row['kv_bytes'] / 1e6:.1f}",
            None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            row["fits"] if row["fits_measured"] is None else f"{row['fits_measured']} (tried)",
            None if row["agrees"] is None else f"{row['agrees']:.0%}",
            row["note"],
        ]
        for row in found["rows"]
    ]
    head = ["cache", "first token ms", "ms per token", "KV MB per sequence", "peak MB", "fit", "agrees", "note"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        f"### {found['model']}, {found['batch']} x {found['tokens']} tokens, {found['device']}",
        "",
        *table(head, rows),
        "",
        f"{found['dtype']}, {found['new_tokens']} new tokens, median of {found['repeats']}, {found['threads']} threads; "
        f"profile: {found['profile']}; {versions}. From `{path.relative_to(ROOT)}`.",
        "",
    ]


def eager(result: Any) -> list[str]:
    rows = [
        [row["batch"], row["context"], row["cache"], row["ms"], "{} to {}".format(*row["quartiles"]), row["of_dynamic"]]
        for row in result["rows"]
    ]
    return [
        "### Eager steps, in turns",
        "",
        "The same shape without compiling. At batch 1 such a step waits for the host, whose time varies from second to second "
        "by more than these caches differ, so the caches take turns in one process; medians of the rounds.",
        "",
        *table(["batch", "context", "cache", "ms per token", "quartiles", "of DynamicCache"], rows),
        "",
        source(result, result["device"]),
        "",
    ]


BEGIN, END = "<!-- table: python benchmarks/tables.py -->", "<!-- end of table -->"
README_ROWS = {
    "DynamicCache, sdpa with cuDNN": ("DynamicCache sdpa, cuDNN on", None),
    "DynamicCache, sdpa without cuDNN (in turns with ours)": ("DynamicCache sdpa, cuDNN off", "DynamicCache"),
    "StaticCache, compiled": ("StaticCache compiled", "StaticCache"),
    "RedKnotCache, 1/8 global, eager": ("RedKnotCache 1/8 eager", "RedKnotCache 1/8"),
    "RedKnotCache, 1/8 global, compiled": ("RedKnotCache 1/8 compiled", "RedKnotCache 1/8 static"),
    "RedKnotCache, all global, compiled": ("RedKnotCache all global compiled", None),
}


def readme_table(result: Any) -> str:
    """One line per cache: milliseconds per token, and how many sessions fit. Several runs are given as a range.

    Eager steps that were measured in turns, in one process, take the place of those measured in processes of their own.
    """
    turns = load("h200/eager.json")
    in_turns = {row["cache"] for row in turns["rows"]} if turns else set()

    def spread(cache: str, batch: int, context: int) -> str | None:
        if cache in in_turns:
            return next(
                (
                    f"{row['ms']:.1f}"
                    for row in turns["rows"]
                    if (row["cache"], row["batch"], row["context"]) == (cache, batch, context)
                ),
                None,
            )
        found = [
            row["ms"]
            for row in result["rows"]
            if row.get("cache") == cache
            and (row["shape"], row["batch"], row["context"]) == ("llama-8b", batch, context)
            and "ms" in row
        ]
        ends = sorted({f"{ms:.1f}" for ms in found}, key=float)
        return None if not ends else ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"

    def sessions(cache: str | None) -> Any:
        found = [
            row["largest_batch"]
            for row in result["rows"]
            if cache and (row.get("capacity"), row.get("context"), row.get("shape")) == (cache, 131072, "llama-8b")
        ]
        return found[-1] if found else None

    rows = [
        [label, spread(cache, 1, 32768), spread(cache, 8, 32768), spread(cache, 1, 131072), sessions(fits)]
        for label, (cache, fits) in README_ROWS.items()
    ]
    head = ["", "32K, batch 1", "32K, batch 8", "128K, batch 1", "sessions of 128K that fit"]
    where = source(result, f"ms per token. {result['device']}, {result['memory_gb']:.0f} GB")
    where = where.replace(" Command: ", " From `benchmarks/results/h200/decode.json`; command: ")
    if turns:
        where += (
            " The rows of DynamicCache without cuDNN and of RedKnotCache in eager mode are from "
            f"`benchmarks/results/h200/eager.json`; command: `{turns['command']}`"
        )
    return "\n".join([*table(head, rows), "", where])


def write_readme(result: Any, path: Path = ROOT / "README.md") -> None:
    text = path.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    path.write_text(f"{text[:start]}\n{readme_table(result)}\n{text[end:]}")


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
        write_readme(found)
    if (found := load("h200/eager.json")) is not None:
        lines += eager(found)
    if measured := sorted(RESULTS.glob("*/bench_*.json")):
        lines += [
            "## Caches side by side",
            "",
            "Made by `redknot bench`. Peak: what the device allocator held beyond the weights, whole batch. Fit: sequences by "
            "bytes in nine tenths of the memory. Agrees: greedy tokens that are DynamicCache's; that of random weights says "
            "nothing of quality, and a head profile is approximate."
            + (
                " The command has not been run on a GPU yet; what its caches do there is above, by another script."
                if all(path.parent.name == "cpu" for path in measured)
                else ""
            ),
            "",
        ]
        for path in measured:
            lines += caches(path)
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
