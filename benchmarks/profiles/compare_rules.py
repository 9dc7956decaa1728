"""Which rule finds the heads? Every rule at every budget, on one model: memory, text, needles, with intervals.

    python benchmarks/profiles/compare_rules.py --model DIR --data DIR --out DIR --device cuda

Calibration: as `profile_heads` does it, on WikiText-2's validation set (or with --made-up on the package's own text),
the same prompts for every rule. Evaluation: other text (Wikipedia articles and WikiText-2's test set) and other
needles.
Two modes: "full" prefills with full attention and evicts before the question (contexts' KV is shared by all maps, so
this is cheap); "windowed" applies the windows while prefilling, on all 2K prompts and half of the 4K needles.
Local heads of every map keep 4 + 256 tokens on average, then 4 + 512: at one budget all rules keep the same bytes.
Results are rewritten as they come and --resume continues, so an interrupted run leaves what it has. No network.

Written: results.json, results.csv, rows.json.gz (per prompt), paired.csv (ours against each rule on the
same prompts), maps.json (every map), rules.png, and ours as profile files.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import paired
import rules
from choosing import Calibration, calibrate, choose_maps, choose_ours, given, head_map, read_texts
from plot_rules import plot

from redknot_hf.heads.profile import HeadProfile
from redknot_hf.heads.profiler.collect import (
    batches,
    frozen,
)
from redknot_hf.heads.profiler.intercept import decoder_layout
from redknot_hf.heads.profiler.many_maps import map_rows
from redknot_hf.heads.profiler.objective import Objective
from redknot_hf.heads.profiler.tasks import collate, make_needles, make_texts
from redknot_hf.heads.profiler.texts import TokenStream
from redknot_hf.heads.profiler.validation import Prompts, Row, full_reference, summarise
from redknot_hf.heads.profiler.visibility import HeadMap

KINDS = ("passkey", "number", "lookup")
FIRST = ("all global", "all local", "ours")
MAIN = ("gates", "ablation", "ablation (text)", "retrieval score", "output error (text)", "attention mass", "random 1")
"""Rules that are evaluated before the others where time may end."""


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
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--n", type=int, default=100, help="needle prompts per context length")
    parser.add_argument("--texts", type=int, default=100, help="text prompts")
    parser.add_argument("--contexts", type=int, nargs=2, default=[2048, 4096], help="tokens, short and long")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.25, 0.35, 0.5])
    parser.add_argument("--modes", nargs="+", default=["full", "windowed"])
    parser.add_argument(
        "--calibration", type=int, help="retrieval prompts of the calibration (default: the profiler's)"
    )
    parser.add_argument("--made-up", action="store_true", help="calibrate on the text that comes with the package")
    parser.add_argument("--gate-steps", type=int, help="steps of the gate optimisation (default: the profiler's)")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 512], help="tokens per local head on average")
    parser.add_argument(
        "--needle-weights",
        type=float,
        nargs="*",
        default=[],
        help="also evaluate ours with these needle_weight",
    )
    parser.add_argument(
        "--profile", type=Path, nargs="*", default=[], help="profile files to evaluate beside the rules"
    )
    parser.add_argument("--resume", type=Path, help="folder of an interrupted run: its maps and rows are taken over")
    parser.add_argument("--again", action="store_true", help="with --resume: choose and evaluate our maps anew")
    parser.add_argument("--batch-tokens", type=int, default=102_400, help="context tokens per batch on a GPU")
    parser.add_argument("--max-seconds", type=float, default=360, help="start no new map after this time")
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
        comparison = Comparison(model, tokenizer, layout, args, log)
        comparison.run()


class Comparison:
    """Maps, evaluation sets and results, those of an interrupted run first."""

    def __init__(self, model: Any, tokenizer: Any, layout: Any, args: argparse.Namespace, log: Log) -> None:
        self.model, self.tokenizer, self.layout, self.args, self.log = model, tokenizer, layout, args, log
        self.calibration: Calibration | None = None
        self.sets: dict[str, list[Prompts]] = {}
        self.environment: dict[str, Any] = {}
        self.maps: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        if args.resume:
            document = json.loads((args.resume / "maps.json").read_text())
            self.environment, self.maps = document["environment"], document["maps"]
            self.results = json.loads((args.resume / "results.json").read_text())["results"]
            self.rows = json.loads(gzip.decompress((args.resume / "rows.json.gz").read_bytes()))
            if args.again:
                self.maps, self.results, self.rows = (
                    [e for e in part if not e["rule"].startswith("ours")]
                    for part in (self.maps, self.results, self.rows)
                )
            for name in {e["profile"] for e in self.maps if e["profile"]}:
                (args.out / name).write_bytes((args.resume / name).read_bytes())

    def run(self) -> None:
        """The most telling first: all rules at the first window with eviction after the prefill, ours in the other mode,
        then the other windows, then what is left."""
        for rank in range(6):
            for window in self.args.windows[:1] if rank < 2 else self.args.windows:
                self.need_maps(window)
            wanted = [e for e in self.maps if self.rank(e) == rank]
            for mode in dict.fromkeys(e["mode"] for e in wanted):
                self.evaluate([e for e in wanted if e["mode"] == mode], mode)
        finish_profiles(self.args, self.environment, self.results)
        paired.write(self.rows, self.args.out / "paired.csv")
        try:
            plot(self.args.out / "results.json", self.args.out / "rules.png")
        except ImportError as error:  # the figures are complete without the picture
            self.log("no picture:", error, "- run plot_rules.py where matplotlib is")
        self.log("done")

    def rank(self, e: dict[str, Any]) -> int:
        first, full = e["window"] == self.args.windows[0], e["mode"] == "full"
        group = 0 if e["rule"] in FIRST or e["rule"].startswith(("profile ", "ours")) else 1 if e["rule"] in MAIN else 2
        if first:
            return 0 if full else (1, 4, 5)[group]
        return (2, 2, 5)[group] if full else (3, 4, 5)[group]

    def need_maps(self, window: int) -> None:
        known = {e["rule"] for e in self.maps if e["window"] == window}
        weights = {"ours": 1.0} | {f"ours, needles x{weight:g}": weight for weight in self.args.needle_weights}
        if known.issuperset(weights) or self.log.seconds > self.args.max_seconds:
            return
        if self.calibration is None:
            self.calibration = calibrate(self.model, self.tokenizer, self.layout, self.args, self.log)
            earlier = self.environment.get("command")
            self.environment = self.calibration.environment | ({"other rules": earlier} if earlier else {})
        parts = (self.model, self.layout, self.calibration, window, self.args, self.log)
        if not known:  # they may be an earlier run's
            self.maps += choose_maps(*parts)
        if window == self.args.windows[0]:
            paths = [path for path in self.args.profile if f"profile {path.stem}" not in known]
            self.maps += [given(path, window, mode) for path in paths for mode in self.args.modes]
            for mode in self.args.modes:
                self.evaluate([e for e in self.maps if e["mode"] == mode and e["rule"].startswith("profile ")], mode)
        self.save_maps()
        for rule in [rule for rule in weights if rule not in known]:
            for found in choose_ours(*parts, rule, Objective.weighted(weights[rule])):
                self.maps.append(found)
                self.save_maps()
                self.evaluate([found], found["mode"])

    def save_maps(self) -> None:
        document = {"environment": self.environment, "maps": self.maps}
        (self.args.out / "maps.json").write_text(json.dumps(document) + "\n")

    def evaluate(self, maps: list[dict[str, Any]], mode: str) -> None:
        """Evaluate maps of one mode that have no result yet. Contexts are shared where eviction comes after the prefill:
        several maps at once."""
        done = {identity(e) for e in self.results}
        maps = [e for e in maps if identity(e) not in done]
        size = 7 if mode == "full" and self.args.device != "cpu" else 1
        for start in range(0, len(maps), size):
            some = maps[start : start + size]
            if self.log.seconds > self.args.max_seconds:
                self.log("out of time before", mode, [identity(e)[:3] for e in some])
                continue
            if not self.sets:
                samples = evaluation_sets(self.tokenizer, read_texts(self.args.data, "test"), self.args)
                self.sets = references(self.model, samples, self.args, self.log)
            long_half = self.sets["needle_long"][: max(1, len(self.sets["needle_long"]) // 2)]
            used = self.sets if mode == "full" else {**self.sets, "needle_long": long_half}
            visible = [head_map(e) for e in some]
            found = {name: map_rows(self.model, prompts, visible, mode) for name, prompts in used.items()}
            for i, e in enumerate(some):
                self.add(e, visible[i], {name: rows[i] for name, rows in found.items()})
            write(self.args.out, self.environment, self.results, self.rows)

    def add(self, e: dict[str, Any], visible: HeadMap, rows: dict[str, list[Row]]) -> None:
        short, long = self.args.contexts
        what = {key: e[key] for key in ("rule", "budget", "window", "mode")}
        share = {name: rules.kv_fraction(visible, self.layout, n) for name, n in (("short", short), ("long", long))}
        result: dict[str, Any] = {
            **what, "profile": e["profile"], "kv_fraction_short": share["short"], "kv_fraction_long": share["long"],
            "kv_bytes_short": share["short"] * dense_bytes(self.layout, short),
            "kv_bytes_long": share["long"] * dense_bytes(self.layout, long),
            "text": summarise(rows["text"])["text"],
            "needle_short": summarise(rows["needle_short"])["needle"],
            "needle_long": summarise(rows["needle_long"])["needle"],
        }  # fmt: skip
        self.results.append(result)
        self.rows.append(
            what
            | {
                name: [[r.kind, round(r.kl, 5), round(r.delta_nll, 5), r.hit, r.full_hit] for r in part]
                for name, part in rows.items()
            }
        )
        self.log(f"{what['mode']:8s} {what['window']} {what['rule']:22s} {what['budget']:4.0%}", describe(result))


def identity(e: dict[str, Any]) -> tuple[Any, ...]:
    return e["rule"], e["budget"], e["window"], e["mode"]


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
    (out / "rows.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode(), 6, mtime=0))
    with open(out / "results.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        names = [
            "mode",
            "window",
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
            line = [e["mode"], e["window"], e["rule"], e["budget"], int(e["kv_bytes_short"]), int(e["kv_bytes_long"])]
            line += [t["n"], t["kl"], *t["kl_95"], t["delta_nll"], *t["delta_nll_95"], t["top1"]]
            for key in ("needle_short", "needle_long"):
                k = e[key]
                line += [k["n"], k["accuracy"], *k["accuracy_95"], k["full_accuracy"], k["kl"], *k["kl_95"]]
            table.writerow([round(x, 5) if isinstance(x, float) else x for x in line])


def finish_profiles(args: argparse.Namespace, environment: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Put into every profile of ours what this run measured of it."""
    keys = {"text": "text"} | {
        f"needle_{length}": name for length, name in zip(args.contexts, ("needle_short", "needle_long"), strict=True)
    }
    for result in results:
        if result["profile"] is None:
            continue
        profile = HeadProfile.load(args.out / result["profile"])
        figures = {name: rounded(result[key]) for name, key in keys.items()}
        figures["kv_bytes_fraction"] = round(result["kv_fraction_short"], 4)
        profile.metadata.setdefault("validation", {})[result["mode"]] = figures
        profile.metadata.update(
            model="HuggingFaceTB/SmolLM2-135M-Instruct" if "smol" in args.model.lower() else args.model,
            data={
                "calibration": environment["calibration"],
                "texts": "the package's own" if args.made_up else "WikiText-2 validation set",
            },
            notes="Made and validated by benchmarks/profiles/compare_rules.py on held-out Wikipedia text and needles "
            "in it. Weights: a Q4_1 quantisation of SmolLM2-135M-Instruct converted to bfloat16.",
        )  # fmt: skip
        profile.save(args.out / result["profile"])


def rounded(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        k: [round(x, 5) for x in v] if isinstance(v, list) else round(v, 5) if isinstance(v, float) else v
        for k, v in entry.items()
    }


if __name__ == "__main__":
    main()
