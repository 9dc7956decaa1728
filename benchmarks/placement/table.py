"""Tables from the rows of tensor_parallel.py: one process against several, as DIR/README.md.

python benchmarks/placement/table.py benchmarks/results/placement/h100x2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def gigabytes(counts: list[int]) -> str:
    return " + ".join(f"{count / 1e9:.2f}" for count in counts)


def equality(rows: list[Row]) -> list[str]:
    lines = [
        "| shape | dtype, layers | cache | same greedy tokens | largest difference of logits |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["part"] == "equal" and row["tp"] > 1:
            tokens = {True: "yes", False: "no", None: "not compared"}[row.get("same_tokens")]
            layers = row.get("layers_run", row["layers"])
            lines.append(
                f"| {row['shape']} | {row['dtype']}, {layers} | {row['cache']} | {tokens} | "
                f"{row['max_logit_difference']:.2g} |"
            )
    return lines


def times(rows: list[Row]) -> list[str]:
    """Decode and prefill, a line per cache and case; several measurements of one case are all shown."""
    found: dict[tuple[Any, ...], dict[int, list[Row]]] = {}
    for row in rows:
        if row["part"] in ("decode", "prefill"):
            case = f"{row.get('batch', 1)} x {row['context']}"
            what = row["part"] if row["part"] == "prefill" else f"decode, {row['mode']}"
            found.setdefault((row["shape"], what, case, row["cache"]), {}).setdefault(row["tp"], []).append(row)
    ranks = sorted({tp for each in found.values() for tp in each})
    lines = [
        "| shape | | batch x context | cache | " + " | ".join(f"tp={tp} ms" for tp in ranks) + " | KV GB per rank |",
        "|---" * (5 + len(ranks)) + "|",
    ]
    for (shape, what, case, cache), by_tp in found.items():
        cells = [" / ".join(str(row.get("ms", "out of memory")) for row in by_tp.get(tp, [])) or "-" for tp in ranks]
        last = [row for row in by_tp.get(ranks[-1], []) if "kv_bytes_per_rank" in row]
        held = gigabytes(last[-1]["kv_bytes_per_rank"]) if last else "-"
        lines.append(f"| {shape} | {what} | {case} | {cache} | {' | '.join(cells)} | {held} |")
    return lines


def placing(rows: list[Row]) -> list[str]:
    lines = ["| shape | batch x context | heads | KV GB per rank | max / mean | ms |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["part"] == "bytes":
            lines.append(
                f"| {row['shape']} | {row['batch']} x {row['context']} | {row['heads']} | "
                f"{gigabytes(row['kv_bytes_per_rank'])} | {row['max_over_mean']:.3f} | {row['ms']} |"
            )
    return lines


def transfers(rows: list[Row]) -> list[str]:
    lines = [
        "| shape | context | publish s | fetch s | bytes | of a DynamicCache | same tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["part"] == "transfer":
            lines.append(
                f"| {row['shape']} | {row['context']} | {row['publish_s']} | {row['fetch_s']} | {row['nbytes']:,} | "
                f"{row['nbytes'] / row['dense_nbytes']:.1%} | {'yes' if row['same_tokens'] else 'NO'} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    machines = {(row["device"], row["torch"], row["transformers"]) for row in rows if row["part"] == "machine"}
    stopped = [f"- {row['shape']}, tp={row['tp']}: {row['error']}" for row in rows if row["part"] == "stopped"]
    text = [
        "Made from rows.jsonl by `python benchmarks/placement/table.py`; the rows are from",
        "`benchmarks/placement/tensor_parallel.py`, one process and `torchrun`, NCCL, random weights. Eager steps are paced",
        "by the host: they say little about the GPU, and their scatter between runs is large. cuDNN attention is off, which",
        "makes a captured step of StaticCache slow (its mask rules flash attention out): it is no baseline for speed here.",
        "Logits of one process and of two differ in bf16 as much with DynamicCache, for sums are made in another order.",
        "",
        *(f"- {device}, torch {torch}, transformers {version}" for device, torch, version in sorted(machines)),
        "",
        "## Against one process", "", *equality(rows), "",
        "## Time and bytes", "", *times(rows), "",
        "## Heads placed evenly", "", *placing(rows), "",
        "## A prompt's cache through a store", "", *transfers(rows), "",
        *(["## Stopped", "", *stopped, ""] if stopped else []),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
