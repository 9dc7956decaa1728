"""Quality of reuse against rows recomputed: how much of a full prefill's answers is left.

    python benchmarks/reuse/quality.py --model PATH --data DIR --out DIR [--device cuda --n 100]

Each prompt is a HotpotQA question with its ten paragraphs in a shuffled order, joined to --documents segments. With
--task codes every paragraph ends with a code of its own and the question asks for one of them, which a small model can
answer. The reference is a full prefill of the same ids with the same model. Measured for every variant:

  kl        mean KL(full || variant) over the tokens of the gold answer, teacher-forced, nats
  top1      share of these tokens where both have the same most likely token
  kl_own    the same KL along the full prefill's own greedy answer
  agree     share of prompts whose greedy answer is the full prefill's, token by token
  first     share of prompts whose first answer token is the full prefill's
  full_exact  share of prompts where the full prefill's does
  correct   of the prompts where the full prefill's greedy answer contains the gold answer: share whose greedy answer is
            the same up to there (stricter than answering correctly)
  gold      share of prompts whose own greedy answer contains the gold answer, whatever words surround it; only for
            --generate, because it decodes token by token. Compare with full_gold, the same of the full prefill.
  kept      of the prompts where the full prefill's greedy answer begins with the gold answer, token by token: share
            where the variant's does
  margin    (in quality.jsonl) least lead of a gold token over the next one in the full prefill, nats; negative: it differs
  rows      share of the documents' rows that were computed anew
  work      share of the documents' (row, layer) pairs computed anew, layers that a selector ran over all rows included

with 95 % intervals (bootstrap over prompts). Results are appended to OUT/quality.jsonl prompt by prompt; a second start
continues there. Small models keep a GPU waiting: run several --shard processes into folders of their own, concatenate
their quality.jsonl and make the tables with --report-only. Reads DIR/multidoc/hotpotqa_distractor_sample100.jsonl.gz.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import itertools
import json
import math
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from redknot_hf import HeadProfile, RedKnotCache, __version__
from redknot_hf.segments.prompt import SegmentedPrompt
from redknot_hf.segments.select import Blend, Boundary, KVDeviation, PromptView, QueryAttention
from redknot_hf.segments.stores import SegmentStore

MARK = "<<<documents>>>"
QUESTIONS = 100  # in the sample
POWERS = {"mean": 1, "sharp": 2, "largest": math.inf}  # of the attention; `Blend` itself takes the fourth
INSTRUCTION = "Answer the question with a few words, using the documents.\n\n"


@dataclass(frozen=True)
class Variant:
    """A way to build the prompt: captured behind the header or alone, relocated or not, by which selector."""

    name: str
    selector: Any = "boundary"
    alone: bool = False
    relocate: bool = True
    contexts: str = ""  # what captures are the mean over, SOURCE:COUNT[:TOKENS]
    dtype: str | None = None  # None: that of the command line
    ratios: tuple[float, ...] | None = None  # None: those of the command line


class PaperHeads:
    """RedKnot's own recomputation: every row runs, only the global heads of a profile take the new keys."""

    def __init__(self, profile: HeadProfile):
        self.heads = np.array([[kind != "local" for kind in row] for row in profile.head_class])

    def __call__(self, view: PromptView) -> Any:
        partial = np.zeros(view.length, bool)
        partial[view.eligible] = True
        return view.eligible, partial, self.heads


class BoundaryThenRetrieval:
    """Boundary rows in every head; rows of large deviation only in the global heads of a profile."""

    def __init__(self, profile: HeadProfile, boundary: int):
        self.paper, self.boundary = PaperHeads(profile), boundary

    def __call__(self, view: PromptView) -> Any:
        answer = Blend(boundary=self.boundary, attention=0, deviation=1)(view)
        return answer, view.offsets() >= self.boundary, self.paper.heads


def blend_of(text: str) -> Blend:
    """``boundary:layer:attention:deviation[:share[:power]]``."""
    boundary, layer, *rest = text.split(":")
    return Blend(int(boundary), int(layer), *map(float, rest))


def variants_of(args: argparse.Namespace, profile: HeadProfile) -> list[Variant]:
    known = [
        Variant("naive", alone=True, relocate=False, ratios=(0.0,)),
        Variant("relocated", alone=True, ratios=(0.0,)),
        Variant("header", ratios=(0.0,)),
        Variant("none", ratios=(0.0,)),
        Variant("boundary_alone", Boundary(), alone=True),
        Variant("boundary", Boundary()),
        Variant("kv_deviation_alone", KVDeviation(), alone=True),
        Variant("kv_deviation", KVDeviation()),
        Variant("query_attention", QueryAttention()),
        Variant("paper", PaperHeads(profile), ratios=(1.0,)),
        Variant("boundary_retrieval", BoundaryThenRetrieval(profile, 8)),
        Variant("ours", Blend()),
        *(Variant(name, Blend(power=power)) for name, power in POWERS.items()),
        Variant("ours_all", Blend(share=1)),
        Variant("largest_all", Blend(share=1, power=math.inf)),
        Variant("bfloat16", ratios=(1.0,), dtype="bfloat16"),  # the full prefill itself, in another precision
        Variant("full", ratios=(1.0,)),
    ]
    known += [Variant(f"blend {text}", blend_of(text)) for text in args.blend or []]
    if not args.variants:
        return known
    by_name = {variant.name: variant for variant in known}
    found = []
    for name in args.variants:
        rest, _, contexts = name.partition(" @")
        if rest not in by_name:
            sys.exit(f"--variants: {rest} unknown; there are {', '.join(by_name)}")
        found.append(replace(by_name[rest], name=name, contexts=contexts))
    return found + [v for v in known if v.name.startswith("blend ") and v.name not in args.variants]


def contexts_of(spec: str, args: argparse.Namespace, tokenizer: Any, half: int) -> list[list[int]]:
    """Sample texts that segments are captured behind, 300 tokens of each unless said otherwise.

    Args:
        spec: ``corpus:N[:T]``, paragraphs of N other questions of the sample, or ``text:N[:T]``, N passages of
            --context-text; at most T tokens of each.
        half: 0 or 1: samples for the prompts of the first half of the questions come from the second, and the other way
            round, so that no prompt is built from what its segments were captured behind.
    """
    source, count, *tokens = spec.split(":")
    if source == "corpus":
        prompts = load_prompts(args.data, QUESTIONS, args.seed, args.documents, args.task)
        others = prompts[: QUESTIONS // 2] if half else prompts[QUESTIONS // 2 :]
        texts = ["".join(p["documents"]) for p in others[:: max(1, len(others) // int(count))]][: int(count)]
    elif source == "text" and args.context_text:
        with gzip.open(args.context_text, "rt") as file:
            whole = file.read(int(count) * 6000)
        texts = [whole[i : i + 6000] for i in range(0, len(whole), 6000)]
    else:
        sys.exit(f"contexts {spec}: expected corpus:N, or text:N together with --context-text")
    most = int(tokens[0]) if tokens else 300
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:most] for text in texts]


class Makers:
    """The `SegmentedPrompt` of every kind of capture, made when first asked for."""

    def __init__(self, model: Any, tokenizer: Any, header: list[int], args: argparse.Namespace):
        self.model, self.tokenizer, self.header, self.args = model, tokenizer, header, args
        self._made: dict[tuple[bool, str, str | None, int], SegmentedPrompt] = {}
        self._models: dict[str | None, Any] = {None: model}

    def __call__(self, variant: Variant, prompt: dict[str, Any]) -> SegmentedPrompt:
        half = int(prompt["i"] % QUESTIONS >= QUESTIONS // 2)
        kind = (variant.alone, variant.contexts, variant.dtype, half if variant.contexts else 0)
        if variant.dtype not in self._models:
            self._models[variant.dtype] = copy.deepcopy(self.model).to(getattr(torch, variant.dtype or ""))
        if kind not in self._made:
            contexts = contexts_of(variant.contexts, self.args, self.tokenizer, half) if variant.contexts else ()
            maker = SegmentedPrompt(
                self._models[variant.dtype],
                self.tokenizer,
                SegmentStore("memory://", device=self.model.device.type),
                HeadProfile.all_global(self.model.config),
                header=self.header,
                contexts=contexts,
                batch_tokens=self.args.batch_tokens,
            )
            if variant.alone:
                maker.behind = []
            self._made[kind] = maker
        return self._made[kind]

    def capture(self, variants: Sequence[Variant], prompts: Sequence[dict[str, Any]]) -> None:
        """Compute the documents of some prompts together, which a GPU does in far fewer launches."""
        for variant in variants:
            for half in (0, 1):
                some = [p for p in prompts if int(p["i"] % QUESTIONS >= QUESTIONS // 2) == half]
                if some:
                    self(variant, some[0]).add_many([text for p in some for text in p["documents"]])

    def forget(self) -> None:
        """Give the documents of some prompts back."""
        for maker in self._made.values():
            maker.store.gc(max_bytes=1)


def chat_frame(tokenizer: Any) -> tuple[list[int], str]:
    """Header ids and the text behind the question, from the model's chat template if it has one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": INSTRUCTION + MARK}], tokenize=False, add_generation_prompt=True
        )
        head, tail = text.split(MARK)
        return tokenizer(head, add_special_tokens=False)["input_ids"], tail
    return tokenizer(INSTRUCTION)["input_ids"], "\nAnswer:"


def load_prompts(data: Path, n: int, seed: int, segments: int = 10, task: str = "hotpot") -> list[dict[str, Any]]:
    path = data / "multidoc" / "hotpotqa_distractor_sample100.jsonl.gz"
    if not path.is_file():
        sys.exit(f"--data: {path} does not exist")
    prompts = []
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    for i in range(n):  # beyond the sample: the same questions in another order
        row, shuffle = rows[i % len(rows)], random.Random(f"{seed}/{i}")
        context = row["context"]
        documents = [
            f"Document: {title}\n{''.join(sentences).strip()}\n\n"
            for title, sentences in zip(context["title"], context["sentences"], strict=True)
        ]
        question, answer, start = row["question"], row["answer"], ""
        if task == "codes":
            codes = [str(shuffle.randrange(10000, 100000)) for _ in documents]
            documents = [
                f"{text.rstrip()} The code of {title} is {code}.\n\n"
                for text, title, code in zip(documents, context["title"], codes, strict=True)
            ]
            asked = shuffle.randrange(len(documents))
            question, answer = f"What is the code of {context['title'][asked]}?", codes[asked]
            start = f"The code of {context['title'][asked]} is "
        shuffle.shuffle(documents)
        edges = [round(j * len(documents) / segments) for j in range(segments + 1)]
        documents = ["".join(documents[a:b]) for a, b in itertools.pairwise(edges) if a < b]
        prompts.append({"i": i, "documents": documents, "question": question, "answer": answer, "start": start})
    return prompts


@torch.no_grad()
def forward(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities fp32 ``[n, vocab]`` at the last ``n`` of ``ids``, over a cache of what precedes them."""
    return model(ids, past_key_values=cache).logits[0].float().log_softmax(-1)


@torch.no_grad()
def reference(model: Any, ids: torch.Tensor, gold: list[int], most: int, stop: set[int]) -> dict[str, Any]:
    """Full prefill: log-probabilities along the gold answer and along its own greedy answer."""
    cache = RedKnotCache.for_model(model, HeadProfile.all_global(model.config))
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    device = ids.device
    golden = forward(model, cache.fork(), torch.cat([ids[:, -1:], torch.tensor([gold[:-1]], device=device).long()], 1))
    token, own, rows = ids[:, -1:], [], []
    while len(own) < most:
        row = forward(model, cache, token)
        rows.append(row)
        own.append(int(row[-1].argmax()))
        if own[-1] in stop:
            break
        token = torch.tensor([[own[-1]]], device=device)
    margins = golden.gather(1, torch.tensor(gold, device=device)[:, None])[:, 0]
    others = golden.scatter(1, torch.tensor(gold, device=device)[:, None], -torch.inf).amax(1)
    return {"gold": golden, "own": torch.cat(rows), "own_ids": own, "margin": float((margins - others).min())}


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    return float((full.exp() * (full - other)).sum(-1).mean())


@torch.no_grad()
def judge(model: Any, built: Any, full: dict[str, Any], gold: list[int], reached: int) -> dict[str, float]:
    ids, cache, device = built["input_ids"], built["past_key_values"], built["input_ids"].device
    last = int(ids[0, -1])
    follow = [[last, *gold[:-1]], [last, *full["own_ids"][:-1]]]
    width = max(map(len, follow))  # padding on the right changes nothing before it
    both = torch.tensor([row + [0] * (width - len(row)) for row in follow], device=device)
    cache.batch_repeat_interleave(2)
    logits = model(both, past_key_values=cache).logits.float().log_softmax(-1)
    golden, along = logits[0, : len(follow[0])], logits[1, : len(follow[1])]
    same = (along.argmax(-1) == torch.tensor(full["own_ids"], device=device)).tolist()
    account = built.account
    documents = sum(s.tokens for s in account.segments[1:])
    layers = model.config.get_text_config().num_hidden_layers
    early = sum(s.tokens for s in account.segments[1:] if not s.exact) * account.early_layers
    work = (account.recomputed * layers + early) / (documents * layers)
    return {
        "kl": divergence(full["gold"], golden),
        "kept": float(golden.argmax(-1).tolist() == gold) if full["gold"].argmax(-1).tolist() == gold else float("nan"),
        "full_exact": float(full["gold"].argmax(-1).tolist() == gold),
        "top1": float((full["gold"].argmax(-1) == golden.argmax(-1)).float().mean()),
        "kl_own": divergence(full["own"], along),
        "first": float(same[0]),
        "agree": float(all(same)),
        "correct": float(all(same[:reached])) if reached else float("nan"),
        "rows": account.recomputed / documents,
        "work": work,
        "early": account.early_layers,
        "seconds": account.seconds["total"],
        "gold": float("nan"),
    }


def answer_of(model: Any, built: Any, most: int, stop: set[int]) -> list[int]:
    """The variant's own greedy answer."""
    out = model.generate(**built, max_new_tokens=most, do_sample=False, eos_token_id=sorted(stop), pad_token_id=0)
    return out[0, built["input_ids"].shape[1] :].tolist()


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean and the 95 % bootstrap interval over prompts."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    draws = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(1)
    return float(values.mean()), float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


MEASURES = (
    "kl",
    "top1",
    "kl_own",
    "first",
    "agree",
    "correct",
    "gold",
    "full_gold",
    "kept",
    "full_exact",
    "rows",
    "work",
    "early",
)


def summarize(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["variant"], record["ratio"]), []).append(record)
    table = []
    for (name, ratio), rows in groups.items():
        line: dict[str, Any] = {"variant": name, "ratio": ratio, "n": len(rows)}
        for measure in MEASURES:
            mean, low, high = interval(np.array([row.get(measure, float("nan")) for row in rows], float))
            line[measure] = round(mean, 5)
            if measure not in ("rows", "work", "early"):
                line[measure + "_low"], line[measure + "_high"] = round(low, 5), round(high, 5)
        table.append(line)
    return table


def draw(table: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for ax, measure, label in zip(
        axes, ("kl", "agree"), ("KL at the gold answer, nats", "same greedy answer, share"), strict=True
    ):
        for number, name in enumerate(dict.fromkeys(line["variant"] for line in table)):
            lines = sorted((line for line in table if line["variant"] == name), key=lambda line: line["work"])
            x = [line["work"] for line in lines]
            y = [line[measure] for line in lines]
            error = [
                [max(0, line[measure] - line[measure + "_low"]) for line in lines],
                [max(0, line[measure + "_high"] - line[measure]) for line in lines],
            ]
            color = plt.get_cmap("tab20")(number * 2 % 20 + number * 2 // 20 % 2)
            ax.errorbar(x, y, yerr=error, marker="o", ms=4, lw=1, capsize=2, label=name, color=color)
        ax.set_xlabel("rows x layers recomputed, share")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].axhline(0.03, color="black", lw=0.6, ls=":")
    axes[1].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with multidoc/hotpotqa_distractor_sample100..."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--task", choices=["hotpot", "codes"], default="hotpot")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--start", type=int, default=0, help="first prompt; --n is the end")
    parser.add_argument(
        "--documents", type=int, default=4, help="segments that the ten paragraphs are joined to; 10: each its own"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15, 0.3])
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME[ @SOURCE:N[:T]]",
        help="only these; @SOURCE:N[:T]: captures are means over N contexts of T tokens, from corpus or text",
    )
    parser.add_argument(
        "--blend", nargs="+", metavar="B:L:A:D[:S[:P]]", help="more: boundary:layer:attention:deviation:share:power"
    )
    parser.add_argument("--context-text", type=Path, help="for text:N: a .gz of text")
    parser.add_argument("--profile", help="head map of the head-wise variants; default: shipped, else spread")
    parser.add_argument(
        "--generate", nargs="*", default=["boundary", "ours"], help="variants that answer on their own, too"
    )
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--group", type=int, default=1, help="prompts whose documents are computed together")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of one forward of documents")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th prompt from I on: one of N processes")
    parser.add_argument("--report-only", action="store_true", help="the tables of what OUT/quality.jsonl holds")
    parser.add_argument("--max-seconds", type=float, help="begin no further prompt after this time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="redknot"
    )
    model = model.eval().to(args.device)
    profile = head_map(model, args.profile)
    variants = variants_of(args, profile)
    header, tail = chat_frame(tokenizer)
    makers = Makers(model, tokenizer, header, args)
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])

    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "quality.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["i"], r["variant"], r["ratio"]) for r in records}
    prompts = load_prompts(args.data, args.n, args.seed, args.documents, args.task)
    begin = time.time()
    with log.open("a") as file:
        shard, shards = map(int, args.shard.split("/"))

        def plan_of(prompt: dict[str, Any]) -> list[tuple[Variant, float]]:
            every = [(v, r) for v in variants for r in (v.ratios or args.ratios)]
            return [(v, r) for v, r in every if (prompt["i"], v.name, r) not in done]

        mine = (
            [] if args.report_only else [prompt for prompt in prompts[args.start :][shard::shards] if plan_of(prompt)]
        )
        for count, prompt in enumerate(tqdm(mine, desc="prompts")):
            if args.max_seconds and time.time() - begin > args.max_seconds:
                break
            plan = plan_of(prompt)
            if count % args.group == 0:
                makers.forget()
                together = mine[count : count + args.group]
                makers.capture([Variant("first"), *(v for p in together for v, _ in plan_of(p))], together)
            query = f"Question: {prompt['question']}{tail}{prompt['start']}"
            gold = tokenizer(prompt["answer"], add_special_tokens=False)["input_ids"]

            def build(variant: Variant, ratio: float, prompt: Any = prompt, query: str = query) -> Any:
                maker = makers(variant, prompt)
                ids = maker.add_many(prompt["documents"])
                return maker.build(ids, query, ratio, variant.selector, relocate=variant.relocate)

            first = build(Variant("first"), 0.0)
            full = reference(model, first["input_ids"], gold, args.max_new_tokens, stop)
            text = tokenizer.decode(full["own_ids"], skip_special_tokens=True)
            reached = reach(tokenizer, full["own_ids"], prompt["answer"])
            for variant, ratio in plan:
                built = build(variant, ratio)
                text_of_its_own = None
                if variant.name in args.generate:
                    own = answer_of(model, build(variant, ratio), args.max_new_tokens, stop)
                    text_of_its_own = tokenizer.decode(own, skip_special_tokens=True)
                record = {
                    "i": prompt["i"],
                    "variant": variant.name,
                    "ratio": ratio,
                    **judge(makers(variant, prompt).model, built, full, gold, reached),
                    "answer": text_of_its_own,
                    "tokens": built.account.tokens,
                    "full_answer": text,
                    "gold_answer": prompt["answer"],
                }
                record["margin"] = full["margin"]
                record["full_gold"] = float(reached > 0)
                if text_of_its_own is not None:
                    record["gold"] = float(prompt["answer"].lower() in text_of_its_own.lower())
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
    wanted = {(v.name, r) for v in variants for r in (v.ratios or args.ratios)}
    chosen = [r for r in records if (r["variant"], r["ratio"]) in wanted and args.start <= r["i"] < args.n]
    report(args, summarize(chosen), profile, time.time() - begin)


def reach(tokenizer: Any, own: list[int], gold: str) -> int:
    """How many tokens of the full prefill's answer it takes to contain the gold answer; 0 if it never does."""
    for count in range(1, len(own) + 1):
        if gold.lower() in tokenizer.decode(own[:count], skip_special_tokens=True).lower():
            return count
    return 0


def head_map(model: Any, name: str | None) -> HeadProfile:
    if name:
        return HeadProfile.load(name)
    profile = RedKnotCache(model.config).profile
    return profile or HeadProfile.uniform(model.config, global_heads=0.15)


def report(args: argparse.Namespace, table: list[dict[str, Any]], profile: HeadProfile, took: float) -> None:
    device = torch.cuda.get_device_name(0) if args.device.startswith("cuda") else platform.processor() or "cpu"
    facts = {
        "date": str(date.today()),
        "command": " ".join(sys.argv),
        "model": args.model,
        "dtype": args.dtype,
        "device": device,
        "task": args.task,
        "documents_per_prompt": args.documents,
        "head_map": profile.metadata.get("method"),
        "versions": {
            "redknot_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "seconds": round(took, 1),
    }
    (args.out / "quality.json").write_text(json.dumps({**facts, "table": table}, indent=1) + "\n")
    if table:
        with (args.out / "quality.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    columns = (
        "ratio",
        "n",
        "rows",
        "work",
        "kl",
        "kl_low",
        "kl_high",
        "top1",
        "kl_own",
        "agree",
        "first",
        "correct",
        "gold",
        "full_gold",
        "kept",
        "full_exact",
    )
    print(f"{'variant':<24}" + "".join(f"{column:>10}" for column in columns))
    for line in sorted(table, key=lambda line: (line["ratio"], line["kl"])):
        print(f"{line['variant']:<24}" + "".join(f"{line[column]:>10.4g}" for column in columns))
    try:
        draw(table, args.out / "quality.png", f"{Path(args.model).name}, {args.task}, {device}, {facts['date']}")
    except ImportError:
        print("matplotlib is not installed: no picture")


if __name__ == "__main__":
    main()
