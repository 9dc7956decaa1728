"""Choose sparse FFN schedules of one model by measurement, and measure what they cost on texts that chose nothing.

    python benchmarks/sparse_ffn/fit.py --model DIR --data DIR --out DIR [--device cuda] [--tf32] [--rows 0.769 0.85]

1. Every layer that may be sparse alone, at several shares of its rows: KL on texts. The last layer keeps nothing: no later
   token reads what its FFN adds to earlier rows.
2. For every share of FFN rows wanted: the shares per layer with the least sum of these, by dynamic programming. At the
   first of them several ways to measure attention are tried, and the best is taken.
3. What single layers cost does not add up. So all layers together are measured, at two context lengths, with each layer's
   share a step up and a step down, and rows are moved from where they matter less to where they matter more, as long as the
   joint KL falls.
4. On other texts, and needles, at several context lengths: the result, the same shares under other importances, and other
   ways to choose.

Rows of step 4 go to check.jsonl as they come, the choice to chosen.json; run again to go on with step 4. Written as well:
search.jsonl (every joint measurement of step 3), fit.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from batches import Prefilled, Replay, in_batches, prompts, read_texts

import redknot_hf
from redknot_hf.sparse_ffn import Band, SparseFFNSchedule
from redknot_hf.sparse_ffn.structure import find_blocks

SINGLE_SHARES = (0.8, 0.6, 0.4, 0.2, 0.0)
STEP = 0.1  # of a layer's share in one move
SIMPLE: dict[str, Any] = {"fill": "mean"}  # how single layers are measured
WAYS: tuple[dict[str, Any], ...] = (  # to measure attention and to fill; the first guess of the first share chooses
    {},
    {"memory": 1.0},
    SIMPLE,
    {"fill": "mean", "query_block": 128},
    {"fill": "mean", "memory": 0.5},
    {"fill": "mean", "memory": 1.0},
    {"fill": "mean", "query_block": 128, "memory": 1.0},
)
# needles take long, and few baselines
NO_NEEDLES = ("without memory", "random rows", "nothing for rows left out", "last layer only")


def schedule(keeps: dict[int, float], layers: int, **options: Any) -> SparseFFNSchedule:
    """Bands that keep these shares in these layers and everything elsewhere."""
    bands = []
    for layer in range(layers):
        keep = keeps.get(layer, 1.0)
        if keep != (keeps.get(layer - 1, 1.0) if layer else 1.0):
            bands.append(Band(layer, keep=keep))
    return SparseFFNSchedule(bands=tuple(bands), **options)


def random_rows(view: Any) -> torch.Tensor:
    """Baseline: rows at random, other ones in each layer, the same in each run."""
    generator = torch.Generator().manual_seed(view.layer)
    return torch.rand(view.ffn_input.shape[:2], generator=generator).to(view.ffn_input.device)


class Search:
    """The shares of the layers that may be sparse, judged by the mean of the KL at every length of the fitting texts.

    Args:
        groups: of one context length each.
        tokens: that shares of rows are counted at.
    """

    def __init__(self, groups: list[list[Prefilled]], layers: int, first: int, tokens: int, options: dict[str, Any]):
        self.groups, self.layers, self.tokens, self.options = groups, layers, tokens, options
        self.free = list(range(first, layers - 1))
        self.known: dict[tuple[str, tuple[float, ...]], float] = {}

    def blocks(self, keep: float) -> int:
        """Buckets of rows that a layer runs at this share."""
        plain = SparseFFNSchedule(keep=0.5)
        always = plain.sink + plain.recent
        return min(-(-max(int(keep * self.tokens + 1 - 1e-9), always) // plain.bucket), self.tokens // plain.bucket)

    def all_blocks(self, keeps: dict[int, float]) -> int:
        return sum(self.blocks(keeps.get(layer, 1.0)) for layer in range(self.layers))

    def budget(self, rows: float) -> int:
        return int(rows * self.layers * self.blocks(1.0))

    def single(self, layer: int, keep: float) -> float:
        return self.measure({layer: keep}, self.groups[:1])

    def cost(self, keeps: dict[int, float]) -> float:
        key = json.dumps(self.options), tuple(keeps[layer] for layer in self.free)
        if key not in self.known:
            self.known[key] = self.measure(keeps, self.groups)
        return self.known[key]

    def measure(self, keeps: dict[int, float], groups: list[list[Prefilled]], **options: Any) -> float:
        plan = schedule(keeps, self.layers, **{**self.options, **options})
        means = []
        for group in groups:
            found = [result["kl"] for batch in group for result in batch.run(plan)]
            means.append(sum(found) / len(found))
        return sum(means) / len(means)

    def cheapest(self, single: dict[tuple[int, float], float], rows: float) -> dict[int, float]:
        """Shares with the least sum of single costs that run at most these rows, by dynamic programming."""
        need = self.layers * self.blocks(1.0) - self.budget(rows) - (self.blocks(1.0) - self.blocks(0.0))
        best: dict[int, tuple[float, dict[int, float]]] = {0: (0.0, {})}
        for layer in self.free:
            new: dict[int, tuple[float, dict[int, float]]] = {}
            for skipped, (total, chosen) in best.items():
                for keep in (1.0, *SINGLE_SHARES):
                    if keep != 1.0 and (layer, keep) not in single:
                        continue
                    to = min(need, skipped + self.blocks(1.0) - self.blocks(keep))
                    price = total + (0.0 if keep == 1.0 else max(0.0, single[layer, keep]))
                    if to not in new or price < new[to][0]:
                        new[to] = (price, {**chosen, layer: keep})
            best = new
        return {
            **best[max(best)][1],
            self.layers - 1: 0.0,
        }  # fewer than wanted where all layers together do not suffice

    def refine(self, keeps: dict[int, float], rows: float, until: float, say: Any) -> dict[int, float]:
        """Moves rows between layers while that makes the joint KL fall and time is left."""
        while time.time() < until:
            here = self.cost(keeps)
            gain, loss = {}, {}  # of a step more, of a step less
            for layer in self.free:
                for step, table in ((STEP, gain), (-STEP, loss)):
                    share = round(keeps[layer] + step, 3)
                    if 0 <= share <= 1 and time.time() < until:
                        table[layer] = self.cost({**keeps, layer: share}) - here
            moves = sorted((loss[a] + gain[b], a, b) for a in loss for b in gain if a != b)
            tried = []
            for _, a, b in moves:
                moved = {**keeps, a: round(keeps[a] - STEP, 3), b: round(keeps[b] + STEP, 3)}
                if self.all_blocks(moved) <= self.budget(rows):
                    tried.append((self.cost(moved), moved))
                if len(tried) == 5 or time.time() > until:
                    break
            better = [entry for entry in tried if entry[0] < here]
            say(f"joint KL {here:.5f}, moves {[round(value, 5) for value, _ in tried]}")
            if not better:
                break
            keeps = min(better, key=lambda entry: entry[0])[1]
        return keeps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="folder with text/")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tf32", action="store_true", help="products of a GPU in TF32")
    parser.add_argument("--fit", type=int, nargs="+", default=[24, 12], help="texts per context length that choose")
    parser.add_argument("--fit-contexts", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument(
        "--check", type=int, nargs="+", default=[100, 60, 40], help="texts per context length that judge"
    )
    parser.add_argument("--needles", type=int, nargs="+", default=[100, 100, 0], help="needles that judge")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--rows", type=float, nargs="+", default=[0.769, 0.85, 0.7], help="shares of all rows to run")
    parser.add_argument("--first-layer", type=int, help="first layer that may be sparse (default: the last third)")
    parser.add_argument("--singles", type=Path, help="chosen.json of an earlier run, whose step 1 is taken over")
    parser.add_argument(
        "--search-seconds", type=float, default=20, help="for the first of --rows; half for each other search"
    )
    parser.add_argument("--only", nargs="+", help="of step 4: schedules whose names end with one of these")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--max-seconds", type=float, default=1e9, help="start no batch after this time")
    args = parser.parse_args()
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="redknot")
    model = model.to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args.data)
    layers = len(find_blocks(model))
    first = layers * 2 // 3 if args.first_layer is None else args.first_layer
    replay = Replay(model, first)

    def say(line: str) -> None:
        print(f"[{time.time() - start:5.0f}s] {line}", flush=True)

    path = args.out / "chosen.json"
    if path.exists():
        chosen = json.loads(path.read_text())
    else:
        chosen = choose(args, replay, tokenizer, texts, layers, first, say)
        path.write_text(json.dumps(chosen, indent=1) + "\n")
    table: dict[str, SparseFFNSchedule] = {}
    for name, found in chosen["found"].items():
        keeps = {int(layer): keep for layer, keep in found["keeps"].items()}
        table[f"fitted {name}"] = schedule(keeps, layers, **found["options"])
        if len(table) == 1:  # the first share, in other ways
            table[f"fitted {name}, attention_norm"] = schedule(
                keeps, layers, importance="attention_norm", fill=found["options"].get("fill", "nothing")
            )
            if "memory" in found["options"]:
                less = {key: value for key, value in found["options"].items() if key != "memory"}
                table[f"fitted {name}, without memory"] = schedule(keeps, layers, **less)
            table[f"fitted {name}, random rows"] = schedule(
                keeps, layers, importance=random_rows, fill=found["options"].get("fill", "nothing")
            )
            table[f"fitted {name}, nothing for rows left out"] = schedule(
                keeps, layers, **{**found["options"], "fill": "nothing"}
            )
            table[f"fitted {name}, attention_norm, nothing for rows left out"] = schedule(
                keeps, layers, importance="attention_norm"
            )
    table["last layer only"] = schedule({layers - 1: 0.0}, layers)
    if args.only:
        table = {name: plan for name, plan in table.items() if name.endswith(tuple(args.only))}
    rows = check(args, replay, tokenizer, texts, table, start, say)
    result = summary(rows, args.contexts, ["dense", *table])
    for entry in result:
        print(json.dumps(entry))
    report = {
        "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "model": Path(args.model).name,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "dtype": "float32, products in TF32" if args.tf32 else "float32",
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "redknot_hf": redknot_hf.__version__,
        },
        **chosen, "check": result,
    }  # fmt: skip
    (args.out / "fit.json").write_text(json.dumps(report, indent=1) + "\n")


def choose(
    args: Any, replay: Replay, tokenizer: Any, texts: list[str], layers: int, first: int, say: Any
) -> dict[str, Any]:
    """Steps 1 to 3."""
    groups = []
    for context, n in zip(args.fit_contexts, args.fit, strict=True):
        samples = prompts(tokenizer, texts, "fit", "text", n, context)
        batches = in_batches(samples, args.batch_tokens)
        groups.append([Prefilled(replay, [samples[i] for i in batch], args.device) for batch in batches])
    search = Search(groups, layers, first, args.fit_contexts[0], SIMPLE)
    say(f"dense runs of {sum(args.fit)} texts")
    single: dict[tuple[int, float], float] = {}
    start: dict[str, dict[str, float]] = {}
    if args.singles is not None:
        earlier = json.loads(args.singles.read_text())
        start = earlier.get("keeps") or {name: entry["keeps"] for name, entry in earlier["found"].items()}
        for name, value in earlier["single_layer_kl"].items():
            layer, keep = name.split()
            single[int(layer), float(keep)] = value
    for layer in search.free if args.singles is None else ():
        for keep in SINGLE_SHARES:
            single[layer, keep] = search.single(layer, keep)
            if single[layer, keep] > 0.008:
                break  # shares below cost more
    say("single layers")
    print(json.dumps({f"{layer} {keep}": round(value, 6) for (layer, keep), value in single.items()}))
    found: dict[str, Any] = {}
    first_guess = search.cheapest(single, args.rows[0])
    search.options = {}
    ways = {json.dumps(way): search.measure(first_guess, groups, **way) for way in WAYS}
    say(f"{ {way: round(value, 5) for way, value in ways.items()} }")
    best = json.loads(min(ways, key=ways.__getitem__))
    runs = [(str(args.rows[0]), args.rows[0], best)]
    if best != SIMPLE:
        runs.append((f"{args.rows[0]} simple", args.rows[0], SIMPLE))
    runs += [(str(share), share, best) for share in args.rows[1:]]
    for name, share, options in runs:
        search.options = options
        seconds = args.search_seconds / (1 if name == runs[0][0] else 2)
        guesses = [search.cheapest(single, share)]
        if str(share) in start:
            guesses.append({int(layer): keep for layer, keep in start[str(share)].items()})
        keeps = min(guesses, key=search.cost)
        before = search.cost(keeps)
        keeps = search.refine(keeps, share, time.time() + seconds, say)
        found[name] = {
            "options": options,
            "keeps": {str(layer): keep for layer, keep in keeps.items()},
            "sum_of_single_layers": sum(single.get((layer, keep), 0.0) for layer, keep in keeps.items()),
            "kl_first_guess": before,
            "kl_as_chosen": search.cost(keeps),
        }
        say(f"rows {name}: {keeps} {before:.5f} -> {search.cost(keeps):.5f}")
    with (args.out / "search.jsonl").open("w") as file:
        for (options, key), value in search.known.items():
            row = {"options": json.loads(options), "keeps": dict(zip(search.free, key, strict=True)), "kl": value}
            file.write(json.dumps(row) + "\n")
    return {
        "fitted_on": f"{args.fit} texts at {args.fit_contexts} tokens",
        "single_layer_kl": {f"{layer} {keep}": value for (layer, keep), value in single.items()},
        "ways": ways,
        "found": found,
    }


def check(
    args: Any, replay: Replay, tokenizer: Any, texts: list[str], table: dict[str, Any], start: float, say: Any
) -> list[dict[str, Any]]:
    """Step 4: one row per prompt and schedule."""
    path = args.out / "check.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["context"], row["kind"], row["index"], row["name"]) for row in rows}
    with path.open("a") as file:
        for number, context in enumerate(args.contexts):
            for kind, count in (("text", args.check[number]), ("needle", args.needles[number])):
                samples = prompts(tokenizer, texts, "check", kind, count, context)
                names = [name for name in table if kind == "text" or not name.endswith(NO_NEEDLES)]
                for batch in in_batches(samples, args.batch_tokens):
                    todo = [name for name in names if any((context, kind, i, name) not in done for i in batch)]
                    if not todo or time.time() - start > args.max_seconds:
                        continue
                    prefilled = Prefilled(replay, [samples[i] for i in batch], args.device)
                    for name in ("dense", *todo):
                        results = prefilled.dense() if name == "dense" else prefilled.run(table[name])
                        for index, result in zip(batch, results, strict=True):
                            if (context, kind, index, name) in done:
                                continue
                            row = {"context": context, "kind": kind, "index": index, "name": name, **result}
                            rows.append(row)
                            file.write(json.dumps(row) + "\n")
                    file.flush()
                    del prefilled
                say(f"{kind} at {context}")
    return rows


def summary(rows: list[dict[str, Any]], contexts: list[int], names: list[str]) -> list[dict[str, Any]]:
    """One entry per context and schedule."""
    found = []
    for context in contexts:
        for name in names:
            part = {k: [r for r in rows if (r["context"], r["kind"], r["name"]) == (context, k, name)] for k in
                    ("text", "needle")}  # fmt: skip
            kl = torch.tensor([row["kl"] for row in part["text"]], dtype=torch.float64)
            needles = part["needle"]
            every = part["text"] or needles
            if not every:
                continue
            found.append(
                {
                    "context": context, "schedule": name, "ffn_rows": sum(r["rows"] for r in every) / len(every),
                    "n": len(kl), "kl_text": float(kl.mean()) if len(kl) else None,
                    "kl_stderr": float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else None,
                    "kl_median": float(kl.median()) if len(kl) else None,
                    "kl_most": float(kl.max()) if len(kl) else None,
                    "needles": len(needles),
                    "needle_accuracy": sum(r["match"] for r in needles) / len(needles) if needles else None,
                    "kl_needle": sum(r["kl"] for r in needles) / len(needles) if needles else None,
                }
            )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
