"""What sparse FFN costs in quality, for each importance, at each kept share; and what it saves, in the same run.

    python benchmarks/sparse_ffn/frontier.py --model DIR --data DIR --out DIR [--device cuda] [--n 32]

Quality: KL on text and needle accuracy, as `batches` says. Several fixed choices are printed beside the importances: random
rows, the norm of the FFN's own output, no rows at all.

Time: whole prefills of one length, dense and sparse in turn, medians, beside the FLOPs of both (`redknot_hf.ledger`).

Every prompt's result is appended to rows.jsonl at once and never measured twice: run again to go on. Written: rows.jsonl,
results.json, results.csv, frontier.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from batches import Prefilled, Replay, in_batches, prompts, read_texts
from fit import random_rows
from plot_frontier import plot

import redknot_hf
from redknot_hf.sparse_ffn import PRESETS, SparseFFNSchedule
from redknot_hf.sparse_ffn.structure import find_blocks


def ffn_norm(view: Any) -> torch.Tensor:
    """Baseline that saves nothing: the norm of what the FFN would add."""
    out = view.ffn(view.ffn_input)
    return torch.linalg.vector_norm(out[0] if isinstance(out, tuple) else out, dim=-1, dtype=torch.float32)


IMPORTANCES = {
    "received_attention": "received_attention",
    "attention_norm": "attention_norm",
    "hidden_change": "hidden_change",
    "random": random_rows,
    "ffn_norm": ffn_norm,
}


def configurations(layers: int, names: list[str]) -> dict[str, tuple[str, SparseFFNSchedule]]:
    """name -> (importance, schedule). Depths are two thirds, half and a third of the model, as 20, 15 and 10 of 30 layers."""
    late, half, early = layers * 2 // 3, layers // 2, layers // 3
    found = {}
    for first, keep in ((late, 0.3), (late, 0.6), (late, 0.15), (half, 0.5), (half, 0.3), (early, 0.3)):
        for name in names:
            schedule = SparseFFNSchedule(keep=keep, first_layer=first, importance=IMPORTANCES[name])
            found[f"{name} from {first} keep {keep}"] = (name, schedule)
    found[f"none from {late}"] = ("none", SparseFFNSchedule(keep=0.0, first_layer=late))
    for name, preset in PRESETS.items():
        found[f"preset {name}"] = ("preset", preset.schedule)
    return found


# -------------------------------------------------------------------------------------------------------------- result


def summarise(rows: list[dict[str, Any]], importance: dict[str, str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["schedule"]].append(row)
    found = []
    for (part, name), group in sorted(groups.items()):
        kind = importance.get(name, "dense" if name == "dense" else "other")
        kl = torch.tensor([row["kl"] for row in group], dtype=torch.float64)
        entry = {
            "set": part,
            "schedule": name,
            "importance": kind,
            "n": len(group),
        }
        entry["ffn_rows"] = sum(row["rows"] for row in group) / len(group)
        entry["kl"] = float(kl.mean())
        entry["kl_stderr"] = float(kl.std() / len(group) ** 0.5) if len(group) > 1 else None
        entry["agree"] = sum(row["agree"] for row in group) / len(group)
        if "match" in group[0]:
            entry["match"] = sum(row["match"] for row in group) / len(group)
        found.append(entry)
    return found


def print_table(summary: list[dict[str, Any]]) -> None:
    for entry in summary:
        match = f"  match {entry['match']:.2f}" if "match" in entry else ""
        spread = f" +- {entry['kl_stderr']:.4f}" if entry["kl_stderr"] is not None else ""
        print(
            f"{entry['set']:12} {entry['schedule']:42} rows {entry['ffn_rows']:6.1%}  KL {entry['kl']:.4f}{spread}  "
            f"n {entry['n']}{match}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument(
        "--data", required=True, type=Path, help="folder with text/wikipedia_87_articles.tar.gz, wikitext"
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tf32", action="store_true", help="products of a GPU in TF32")
    parser.add_argument("--n", type=int, default=40, help="texts per context length")
    parser.add_argument("--needles", type=int, help="needle prompts per context length (default: as --n)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096], help="tokens")
    parser.add_argument("--importances", nargs="+", default=list(IMPORTANCES), choices=list(IMPORTANCES))
    parser.add_argument("--only", nargs="+", help="schedules whose name contains one of these words")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--time-tokens", type=int, default=4096, help="length of the timed prefills; 0 for no timing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=1e9, help="start no batch after this time")
    args = parser.parse_args()
    start = time.time()
    args.needles = args.n if args.needles is None else args.needles
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="redknot"
    )
    model = model.to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    layers = len(find_blocks(model))
    table = configurations(layers, args.importances)
    importance = {name: entry[0] for name, entry in table.items()}
    if args.only:
        table = {name: entry for name, entry in table.items() if any(word in name for word in args.only)}
    path = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["set"], row["index"], row["schedule"]) for row in rows}
    texts = read_texts(args.data)
    late = Replay(model, layers * 2 // 3)
    with path.open("a") as file:
        for context in args.contexts:
            for kind, n in (("text", args.n), ("needle", args.needles)):
                part = f"{kind}-{context}"
                samples = prompts(tokenizer, texts, "frontier", kind, n, context)
                for batch in in_batches(samples, args.batch_tokens):
                    todo = [name for name in table if any((part, i, name) not in done for i in batch)]
                    if not todo or time.time() - start > args.max_seconds:
                        continue
                    prefilled = Prefilled(late, [samples[i] for i in batch], args.device)
                    for name in ("dense", *todo):
                        results = prefilled.dense() if name == "dense" else prefilled.run(table[name][1])
                        for index, result in zip(batch, results, strict=True):
                            if (part, index, name) in done:
                                continue
                            row = {"set": part, "index": index, "schedule": name, **result}
                            rows.append(row)
                            file.write(json.dumps(row) + "\n")
                    file.flush()
                    del prefilled
                print(f"[{time.time() - start:6.0f}s] {part}", flush=True)
    timing = time_prefill(model, args) if args.time_tokens else None
    summary = summarise(rows, importance)
    report = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(args.model).name,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "dtype": args.dtype + (", products in TF32" if args.tf32 else ""),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "redknot_hf": redknot_hf.__version__,
        },
        "quality": summary,
        "time": timing,
    }
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    with (args.out / "results.csv").open("w", newline="") as file:
        fields = ["set", "schedule", "importance", "n", "ffn_rows", "kl", "kl_stderr", "agree", "match"]
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(summary)
    print_table(summary)
    plot(report, args.out / "frontier.png")


def time_prefill(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    from redknot_hf.ledger import measure_prefill

    layers = len(find_blocks(model))
    late = layers * 2 // 3
    schedules = {
        f"keep {keep} from {first}": SparseFFNSchedule(keep=keep, first_layer=first)
        for first, keep in ((late, 0.3), (layers // 2, 0.3), (late, 0.0))
    }
    schedules |= {name: preset.schedule for name, preset in PRESETS.items()}
    report = measure_prefill(model, tokens=args.time_tokens, schedules=schedules, profile=None, repeats=args.repeats)
    return report.as_dict()


if __name__ == "__main__":
    main()
