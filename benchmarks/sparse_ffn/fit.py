"""Choose a sparse FFN schedule of one model by measurement, and measure what it costs on texts that chose nothing.

    python benchmarks/sparse_ffn/fit.py --model DIR --data DIR --out DIR [--device cuda] [--n 24] [--check 48]

1. Every layer of the last third alone, at every share of rows: KL on text and on needles' answers (chosen from one half of
   the texts). The last layer keeps nothing: no later token reads what its FFN adds to earlier rows.
2. The shares that give the least sum of KL at a share of FFN rows, by dynamic programming over the layers.
3. All layers together, on the other half of the texts, at several context lengths, beside the same shares chosen by the
   paper's importance and a flat share of the same cost.

What single layers cost does not add up exactly; step 3 says what the whole costs. Rows go to fit.jsonl as they come; run
again to go on. Written: fit.jsonl, fit.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from frontier import CONTINUATION, KINDS, Replay, measure, read_texts

import redknot_hf
from redknot_hf.heads.profiler.tasks import Sample, make_needles, make_texts
from redknot_hf.heads.profiler.texts import TokenStream
from redknot_hf.sparse_ffn import Band, SparseFFNSchedule
from redknot_hf.sparse_ffn.structure import find_blocks

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)


def schedule(keeps: dict[int, float], layers: int, **options: Any) -> SparseFFNSchedule:
    """Bands that keep these shares in these layers and everything elsewhere."""
    bands = []
    for layer in range(layers):
        keep = keeps.get(layer, 1.0)
        if keep != (keeps.get(layer - 1, 1.0) if layer else 1.0):
            bands.append(Band(layer, keep=keep))
    return SparseFFNSchedule(bands=tuple(bands), **options)


def prompts(tokenizer: Any, texts: list[str], role: str, n: int, context: int) -> list[Sample]:
    """n texts and n needles that share no piece of text with another role."""
    half = len(texts) // 2
    part = texts[:half] if role == "fit" else texts[half:]
    middle = len(part) // 2
    found = make_texts(
        tokenizer, TokenStream(tokenizer, part[:middle], f"{role}-text-{context}"), n, context, CONTINUATION
    )
    stream = TokenStream(tokenizer, part[middle:], f"{role}-needle-{context}")
    return found + make_needles(tokenizer, stream, n, context, f"{role}-{context}", KINDS)


def cheapest(cost: dict[tuple[int, float], float], layers: list[int], rows_to_skip: float) -> dict[int, float]:
    """Shares per layer with the least total cost that skip at least so many layers' worth of rows; in steps of 0.2."""
    step = 0.2
    need = int(rows_to_skip / step + 0.999)
    best: dict[int, tuple[float, dict[int, float]]] = {0: (0.0, {})}
    for layer in layers:
        new: dict[int, tuple[float, dict[int, float]]] = {}
        for skipped, (total, chosen) in best.items():
            for keep in SHARES:
                to = min(need, skipped + round((1 - keep) / step))
                price = total + (0.0 if keep == 1.0 else max(0.0, cost[layer, keep]))
                if to not in new or price < new[to][0]:
                    new[to] = (price, {**chosen, layer: keep})
        best = new
    return best[need][1]


def mean(rows: Iterable[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="folder with text/")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=16, help="texts, and needles, that choose")
    parser.add_argument("--check", type=int, default=48, help="texts, and needles, per context length that judge")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rows", type=float, nargs="+", default=[0.85, 0.75], help="shares of all FFN rows to run")
    parser.add_argument("--first-layer", type=int, help="first layer that may be sparse (default: the last third)")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="start no prompt after this time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="redknot")
    model = model.to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args.data)
    layers = len(find_blocks(model))
    first = layers * 2 // 3 if args.first_layer is None else args.first_layer
    replay = Replay(model, first)
    path = args.out / "fit.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["role"], row["context"], row["index"], row["name"]) for row in rows}
    start = time.time()
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "redknot_hf": redknot_hf.__version__,
    }
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"

    def run(role: str, context: int, n: int, table: dict[str, SparseFFNSchedule]) -> None:
        with path.open("a") as file:
            for index, sample in enumerate(interleaved(prompts(tokenizer, texts, role, n, context))):
                todo = {name: value for name, value in table.items() if (role, context, index, name) not in done}
                if not todo or time.time() - start > args.max_seconds:
                    continue
                for name, result in measure(model, sample, todo, replay, args.device):
                    kind = "text" if sample.kind == "text" else "needle"
                    row = {"role": role, "context": context, "index": index, "kind": kind, "name": name, **result}
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
        print(f"[{time.time() - start:5.0f}s] {role} at {context}: {len(table)} schedules", flush=True)

    singles = {
        f"layer {layer} keep {keep}": schedule({layer: keep}, layers)
        for layer in range(first, layers - 1)
        for keep in SHARES[1:]
    }
    run("fit", args.contexts[0], args.n, singles)
    cost = {}
    for layer in range(first, layers - 1):
        for keep in SHARES[1:]:
            mine = [row for row in rows if row["role"] == "fit" and row["name"] == f"layer {layer} keep {keep}"]
            cost[layer, keep] = mean((r for r in mine if r["kind"] == "text"), "kl")
        print(layer, *(f"{keep}: {cost[layer, keep]:.5f}" for keep in SHARES[1:]))
    chosen, table = {}, {}
    for share in args.rows:
        keeps = {**cheapest(cost, list(range(first, layers - 1)), (1 - share) * layers - 1), layers - 1: 0.0}
        chosen[share] = keeps
        table[f"fitted {share}"] = schedule(keeps, layers)
        table[f"fitted {share}, the paper's importance"] = schedule(keeps, layers, importance="attention_norm")
        skip = ((1 - share) * layers - 1) / (layers - 1 - first)
        table[f"flat {share}"] = schedule(
            {**dict.fromkeys(range(first, layers - 1), 1 - skip), layers - 1: 0.0}, layers
        )
    table["last layer only"] = schedule({layers - 1: 0.0}, layers)
    for context in args.contexts:
        run("check", context, args.check, table)
    result = []
    for context in args.contexts:
        for name in ("dense", *table):
            mine = [r for r in rows if (r["role"], r["context"], r["name"]) == ("check", context, name)]
            part = {kind: [r for r in mine if r["kind"] == kind] for kind in ("text", "needle")}
            kl = torch.tensor([r["kl"] for r in part["text"]], dtype=torch.float64)
            result.append(
                {
                    "context": context, "schedule": name, "ffn_rows": mean(part["text"] or part["needle"], "rows"),
                    "n": len(kl), "kl_text": float(kl.mean()) if len(kl) else None,
                    "kl_stderr": float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else None,
                    "kl_median": float(kl.median()) if len(kl) else None,
                    "needles": len(part["needle"]), "needle_accuracy": mean(part["needle"], "match"),
                    "kl_needle": mean(part["needle"], "kl"),
                }
            )  # fmt: skip
            print(json.dumps(result[-1]))
    report = {
        "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "model": Path(args.model).name,
        "device": device, "dtype": "float32", "versions": versions, "fitted_on": f"{args.n} texts at {args.contexts[0]}",
        "single_layer_kl": {f"{layer} {keep}": value for (layer, keep), value in cost.items()},
        "keeps": {str(share): {str(k): v for k, v in keeps.items()} for share, keeps in chosen.items()},
        "check": result,
    }  # fmt: skip
    (args.out / "fit.json").write_text(json.dumps(report, indent=1) + "\n")


def interleaved(samples: list[Sample]) -> list[Sample]:
    """Texts and needles in turn, so that a run that is cut short has both."""
    half = len(samples) // 2
    return [sample for pair in zip(samples[:half], samples[half:], strict=True) for sample in pair]


if __name__ == "__main__":
    main()
