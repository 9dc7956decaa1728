"""One object per bar from the raw results of a device, and the table that the documentation shows.

Reads what the benchmarks wrote below a results folder and writes ``summary.json`` (a list of objects ``bar, measured,
target, unit, met, command, commit``, and ``reason`` for a miss) and ``summary.md``. A bar whose benchmark has not been run is
listed as not measured: nothing is left out. Which commit each benchmark was run on, and why a bar is missed, is read from
``notes.json`` there, which is written by hand.

    python benchmarks/summary.py benchmarks/results/h200
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def bar(name: str, measured: float | None, target: float, unit: str, command: str, at_most: bool) -> dict[str, Any]:
    met = None if measured is None else (measured <= target if at_most else measured >= target)
    sign = "<=" if at_most else ">="
    rounded = None if measured is None else round(measured, 3)
    return {
        "bar": name,
        "measured": rounded,
        "target": f"{sign} {target}",
        "unit": unit,
        "met": met,
        "command": command,
    }


def decode_bars(result: Any) -> Iterator[dict[str, Any]]:
    command = result["command"] if result else "python benchmarks/decode/bench.py --out benchmarks/results/h200"
    rows = [row for row in result["rows"] if row.get("shape") == "llama-8b"] if result else []

    def ms(cache: str, batch: int, context: int) -> float | None:
        """The median where a case was run in several processes."""
        found = [
            row["ms"]
            for row in rows
            if (row.get("cache"), row.get("batch"), row.get("context")) == (cache, batch, context)
        ]
        return statistics.median(found) if found and None not in found else None

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    sparse, static, dense = "RedKnotCache 1/8 compiled", "StaticCache compiled", "RedKnotCache all global compiled"
    long = 131072
    yield bar("compiled decode, 8B, 128K, batch 1", ms(sparse, 1, long), 6.1, "ms/token", command, True)
    fast = ratio(ms(static, 1, long), ms(sparse, 1, long))
    yield bar("against StaticCache compiled, 128K, batch 1", fast, 8, "x", command, False)
    fast = ratio(ms(static, 1, 32768), ms(sparse, 1, 32768))
    yield bar("against StaticCache compiled, 32K, batch 1", fast, 2.7, "x", command, False)
    cases = {(row["batch"], row["context"]) for row in rows if row.get("cache") == static}
    ratios = [ratio(ms(static, *case), ms(dense, *case)) for case in sorted(cases)]
    known = [value for value in ratios if value is not None]
    worst = min(known) if known else None
    yield bar("all global compiled against StaticCache compiled, worst case", worst, 1, "x", command, False)
    fits = {row["capacity"]: row["largest_batch"] for row in rows if row.get("context") == long and "capacity" in row}
    more = ratio(max(fits.get("RedKnotCache 1/8", 0), fits.get("RedKnotCache 1/8 static", 0)), fits.get("DynamicCache"))
    yield bar("sessions that fit at 128K, against DynamicCache", more, 5, "x", command, False)


def kernel_bars(bars: Any, about: Any) -> Iterator[dict[str, Any]]:
    """As `bench.py` judged them: decode by the copy bandwidth, with the bar by the read bandwidth beside it."""
    folder = "kernels/segpaged-attention/benchmarks"
    command = f"python {folder}/bench.py --out benchmarks/results/h200/kernels"
    if not bars:
        yield bar("kernels", None, 1, "", command, False)
        return
    for one in bars:
        sign = ">=" if one.get("at_least", one["unit"] == "ratio") else "<="
        yield {
            "bar": one["name"],
            "measured": one["measured"],
            "target": f"{sign} {one['target']}",
            "unit": one["unit"],
            "met": one["met"],
            **{key: one[key] for key in ("by_read", "met_by_read") if key in one},
            "command": f"python {folder}/{about['command']}" if about else command,
        }


def reuse_bars(result: Any) -> Iterator[dict[str, Any]]:
    command = "python benchmarks/reuse/ttft.py --shape llama-8b --device cuda --out benchmarks/results/h200"
    found: dict[str, float] = {}
    for row in result["table"] if result else []:
        store, _, selector = row["name"].partition(" ")
        if selector == "blend":  # the default: a faster rule that chooses no better than chance must not meet the bar
            found[store] = row["speedup_over_faster_prefill"]
    if result:
        command = result.get("command", command)
    for name, key, target in (("memory tier", "memory", 4), ("local files", "file", 3)):
        yield bar(
            f"time to first token with reuse, 8B, 32K, default selector, {name}",
            found.get(key),
            target,
            "x",
            command,
            False,
        )


def profile_bars(result: Any) -> Iterator[dict[str, Any]]:
    command = "python benchmarks/profiles/time_8b.py --out benchmarks/results/h200"
    seconds = result.get("seconds") if result else None
    yield bar("profiling an 8B shape", seconds, 60, "s", result.get("command", command) if result else command, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    folder = parser.parse_args().results
    kernels = load(folder / "kernels" / "results.json")
    notes = load(folder / "notes.json")
    parts = {
        "kernels": kernel_bars(load(folder / "kernels" / "bars.json"), (kernels or {}).get("about")),
        "decode": decode_bars(load(folder / "decode.json")),
        "reuse": reuse_bars(load(folder / "reuse" / "ttft_llama-8b_cuda_32824.json")),
        "profile": profile_bars(load(folder / "profile_8b.json")),
    }
    bars = []
    for part, found in parts.items():
        for one in found:
            one["commit"] = notes["commits"][part]
            if one["met"] is False:
                if one["bar"] not in notes["misses"]:
                    print(f"say in {folder / 'notes.json'} why this bar is missed: {one['bar']}", file=sys.stderr)
                    return 1
                one["reason"] = notes["misses"][one["bar"]]
            bars.append(one)
    (folder / "summary.json").write_text(json.dumps(bars, indent=1) + "\n")
    lines = ["| bar | measured | target | unit | met | by read bandwidth |", "|---|---|---|---|---|---|"]
    words = {True: "yes", False: "no", None: "not measured"}
    for b in bars:
        measured = "" if b["measured"] is None else b["measured"]
        by_read = f"{b['by_read']}: {words[b['met_by_read']]}" if "by_read" in b else ""
        lines.append(f"| {b['bar']} | {measured} | {b['target']} | {b['unit']} | {words[b['met']]} | {by_read} |")
    if rates := (kernels or {}).get("about", {}).get("gb_s"):
        lines += [
            "",
            f"Decode is judged by the copy bandwidth of the same run, {rates['copy'] / 1e3:.2f} TB/s (bytes read plus bytes "
            f"written, by a kernel); the last column is the same bar by that of a pure read, {rates['read'] / 1e3:.2f} TB/s. "
            "Times are of layers one right after another in a CUDA graph of 32 calls or 4 ms; runs before 2026-11-25 had "
            "graphs of two or three large layers, each of which carried 3 to 5 us of the graph's own start.",
        ]
    if missed := [b for b in bars if b["met"] is False]:
        lines += ["", "Missed:", "", *(f"- {b['bar']}: {b['reason']}" for b in missed)]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
