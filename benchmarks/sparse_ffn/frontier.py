"""What sparse FFN costs in quality, for each importance, at each kept share; and what it saves, in the same run.

    python benchmarks/sparse_ffn/frontier.py --model DIR --data DIR --out DIR [--device cuda] [--n 32]

Quality: a context is prefilled under a schedule, what follows is fed densely and compared with the dense model.
Text: 128 tokens of continuation; they are not part of the prefill, so they have no say in the importance. Needles: the
question ends the prefill (its rows are the query), the answer follows; accuracy is exact match of the greedy answer.
Several fixed choices are printed beside the importances: random rows, the norm of the FFN's own output, no rows at all.

Time: whole prefills of one length, dense and sparse in turn, medians, beside the FLOPs of both (`redknot_hf.ledger`).

Every prompt's result is appended to rows.jsonl at once and never measured twice: run again to go on. Layers that no
schedule touches are run once per prompt and replayed. Written: rows.jsonl, time.json, results.json, results.csv,
frontier.png.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import json
import platform
import random
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plot_frontier import plot

import redknot_hf
from redknot_hf.heads.profiler.tasks import Sample, make_needles, make_texts
from redknot_hf.heads.profiler.texts import TokenStream
from redknot_hf.sparse_ffn import PRESETS, Band, SparseFFN, SparseFFNSchedule
from redknot_hf.sparse_ffn.structure import find_blocks

KINDS = ("passkey", "number", "lookup")
CONTINUATION = 128


def random_rows(view: Any) -> torch.Tensor:
    """Baseline: rows at random, other ones in each layer, the same in each run."""
    generator = torch.Generator().manual_seed(view.layer)
    return torch.rand(view.ffn_input.shape[:2], generator=generator).to(view.ffn_input.device)


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


def configurations(layers: int, names: list[str], full: bool) -> dict[str, tuple[str, SparseFFNSchedule]]:
    """name -> (importance, schedule). Depths are thirds and halves of the model, as 20, 15 and 10 of 30 layers."""
    late, half, early = layers * 2 // 3, layers // 2, layers // 3
    shares = [(late, 0.6), (late, 0.3), (late, 0.15), (half, 0.5), (half, 0.3), (early, 0.3)]
    if not full:
        shares = [(late, 0.6), (late, 0.3), (late, 0.15), (half, 0.3)]
    found = {}
    for name in names:
        for first, keep in shares:
            schedule = SparseFFNSchedule(keep=keep, first_layer=first, importance=IMPORTANCES[name])
            found[f"{name} from {first} keep {keep}"] = (name, schedule)
    found[f"none from {late}"] = ("none", SparseFFNSchedule(keep=0.0, first_layer=late, importance="hidden_change"))
    best = SparseFFNSchedule(keep=0.0, first_layer=layers - 1)  # exact: later tokens never read the last layer's rows
    found["last layer only"] = ("received_attention", best)
    for mass in (0.9, 0.7, 0.5) if full else (0.7,):
        found[f"received_attention from {late} mass {mass}"] = (
            "received_attention",
            SparseFFNSchedule(mass=mass, first_layer=late),
        )
    for name, steps in graded(layers).items():
        for importance in ("received_attention", "attention_norm") if full else ("received_attention",):
            bands = tuple(Band(first, keep=keep) for first, keep in steps)
            found[f"{importance} {name}"] = (importance, SparseFFNSchedule(bands=bands, importance=importance))
    for name, preset in PRESETS.items():
        found[f"preset {name}"] = ("preset", preset.schedule)
    return found


def graded(layers: int) -> dict[str, list[tuple[int, float]]]:
    """Schedules that keep less the deeper, and nothing in the last layer, where it is exact."""
    late, last = layers * 2 // 3, layers - 1
    tenth = max(1, layers // 10)
    return {
        "flat 0.60/0": [(late, 0.6), (last, 0.0)],
        "flat 0.31/0": [(late, 0.31), (last, 0.0)],
        "late 0.20/0": [(late + 1, 0.2), (last, 0.0)],
        "graded 0.6/0.2/0.1/0": [(late, 0.6), (late + tenth, 0.2), (late + 2 * tenth, 0.1), (last, 0.0)],
        "graded 0.45/0.15/0": [(late, 0.45), ((late + layers) // 2, 0.15), (last, 0.0)],
    }


# ---------------------------------------------------------------------------------------------------------- quality


class Replay:
    """The output of the layers before `first`, kept from the dense run and handed out instead of running them."""

    def __init__(self, model: Any, first: int):
        self.layers = [block.layer for block in find_blocks(model)]
        self.first = first

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self.outputs: dict[int, Any] = {}
        hooks = []
        for index in range(max(0, self.first - 2), self.first):

            def keep(module: Any, args: Any, output: Any, index: int = index) -> None:
                self.outputs[index] = output

            hooks.append(self.layers[index].register_forward_hook(keep))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def replaying(self, cache: DynamicCache, dense: DynamicCache) -> Iterator[None]:
        """Inside, layers before `first` do not run; their keys and values are those of ``dense``."""
        for index in range(self.first):
            layer = self.layers[index]

            def forward(hidden_states: Any, *args: Any, index: int = index, **kwargs: Any) -> Any:
                return self.outputs.get(index, hidden_states)

            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers[: self.first]:
                del layer.forward
        for index in range(self.first):  # after the forward: until then the cache counts as empty
            stored, n = dense.layers[index], self.tokens
            cache.update(stored.keys[:, :, :n], stored.values[:, :, :n], index)


@torch.no_grad()
def follow(model: Any, cache: DynamicCache, suffix: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (fp32 ``[rows, vocabulary]``) of every row of ``suffix``, fed after what the cache holds."""
    return log_softmax(model(suffix, past_key_values=cache).logits[0].float(), -1)


@torch.no_grad()
def measure(
    model: Any, sample: Sample, todo: dict[str, SparseFFNSchedule], replay: Replay, device: Any
) -> Iterator[tuple[str, dict[str, float]]]:
    """Run one prompt densely and under every schedule; rows of (schedule, result)."""
    needle = sample.kind != "text"
    # the question belongs to the prefill, its last token to what follows, because its logits are the first answer's
    split = sample.answer_start - 1 if needle else 0
    prompt = torch.tensor([sample.context + sample.suffix[:split]], device=device)
    suffix = torch.tensor([sample.suffix[split:]], device=device)
    target = suffix[0, 1:] if needle else None
    replay.tokens = prompt.shape[1]
    dense = DynamicCache(config=model.config)
    with replay.recording():
        model.model(prompt, past_key_values=dense)
    reference = follow(model, dense, suffix)[: -1 if needle else None]
    if needle:
        match = float((reference.argmax(-1) == target).all())
        yield "dense", {"kl": 0.0, "match": match, "agree": 1.0, "rows": 1.0}
    for name, schedule in todo.items():
        cache = DynamicCache(config=model.config)
        context = SparseFFN(model, schedule, query_tokens=split if needle else 0)
        first = min(index for index, rule in enumerate(context.rules) if rule is not None)
        skips = first >= replay.first
        with context, replay.replaying(cache, dense) if skips else contextlib.nullcontext():
            model.model(prompt, past_key_values=cache)
        rows = 1 - sum(s - r for s, r in zip(context.stats.seen, context.stats.run, strict=True)) / (
            len(replay.layers) * prompt.shape[1]
        )
        found = follow(model, cache, suffix)[: -1 if needle else None]
        kl = kl_div(found, reference, reduction="none", log_target=True).sum(-1).mean()
        result = {"kl": float(kl), "agree": float((found.argmax(-1) == reference.argmax(-1)).float().mean())}
        if needle:
            result["match"] = float((found.argmax(-1) == target).all())
        yield name, {**result, "rows": rows}


def read_texts(folder: Path) -> list[str]:
    """WikiText-2's test set and 87 Wikipedia articles, in pieces, shuffled."""
    texts = []
    with tarfile.open(folder / "text" / "wikipedia_87_articles.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.isfile():
                texts.append(archive.extractfile(member).read().decode("utf-8", errors="replace"))  # type: ignore[union-attr]
    with gzip.open(folder / "text" / "wikitext-2-test.txt.gz", "rt", encoding="utf-8") as file:
        wiki = file.read()
    texts += [wiki[i : i + 20_000] for i in range(0, len(wiki), 20_000)]
    random.Random(0).shuffle(texts)
    return texts


def prompts(tokenizer: Any, args: argparse.Namespace) -> dict[str, list[Sample]]:
    texts = read_texts(args.data)
    half = len(texts) // 2
    found = {}
    for length in args.contexts:
        stream = TokenStream(tokenizer, texts[:half], f"text-{length}")
        found[f"text-{length}"] = make_texts(tokenizer, stream, args.n, length, CONTINUATION)
        stream = TokenStream(tokenizer, texts[half:], f"needle-{length}")
        found[f"needle-{length}"] = make_needles(tokenizer, stream, args.needles, length, f"sparse-{length}", KINDS)
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
    parser.add_argument("--n", type=int, default=8, help="texts per context length")
    parser.add_argument("--needles", type=int, help="needle prompts per context length (default: as --n)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens")
    parser.add_argument("--importances", nargs="+", default=list(IMPORTANCES), choices=list(IMPORTANCES))
    parser.add_argument("--only", nargs="+", help="schedules whose name contains one of these words")
    parser.add_argument("--quick", action="store_true", help="fewer schedules")
    parser.add_argument("--time-tokens", type=int, default=4096, help="length of the timed prefills; 0 for no timing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=1e9, help="start no prompt after this time")
    args = parser.parse_args()
    args.needles = args.n if args.needles is None else args.needles
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="redknot"
    )
    model = model.to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    blocks = find_blocks(model)
    table = configurations(len(blocks), args.importances, not args.quick)
    importance = {name: entry[0] for name, entry in table.items()}
    if args.only:
        table = {name: entry for name, entry in table.items() if any(word in name for word in args.only)}
    path = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["set"], row["index"], row["schedule"]) for row in rows}
    replay = Replay(model, len(blocks) * 2 // 3)
    start = time.time()
    with path.open("a") as file:
        for part, samples in prompts(tokenizer, args).items() if args.n or args.needles else ():
            for index, sample in enumerate(samples):
                todo = {name: entry[1] for name, entry in table.items() if (part, index, name) not in done}
                if not todo or time.time() - start > args.max_seconds:
                    continue
                for name, result in measure(model, sample, todo, replay, args.device):
                    if (part, index, name) in done:
                        continue
                    row = {"set": part, "index": index, "kind": sample.kind, "schedule": name, **result}
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                print(f"[{time.time() - start:6.0f}s] {part} {index + 1}/{len(samples)}", flush=True)
    timing = time_prefill(model, args) if args.time_tokens else None
    summary = summarise(rows, importance)
    report = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(args.model).name,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
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
