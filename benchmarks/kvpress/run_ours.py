"""redknot-hf's side of the comparison with kvpress, and the prompts that both sides read.

    python benchmarks/kvpress/run_ours.py --model DIR --out benchmarks/results/kvpress --write-prompts /tmp/prompts.json \\
        --texts wikitext-2-test.txt.gz --calibration wikitext-2-valid.txt.gz
    python benchmarks/kvpress/run_ours.py --model DIR --out benchmarks/results/kvpress --prompts /tmp/prompts.json

"ours" is the head profile shipped for the model, its windows fitted so that what the cache *allocates* (slabs, page
tables, free pages) is at most the level: 35 % and 50 % of the dense cache. Once with prefill="full" (as kvpress prunes:
after a dense prefill), once with prefill="windowed" (the default). Level 100 % stands beside presses that keep every key.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Rows, batches, chosen, contexts, device_name, load_model, load_prompts, measure, padded_case

import redknot_hf
from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.eval.documents import read_texts
from redknot_hf.eval.methods import fitted
from redknot_hf.eval.prompts import PromptMaker
from redknot_hf.eval.tasks import make_examples

LEVELS = (0.35, 0.5)
SHIPPED = "SmolLM2-135M-Instruct"
PAGE = 16  # small pages: less is lost by rounding up, and this comparison is about bytes


def write_prompts(args: argparse.Namespace) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    texts = None if args.texts is None else read_texts(args.texts)
    prompts: list[dict[str, Any]] = []
    plan = (("single", args.tokens, args.n), ("kv_short", args.tokens // 2, args.n), ("ppl", args.tokens, args.text_n))
    for task, tokens, count in plan:
        maker = PromptMaker(tokenizer, tokens, seed=args.seed, texts=texts)
        for example in make_examples(task, maker, count):
            suffix = list(example.question)
            begin = 1 if task == "ppl" else len(suffix)
            if example.references:
                blank = "" if task == "kv_short" else " "
                suffix += maker.frame.ids(blank + example.references[0])
            prompts.append(
                {
                    "task": task,
                    "index": example.index,
                    "context": example.context,
                    "suffix": suffix,
                    "answer_start": begin,
                }
            )
    # One of each in turn: a run that is stopped early has some of each.
    prompts.sort(key=lambda prompt: prompt["index"])
    pieces = [] if args.calibration is None else _pieces("".join(read_texts(args.calibration)))
    shipped = HeadProfile.load(args.profile)
    whole = shipped.num_layers * shipped.num_kv_heads - shipped.count("local")
    scores = shipped.metadata["scores"]
    map_ = {"scores": scores.get("gate") or next(iter(scores.values())), "whole": whole}
    args.write_prompts.write_text(json.dumps({"gates": map_, "prompts": prompts, "calibration": pieces}))
    print(f"{len(prompts)} prompts in {args.write_prompts}")


def _pieces(text: str, count: int = 50, characters: int = 2000) -> list[str]:
    """Pieces spread over a text: what kvpress' on-the-fly DuoAttention scores are computed on."""
    step = max(1, (len(text) - characters) // count)
    return [text[i * step : i * step + characters] for i in range(count)]


def profile_at(
    model: Any, level: float, tokens: int, batch: int, prefill: str, shipped: HeadProfile | None = None
) -> HeadProfile:
    """A profile, windows fitted to allocate at most ``level`` of the dense bytes of ``batch`` x ``tokens``."""
    shipped = shipped or HeadProfile.load(SHIPPED)
    dense = shipped.dense_kv_bytes(tokens, batch, dtype=model.dtype)
    row = torch.zeros(batch, shipped.num_kv_heads, tokens, model.config.head_dim, dtype=model.dtype)
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def fits(profile: HeadProfile) -> bool:
        cache = RedKnotCache(model.config, profile, prefill=prefill, page_size=PAGE)
        if model.device.type == "cpu":  # a forward takes a second there, and allocates the same
            cache.adopt([(row, row)] * shipped.num_layers, tokens)
        else:
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache.memory_report().allocated <= level * dense

    return fitted(shipped, fits, PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kvpress"))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--write-prompts", type=Path)
    parser.add_argument("--texts", help="plain text for haystacks and KL (default: made-up prose)")
    parser.add_argument("--calibration", help="plain text for kvpress' on-the-fly DuoAttention")
    parser.add_argument("--tokens", type=int, default=1024, help="context of needles and texts; key-value has half")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--text-n", type=int, default=12)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--profile", default=SHIPPED, help="head profile of ours (default: the one shipped)")
    parser.add_argument("--only-padded", action="store_true", help="the padded batch alone")
    parser.add_argument("--tasks", help="some of single,kv_short,ppl (default: all), without the padded batch")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time (25 on a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.write_prompts:
        write_prompts(args)
        return
    data, digest = load_prompts(args.prompts)
    model = load_model(args.model, "redknot", args.device, args.dtype)
    own = HeadProfile.load(args.profile)
    cells = json.dumps([own.head_class, own.sink, own.window])
    head = {
        "prompts": digest,
        "profile": hashlib.sha256(cells.encode()).hexdigest()[:16],  # as `redknot eval` names it
        "command": "python benchmarks/kvpress/run_ours.py " + " ".join(sys.argv[1:]),
        "device": device_name(model),
        "dtype": args.dtype,
        "versions": {
            "redknot_hf": redknot_hf.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip
    rows = Rows(args.out / "ours.jsonl", head)
    profiles: dict[Any, HeadProfile] = {}

    def reader(level: float, prefill: str) -> Any:
        def read(group: list[dict[str, Any]]) -> tuple[Any, int, int]:
            key = (level, len(group[0]["context"]), len(group))  # either prefill ends with the same pages
            if key not in profiles:
                profiles[key] = profile_at(model, *key, "full", own)
            cache = RedKnotCache(model.config, profiles[key], prefill=prefill, page_size=PAGE)
            model(contexts(model, group), past_key_values=cache, use_cache=True, logits_to_keep=1)
            report = cache.memory_report()
            return cache, report.allocated, report.ideal

        return read

    def exact(group: list[dict[str, Any]]) -> tuple[Any, int, int]:
        cache = RedKnotCache(model.config, HeadProfile.all_global(model.config), page_size=PAGE)
        model(contexts(model, group), past_key_values=cache, use_cache=True, logits_to_keep=1)
        report = cache.memory_report()
        return cache, report.allocated, report.ideal

    # All heads global is exact: its distance is the noise of the dtype, below which nothing here means anything.
    methods: list[Any] = [("full", 1.0, None), ("ours, all global", 1.0, exact)]
    for level in LEVELS:
        methods.append(("ours", level, reader(level, "full")))
        methods.append(("ours, windowed prefill", level, reader(level, "windowed")))
    # The dense bytes, page tables included, are what the presses that only mask keys allocate.
    methods.append(("ours", 1.0, reader(1.0, "full")))
    long = next(p for p in data["prompts"] if p["task"] == "single")
    short = next(p for p in data["prompts"] if p["task"] == "kv_short")
    for prefill in () if args.tasks else ("full", "windowed"):
        profile = profile_at(model, 0.5, len(long["context"]), 1, prefill, own)

        def read(ids: torch.Tensor, mask: torch.Tensor | None, profile: Any = profile, prefill: str = prefill) -> Any:
            cache = RedKnotCache(model.config, profile, prefill=prefill, page_size=PAGE)
            position = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
            return cache

        name = "ours" if prefill == "full" else "ours, windowed prefill"
        if ("padded", 0, name, 0.5) not in rows.have:
            rows.add(task="padded", index=0, method=name, level=0.5, **padded_case(model, long, short, read))
    for group in [] if args.only_padded else batches(chosen(data["prompts"], args.tasks), args.batch):
        measure(rows, model, group, methods)


if __name__ == "__main__":
    main()
