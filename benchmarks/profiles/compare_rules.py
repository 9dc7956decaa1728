"""Which rule finds the heads? Every rule at every budget, on one model: memory, text, needles, with intervals.

    python benchmarks/profiles/compare_rules.py --model DIR --data DIR --out DIR --device cuda

Calibration: as `profile_heads` does it, on WikiText-2's validation set (or with --made-up on the package's own text),
the same prompts for every rule. Evaluation: other text (Wikipedia articles and WikiText-2's test set) and other
needles.
Two modes: "full" prefills with full attention and evicts before the question (contexts' KV is shared by all maps, so
this is cheap); "windowed" applies the windows while prefilling, on all 2K needles, half of the texts and half of the
4K needles. Local heads of every map keep 4 + 256 tokens on average. Results are rewritten after every map, so an
interrupted run leaves what it has. No network.

Written: results.json, results.csv, rows.json (per prompt), rules.png, and the profile SmolLM2-135M-Instruct.json.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import platform
import random
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import rules
from plot_rules import plot

from redknot_hf.heads.profiler.checkpoint import Checkpoint
from redknot_hf.heads.profiler.choose import select_profile
from redknot_hf.heads.profiler.collect import Workload, batches, build_prompts, frozen, measure_heads, workload
from redknot_hf.heads.profiler.intercept import decoder_layout
from redknot_hf.heads.profiler.many_maps import map_rows
from redknot_hf.heads.profiler.objective import Objective
from redknot_hf.heads.profiler.refine import Search, search_on
from redknot_hf.heads.profiler.tasks import collate, make_needles, make_texts
from redknot_hf.heads.profiler.texts import TokenStream
from redknot_hf.heads.profiler.validation import Prompts, Row, full_reference, summarise
from redknot_hf.heads.profiler.visibility import HeadMap

KINDS = ("passkey", "number", "lookup")
WINDOWS = (64, 128, 256, 512, 1024)
"""Window sizes that ours may give a local head; the mean is that of all other rules."""


class Log:
    """Prints with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.time()

    def __call__(self, *text: Any) -> None:
        print(f"[{self.seconds:6.1f}s]", *text, flush=True)

    @property
    def seconds(self) -> float:
        return time.time() - self.start

    # The interface of a progress bar, for `measure_heads`.
    def update(self, n: int) -> None: ...

    def set_description(self, text: str) -> None:
        self.note = text


def read_texts(folder: Path, part: str) -> list[str]:
    """ "valid": WikiText-2's validation set. "test": its test set and 87 Wikipedia articles, shuffled."""
    texts = []
    if part == "test":
        with tarfile.open(folder / "text" / "wikipedia_87_articles.tar.gz") as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                if member.isfile():
                    texts.append(archive.extractfile(member).read().decode("utf-8", errors="replace"))  # type: ignore[union-attr]
    with gzip.open(folder / "text" / f"wikitext-2-{part}.txt.gz", "rt", encoding="utf-8") as file:
        wiki = file.read()
    texts += [wiki[i : i + 20_000] for i in range(0, len(wiki), 20_000)]
    random.Random(0).shuffle(texts)
    return texts


def evaluation_sets(tokenizer: Any, texts: list[str], args: argparse.Namespace) -> dict[str, list[Any]]:
    """Samples by set name; the sets share no text."""
    third = max(1, len(texts) // 3)
    streams = [TokenStream(tokenizer, texts[i * third : (i + 1) * third], f"evaluation-{i}") for i in range(3)]
    short, long = args.contexts
    return {
        "needle_short": make_needles(tokenizer, streams[0], args.n, short, "evaluation", KINDS),
        "text": make_texts(tokenizer, streams[1], args.texts, short, 128),
        "needle_long": make_needles(tokenizer, streams[2], args.n, long, "evaluation-long", KINDS),
    }


def references(model: Any, sets: dict[str, list[Any]], args: argparse.Namespace, log: Log) -> dict[str, list[Prompts]]:
    device = next(model.parameters()).device
    found: dict[str, list[Prompts]] = {}
    for name, samples in sets.items():
        size = 1 if device.type == "cpu" else max(1, args.batch_tokens // len(samples[0].context))
        found[name] = [full_reference(model, collate(group, device)) for group in batches(samples, size)]
        log("full cache:", name, len(samples), "prompts in batches of", size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument(
        "--data", required=True, type=Path, help="folder with text/wikipedia_87_articles.tar.gz and wikitext"
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--n", type=int, default=100, help="needle prompts per context length")
    parser.add_argument("--texts", type=int, default=100, help="text prompts")
    parser.add_argument("--contexts", type=int, nargs=2, default=[2048, 4096], help="tokens, short and long")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.25, 0.35, 0.5])
    parser.add_argument("--modes", nargs="+", default=["full", "windowed"])
    parser.add_argument(
        "--calibration", type=int, help="retrieval prompts of the calibration (default: the profiler's)"
    )
    parser.add_argument("--made-up", action="store_true", help="calibrate on the text that comes with the package")
    parser.add_argument(
        "--gate-steps", type=int, help="steps of the gate optimisation (default 64 on a CPU, 200 on a GPU)"
    )
    parser.add_argument("--batch-tokens", type=int, default=51_200, help="context tokens per batch on a GPU")
    parser.add_argument("--max-seconds", type=float, default=360, help="start no new map after this time")
    parser.add_argument("--profile-budget", type=float, default=0.25)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log()
    # TF32: ten times the speed of fp32 on the same weights, errors far below the KL of any map (the map "all global"
    # shows it).
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    layout = decoder_layout(model)
    device = torch.device(args.device)
    log(
        "loaded",
        args.model,
        "on",
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
    )

    with frozen(model):
        measured, ablation, profiles, load, gate_steps = calibrate(model, tokenizer, layout, args, log)
        maps = head_maps(layout, measured, ablation, profiles, args)
        measured.prompts.clear()
        sets = references(model, evaluation_sets(tokenizer, read_texts(args.data, "test"), args), args, log)
        run(model, layout, maps, profiles, sets, args, log, load, gate_steps)


def calibrate(model: Any, tokenizer: Any, layout: Any, args: argparse.Namespace, log: Log):
    """The profiler's own measurements, single-head ablation for the rules of that name, and ours at every budget.

    Ablation is measured on the prompts of our search; the other rules need gradients or scores of the scored pass.
    """
    device = next(model.parameters()).device
    context = args.contexts[0]
    load: Workload = workload(device, context, args.calibration, sum(p.numel() for p in model.parameters()))
    steps = args.gate_steps or (64 if device.type == "cpu" else 200)
    source = None if args.made_up else read_texts(args.data, "valid")
    needles, texts = build_prompts(tokenizer, source, "profile", load.needles, load.texts, context, load.rows, 0)
    measured = measure_heads(
        model, layout, needles, texts, load, sink=rules.SINK, windows=WINDOWS,
        gate_window=rules.WINDOW, gate_steps=steps, gate_weight=5.0, seed=0, checkpoint=Checkpoint(args.out /
        "calibration.safetensors", "comparison"), progress=log,
    )  # fmt: skip
    log("calibrated on", len(needles), "needles and", len(texts), "texts,", steps, "gate steps")
    prompts = measured.prompts
    if load.search_needles:
        measured.prompts.clear()
        fresh = build_prompts(
            tokenizer, source, "selection", load.search_needles, load.search_texts, context, load.search_rows, 0
        )  # fmt: skip
        groups = [*batches(fresh[0], load.batch), *batches(fresh[1], load.batch)]
        prompts = [full_reference(model, collate(group, device)) for group in groups]
    ablation = rules.ablate(model, layout, prompts)
    log("ablated", len(ablation[0]), "heads on", sum(len(prompt.batch) for prompt in prompts), "prompts")
    profiles: dict[str, dict[float, Any]] = {}
    known: dict[Any, Any] = {}
    for mode in args.modes:
        search = remembering(known, search_on(
            model, layout, prompts, windows=WINDOWS, sink=rules.SINK, objective=Objective(),
            sketches=load.search_sketches, seed=0, mode=mode, rounds=load.rounds, lengths=load.lengths,
            singles=load.singles,
        ))  # fmt: skip
        profiles[mode] = {
            b: select_profile(model.config, layout, measured, budget=b, search=search) for b in args.budgets
        }
        for budget, profile in profiles[mode].items():
            log(f"ours at {budget:.0%}, {mode}:", json.dumps(profile.metadata["selection"]))
    return measured, ablation, profiles, load, steps


def remembering(known: dict[Any, Any], search: Search) -> Search:
    """The same search; what was measured or expanded for one mode is not done again for the other."""

    def cost(choices: Any) -> list[float]:
        keys = [tuple(choice.tolist()) for choice in choices]
        new = {key: choice for key, choice in zip(keys, choices, strict=True) if key not in known}
        if new:
            known.update(zip(new, search.cost(list(new.values())), strict=True))
        return [known[key] for key in keys]

    def expand(choice: Any, number: int) -> Any:
        key = (tuple(choice.tolist()), number, "expanded")
        if key not in known:
            known[key] = search.expand(choice, number)
        return known[key]

    return dataclasses.replace(search, cost=cost, expand=expand)


def head_maps(
    layout: Any, measured: Any, ablation: Any, profiles: dict[str, dict[float, Any]], args: argparse.Namespace
) -> dict[str, list[tuple[str, float, HeadMap]]]:
    """By mode: (rule, budget, map), the most telling first. Only ours depends on the mode."""
    cells = len(layout.layers) * layout.num_kv_heads
    by_rule = rules.orders(measured, layout, ablation)
    found: dict[str, list[tuple[str, float, HeadMap]]] = {}
    for mode in args.modes:
        maps = [("all global", 1.0, HeadMap.uniform(layout.num_layers, layout.num_kv_heads, rules.SINK, 2**30))]
        maps.append(("all local", 0.0, rules.uniform_map(layout, [])))
        for rule in rules.RULES:
            for budget in args.budgets:
                if rule == "ours":
                    visible = HeadMap.from_profile(profiles[mode][budget])
                else:
                    visible = rules.uniform_map(layout, by_rule[rule][: round(budget * cells)])
                maps.append((rule, budget, visible))
        for other in args.modes:
            if other != mode:
                budget = min(args.budgets, key=lambda b: abs(b - args.profile_budget))
                visible = HeadMap.from_profile(profiles[other][budget])
                maps.insert(2, (f"ours, chosen for {other}", budget, visible))
        found[mode] = maps
    return found


def evaluations(
    model: Any, maps: list[tuple[str, float, HeadMap]], used: dict[str, list[Prompts]], mode: str,
    args: argparse.Namespace, log: Log,
) -> Iterator[tuple[str, float, HeadMap, dict[str, list[Row]]]]:  # fmt: skip
    """Every map with its rows by set. Contexts are shared where eviction comes after the prefill: several at once."""
    size = 6 if mode == "full" and args.device != "cpu" else 1
    for start in range(0, len(maps), size):
        some = maps[start : start + size]
        if log.seconds > args.max_seconds:
            log("out of time before", mode, [entry[:2] for entry in some])
            continue
        found = {name: map_rows(model, prompts, [entry[2] for entry in some], mode) for name, prompts in used.items()}
        for i, (rule, budget, visible) in enumerate(some):
            yield rule, budget, visible, {name: rows[i] for name, rows in found.items()}


def run(
    model: Any, layout: Any, maps: dict[str, list[tuple[str, float, HeadMap]]], profiles: dict[str, dict[float, Any]],
    sets: dict[str, list[Prompts]], args: argparse.Namespace, log: Log, load: Workload, gate_steps: int,
) -> None:  # fmt: skip
    """Evaluate every map in every mode, writing after each."""
    environment = {
        "model": args.model, "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "dtype": args.dtype, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv),
        "calibration": {**load.__dict__, "gate_steps": gate_steps, "context": args.contexts[0]},
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    rows_by_map: list[dict[str, Any]] = []
    short, long = args.contexts
    half = {name: batches_[: max(1, len(batches_) // 2)] for name, batches_ in sets.items()}
    for mode in args.modes:
        used = sets if mode == "full" else {**half, "needle_short": sets["needle_short"]}
        for rule, budget, visible, rows in evaluations(model, maps[mode], used, mode, args, log):
            entry: dict[str, Any] = {
                "rule": rule, "budget": budget, "mode": mode,
                "kv_fraction_short": rules.kv_fraction(visible, layout, short),
                "kv_fraction_long": rules.kv_fraction(visible, layout, long),
                "kv_bytes_short": rules.kv_fraction(visible, layout, short) * dense_bytes(layout, short),
                "kv_bytes_long": rules.kv_fraction(visible, layout, long) * dense_bytes(layout, long),
            }  # fmt: skip
            entry["text"] = summarise(rows["text"])["text"]
            entry["needle_short"] = summarise(rows["needle_short"])["needle"]
            entry["needle_long"] = summarise(rows["needle_long"])["needle"]
            results.append(entry)
            rows_by_map.append(
                {"rule": rule, "budget": budget, "mode": mode}
                | {
                    n: [[r.kind, round(r.kl, 5), round(r.delta_nll, 5), r.hit, r.full_hit] for r in part]
                    for n, part in rows.items()
                }
            )
            write(args.out, environment, results, rows_by_map)
            log(f"{mode:8s} {rule:22s} {budget:4.0%}", describe(entry))
            if rule.startswith("ours"):
                save_profile(args, profiles, environment, results)
    try:
        plot(args.out / "results.json", args.out / "rules.png")
    except ImportError as error:  # the figures are complete without the picture
        log("no picture:", error, "- run plot_rules.py where matplotlib is")
    log("done")


def dense_bytes(layout: Any, tokens: int) -> int:
    """bfloat16 K and V of one sequence in a full cache."""
    return 2 * 2 * tokens * len(layout.layers) * layout.num_kv_heads * layout.head_dim


def describe(entry: dict[str, Any]) -> str:
    text, a, b = entry["text"], entry["needle_short"], entry["needle_long"]
    return (
        f"text KL {text['kl']:.4f} dNLL {text['delta_nll']:+.4f} | needles {a['accuracy']:.2f}/{a['full_accuracy']:.2f}"
        f" KL {a['kl']:.3f} | long {b['accuracy']:.2f}/{b['full_accuracy']:.2f} KL {b['kl']:.3f}"
    )


def write(out: Path, environment: dict[str, Any], results: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """JSON, CSV and per-prompt rows; called after every map."""
    document = {"environment": environment, "rules": rules.RULES, "results": results}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "rows.json").write_text(json.dumps(rows) + "\n")
    with open(out / "results.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        names = [
            "mode",
            "rule",
            "budget",
            "kv_bytes_short",
            "kv_bytes_long",
            "text_n",
            "text_kl",
            "text_kl_low",
            "text_kl_high",
        ]
        names += ["delta_nll", "delta_nll_low", "delta_nll_high", "text_top1"]
        for key in ("short", "long"):
            names += [
                f"{key}_{x}"
                for x in ("n", "accuracy", "accuracy_low", "accuracy_high", "full_accuracy", "kl", "kl_low", "kl_high")
            ]
        table.writerow(names)
        for e in results:
            t = e["text"]
            line = [e["mode"], e["rule"], e["budget"], int(e["kv_bytes_short"]), int(e["kv_bytes_long"])]
            line += [t["n"], t["kl"], *t["kl_95"], t["delta_nll"], *t["delta_nll_95"], t["top1"]]
            for key in ("needle_short", "needle_long"):
                k = e[key]
                line += [k["n"], k["accuracy"], *k["accuracy_95"], k["full_accuracy"], k["kl"], *k["kl_95"]]
            table.writerow([round(x, 5) if isinstance(x, float) else x for x in line])


def save_profile(
    args: argparse.Namespace, profiles: dict[str, dict[float, Any]], environment: dict[str, Any], results: list[Any]
) -> None:
    """The profile of --profile-budget, chosen for the cache's default mode, with what this run measured of it."""
    chosen = "windowed" if "windowed" in profiles else args.modes[0]
    profile = profiles[chosen][min(args.budgets, key=lambda b: abs(b - args.profile_budget))]
    budget = profile.metadata["budget"]["global_fraction"]
    validation = {}
    for entry in results:
        if entry["rule"] == ("ours" if entry["mode"] == chosen else f"ours, chosen for {chosen}"):
            if entry["budget"] != budget:
                continue
            keys = {
                "text": "text",
                f"needle_{args.contexts[0]}": "needle_short",
                f"needle_{args.contexts[1]}": "needle_long",
            }
            validation[entry["mode"]] = {name: rounded(entry[key]) for name, key in keys.items()}
    profile.metadata.update(
        model="HuggingFaceTB/SmolLM2-135M-Instruct" if "smol" in args.model.lower() else args.model,
        seed=0, prefill=chosen, device=environment["device"], dtype=args.dtype,
        data={
            "calibration": environment["calibration"],
            "texts": "the package's own" if args.made_up else "WikiText-2 validation set",
        },
        validation=validation,
        notes="Made and validated by benchmarks/profiles/compare_rules.py on held-out Wikipedia text and needles "
        "in it. Weights: a Q4_1 quantisation of SmolLM2-135M-Instruct converted to bfloat16.",
    )  # fmt: skip
    profile.save(args.out / "SmolLM2-135M-Instruct.json")


def rounded(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        k: [round(x, 5) for x in v] if isinstance(v, list) else round(v, 5) if isinstance(v, float) else v
        for k, v in entry.items()
    }


if __name__ == "__main__":
    main()
