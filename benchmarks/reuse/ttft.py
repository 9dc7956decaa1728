"""Time to first token with reused documents against a full prefill of the same ids, in one run on one machine.

    python benchmarks/reuse/ttft.py --model PATH --out DIR                                    # CPU, 4K of documents
    python benchmarks/reuse/ttft.py --shape llama-8b --device cuda --tokens 32768 --out DIR   # random weights

A reused first token pays for everything: reading the store, copying and rotating keys, choosing rows, the forward
over these rows and the query, handing over, and the forward that gives the first token. Baselines: this package's own
prefill with the same profile, and transformers' DynamicCache with sdpa. Runs are interleaved; medians and all times
are written.

Every line says what each part of a build took. Where a bar is set for a store (--bars), it says whether it is met.

Stores: "memory" (tensors on the compute device), "host" (page-locked host memory), "file" (a local folder; --cold drops
the files from the page cache before each run), "file-threads" (the same, hashed by threads where a GPU would do it),
"memory-int8" and "file-int8" (entries kept in int8), each filled beforehand: what is measured is a hit.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gzip
import io
import itertools
import json
import os
import platform
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import blend_of
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache, __version__
from redknot_hf.segments import sha256_kernel
from redknot_hf.segments.prompt import DEFAULT_SELECTOR, SegmentedPrompt
from redknot_hf.segments.stores import SegmentStore

SHAPES = {
    "llama-8b": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "tiny": dict(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
    ),
}


BARS = {"cuda": ["memory=4", "file=3"], "cpu": ["memory=3.5"]}


def load(args: argparse.Namespace) -> Any:
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="redknot")
        return model.eval().to(args.device)
    torch.manual_seed(0)
    with torch.device(args.device):
        config = LlamaConfig(**SHAPES[args.shape], eos_token_id=None, pad_token_id=0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="redknot").eval()


def drop_page_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(action: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = action()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


@contextlib.contextmanager
def by_threads() -> Iterator[None]:
    """No GPU hashes what is read."""
    inner, sha256_kernel.ready = sha256_kernel.ready, lambda device: False
    try:
        yield
    finally:
        sha256_kernel.ready = inner


def profile_python(action: Callable[[], Any], path: Path) -> None:
    """Where the host's time goes."""
    profile = cProfile.Profile()
    profile.runcall(action)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(45)
    path.write_text(text.getvalue())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder or Hub id")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on CPU, bfloat16 on a GPU")
    parser.add_argument("--tokens", type=int, default=4096, help="of all documents")
    parser.add_argument("--segment-tokens", type=int, default=512)
    parser.add_argument("--header-tokens", type=int, default=24)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument(
        "--selectors",
        nargs="+",
        default=["boundary", DEFAULT_SELECTOR],
        help="names, or blend:B:L:A:D[:S[:P]]: boundary, layer, attention, deviation, share, power",
    )
    parser.add_argument(
        "--stores",
        nargs="+",
        default=["memory", "file"],
        choices=["memory", "memory-int8", "host", "file", "file-int8", "file-threads"],
    )
    parser.add_argument("--folder", type=Path, help="for the file store; default: a temporary one")
    parser.add_argument("--verify", choices=["full", "header"], default="full", help="of what files hold")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each run")
    parser.add_argument("--profile", help="head profile; default: all heads global")
    parser.add_argument(
        "--global-heads", type=float, help="share of global heads of a made-up profile (4 + 256 elsewhere)"
    )
    parser.add_argument("--text", type=Path, help="documents from this .txt or .gz (with --model); default: random ids")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--bars",
        nargs="*",
        metavar="STORE=X",
        help="speed-ups to reach; default on a GPU memory=4 file=3, on a CPU memory=3.5",
    )
    parser.add_argument("--trace", action="store_true", help="torch.profiler's table of one run of each, into OUT")
    args = parser.parse_args()
    given = args.bars if args.bars is not None else BARS[args.device.partition(":")[0]]
    bars = {store: float(bar) for store, bar in (text.split("=") for text in given)}
    if args.text and not args.model:
        parser.error("--text needs the tokenizer of --model")

    model = load(args)
    device = args.device
    config = model.config
    profile = HeadProfile.all_global(config)
    if args.profile:
        profile = HeadProfile.load(args.profile)
    elif args.global_heads is not None:
        profile = HeadProfile.uniform(config, global_heads=args.global_heads)
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> list[int]:
        return torch.randint(3, config.vocab_size, (n,), generator=generator).tolist()

    if args.text:  # random ids draw the query's attention to the end of the prompt, and late rows cost most
        from transformers import AutoTokenizer

        opened = gzip.open if args.text.suffix == ".gz" else open
        with opened(args.text, "rt") as file:
            text = file.read(12 * (args.tokens + args.header_tokens + args.query_tokens))
        words = iter(AutoTokenizer.from_pretrained(args.model)(text, add_special_tokens=False)["input_ids"])

        def some(n: int) -> list[int]:
            taken = list(itertools.islice(words, n))
            if len(taken) < n:
                sys.exit(f"--text: {args.text} holds too few tokens")
            return taken

    header, query = some(args.header_tokens), some(args.query_tokens)
    documents = [some(args.segment_tokens) for _ in range(max(1, args.tokens // args.segment_tokens))]
    ids = torch.tensor([header + [i for d in documents for i in d] + query], device=device)

    folder = args.folder or Path(tempfile.mkdtemp(prefix="redknot-ttft-"))
    stores = {
        **dict.fromkeys(("memory", "memory-int8"), lambda: SegmentStore("memory://", device=device)),
        "host": lambda: SegmentStore("memory://", pin_memory=device.startswith("cuda")),
        **dict.fromkeys(
            ("file", "file-int8", "file-threads"),
            lambda: SegmentStore(f"file://{folder}", verify=args.verify, fsync=False),
        ),
    }
    actions: dict[str, Callable[[], Any]] = {}

    def dense() -> Any:
        model.set_attn_implementation("sdpa")
        try:
            return model(ids, past_key_values=DynamicCache(config=config), logits_to_keep=1).logits
        finally:
            model.set_attn_implementation("redknot")

    actions["prefill sdpa"] = dense
    actions["prefill redknot"] = lambda: (
        model(ids, past_key_values=RedKnotCache(config, profile), logits_to_keep=1).logits
    )
    accounts: dict[str, Any] = {}
    for kind in args.stores:
        kept = "int8" if kind.endswith("-int8") else None
        prompt = SegmentedPrompt(model, None, stores[kind](), profile, header=header, kv_dtype=kept)
        names = prompt.add_many(documents)
        prompt.build(names, query, 0.0, "boundary")
        for selector in args.selectors:
            rule, _, numbers = selector.partition(":")
            mine = blend_of(numbers) if numbers else rule

            def reuse(
                prompt: Any = prompt,
                names: Any = names,
                chosen: Any = mine,
                selector: str = selector,
                name: str = kind,
            ) -> Any:
                with by_threads() if name == "file-threads" else contextlib.nullcontext():
                    built = prompt.build(names, query, args.ratio, chosen)
                accounts[f"{name} {selector}"] = built.account
                return model(ids[:, -1:], past_key_values=built["past_key_values"]).logits

            actions[f"{kind} {selector}"] = reuse

    times: dict[str, list[float]] = {name: [] for name in actions}

    def report() -> tuple[list[dict[str, Any]], Path]:
        median = {name: statistics.median(values) for name, values in times.items()}
        best = min(median["prefill sdpa"], median["prefill redknot"])
        lines = []
        for name, seconds in median.items():
            line: dict[str, Any] = {
                "name": name,
                "median_s": round(seconds, 5),
                "times_s": [round(t, 5) for t in times[name]],
            }
            line["speedup_over_faster_prefill"] = round(best / seconds, 3)
            bar = bars.get(name.partition(" ")[0].removesuffix("-threads").removesuffix("-int8"))
            if bar is not None:
                line["bar"], line["met"] = bar, best / seconds >= bar
            if name in accounts:
                account = accounts[name]
                line["parts_s"] = {part: round(value, 5) for part, value in account.seconds.items()}
                line.update(
                    recomputed=account.recomputed, early_layers=account.early_layers, bytes_moved=account.bytes_moved
                )
                line["hits"] = all(segment.hit for segment in account.segments)
            lines.append(line)
        facts = {
            "date": str(date.today()),
            "command": " ".join(sys.argv),
            "model": args.model or args.shape,
            "device": torch.cuda.get_device_name(0) if device.startswith("cuda") else platform.machine(),
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype),
            "prompt_tokens": ids.shape[1],
            "segments": len(documents),
            "ratio": args.ratio,
            "text": str(args.text) if args.text else "random ids",
            "cold_files": args.cold,
            "verify": args.verify,
            "versions": {
                "redknot_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "table": lines,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        where = args.out / f"ttft_{Path(args.model or args.shape).name}_{device.partition(':')[0]}_{ids.shape[1]}.json"
        where.write_text(json.dumps(facts, indent=1) + "\n")
        return lines, where

    where_to = next(model.parameters()).device
    end = time.monotonic() + 60
    while sha256_kernel.available(where_to) and not sha256_kernel.ready(where_to) and time.monotonic() < end:
        time.sleep(0.1)  # it is compiled in the background, and threads hash until then

    for repeat in range(args.repeats + 1):
        for name, action in actions.items():
            if args.cold and name.startswith("file"):
                drop_page_cache(folder)
            seconds, _ = timed(action, device)
            if repeat:  # the first warms up
                times[name].append(seconds)
            print(f"{repeat} {name}: {seconds:.3f} s", file=sys.stderr)
        if repeat:
            lines, where = report()

    for line in lines:
        parts = " ".join(f"{k}={v:.3f}" for k, v in line.get("parts_s", {}).items())
        bar = f" (bar {line['bar']:g}x: {'met' if line['met'] else 'missed'})" if "bar" in line else ""
        print(
            f"{line['name']:<24}{line['median_s']:>9.3f} s {line['speedup_over_faster_prefill']:>7.2f}x{bar}  {parts}"
        )
    print(where, flush=True)
    if args.trace:
        args.out.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.startswith("cuda"):
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for name, action in actions.items():
            with torch.profiler.profile(activities=activities) as trace:
                timed(action, device)
            order = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
            table = trace.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
            (args.out / f"trace_{name.replace(' ', '_')}.txt").write_text(table)
            profile_python(action, args.out / f"python_{name.replace(' ', '_')}.txt")


if __name__ == "__main__":
    main()
