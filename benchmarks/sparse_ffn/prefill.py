"""Where the time of a sparse prefill goes: mechanisms in turn, the parts of one layer, and kernels by name.

    python benchmarks/sparse_ffn/prefill.py --model DIR --out DIR [--random-weights] [--device cuda] [--tokens 16384 32768]

For every length: `redknot_hf.ledger` over the dense model, head classes, and the schedule with and without the mean in rows
that are left out, all in turn in one process; what the parts of one layer take alone (its FFN and norm over all rows and
over the rows that pass, measuring, ranking, gathering, scattering), medians; on a GPU, the seconds of the kernels of one
dense and one sparse prefill. Each length writes prefill_TOKENS.json when it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.commands._models import load_model
from redknot_hf.heads.model_shape import model_shape
from redknot_hf.ledger import Ledger, measure_prefill
from redknot_hf.sparse_ffn import Band, SparseFFN, SparseFFNSchedule
from redknot_hf.sparse_ffn.importance import attention_call_mass
from redknot_hf.sparse_ffn.selection import select_rows
from redknot_hf.sparse_ffn.structure import find_blocks


def seconds(device: torch.device, call: Callable[[], Any], repeats: int = 7) -> float:
    """Median over runs that are each waited for, less what waiting costs an empty call."""

    def one(run: Callable[[], Any]) -> float:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        return time.perf_counter() - start

    call()
    empty = statistics.median(one(lambda: None) for _ in range(repeats))
    return statistics.median(one(call) for _ in range(repeats)) - empty


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def parts_of_a_layer(model: Any, tokens: int, schedule: SparseFFNSchedule) -> dict[str, float]:
    """Seconds of what a sparse layer does, each alone."""
    block = find_blocks(model)[-2]
    config, shape = model.config, model_shape(model.config)
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    dim = shape.head_dim or config.hidden_size // shape.num_attention_heads
    x = torch.randn(1, tokens, config.hidden_size, device=device, dtype=dtype)
    q = torch.randn(1, shape.num_attention_heads, tokens, dim, device=device, dtype=dtype)
    k = torch.randn(1, tokens, shape.num_kv_heads, dim, device=device, dtype=dtype).transpose(1, 2)
    score = torch.rand(1, tokens, device=device)
    always = torch.zeros(1, tokens, device=device, dtype=torch.bool)
    always[:, -schedule.recent :] = True
    rule = Band(0, keep=schedule.keep)

    def choice() -> torch.Tensor:
        return select_rows(score, always, None, rule, schedule.bucket, schedule.recent)

    index = choice()
    ffn, norm = getattr(block.layer, block.ffn[0]), getattr(block.layer, block.norm)
    few = x[0].index_select(0, index)[None]

    def measure() -> Any:
        return attention_call_mass(q, k, None, 0.1, None, None, None, None, schedule.query_block, 0)

    found = {
        "FFN of all rows": lambda: ffn(x),
        "FFN of the rows that pass": lambda: ffn(few),
        "norm of all rows": lambda: norm(x),
        "norm of the rows that pass": lambda: norm(few),
        "measuring": measure,
        "choosing": choice,
        "gathering": lambda: x[0].index_select(0, index),
        "scattering": lambda: few.new_zeros(tokens, config.hidden_size).index_copy_(0, index, few[0]),
        "adding to the residual": lambda: x + x,
    }
    return {name: seconds(device, call) for name, call in found.items()} | {"rows that pass": len(index)}


@torch.no_grad()
def kernels(model: Any, tokens: int, schedule: SparseFFNSchedule | None) -> dict[str, float]:
    """Seconds on the GPU by kernel name, the 40 longest, of one prefill."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=next(model.parameters()).device)

    def run() -> None:
        cache = RedKnotCache(model.config, HeadProfile.all_global(model.config))
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()

    def profiled() -> dict[str, float]:
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            run()
        spent: dict[str, float] = defaultdict(float)
        for event in trace.key_averages():
            spent[event.key[:120]] += event.self_device_time_total * 1e-6
        return dict(sorted(spent.items(), key=lambda item: -item[1])[:40])

    if schedule is None:
        return profiled()
    with SparseFFN(model, schedule):
        return profiled()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder; with --random-weights a config is enough")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--preset", help="a measured schedule instead of --keep")
    parser.add_argument(
        "--one-schedule", action="store_true", help="not once more with nothing in rows that are left out"
    )
    parser.add_argument("--repeats", type=int, nargs="+", default=[5, 3], help="for each of --tokens")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's CPU seconds: for a machine in use")
    parser.add_argument("--no-head-classes", action="store_true")
    parser.add_argument("--no-kernels", action="store_true", help="do not run the profiler on a GPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    model, *_ = load_model(
        args.model, args.device, args.dtype, random_weights=args.random_weights, tokenizer=False, progress=False
    )
    print(f"[{time.time() - start:5.1f}s] model", flush=True)
    profile = HeadProfile.uniform(model.config, sink=4, window=256, global_heads=0.25)
    base = SparseFFNSchedule.preset(args.preset) if args.preset else SparseFFNSchedule(keep=args.keep, fill="mean")
    for number, (tokens, repeats) in enumerate(zip(args.tokens, args.repeats, strict=True)):
        report: dict[str, Any] = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d")}
        report["seconds"] = "of the process on its CPUs" if args.cpu_time else "by the clock on the wall"
        path = args.out / f"prefill_{tokens}.json"
        table = {"sparse FFN": base}
        if not args.one_schedule:
            table["sparse FFN, nothing in rows left out"] = base.replace(fill="nothing")
        clock = time.process_time if args.cpu_time else time.perf_counter
        own = None if args.no_head_classes else profile
        ledger = measure_prefill(model, tokens, table, own, repeats, clock=clock)
        report["mechanisms"] = {**ledger.as_dict(), "schedules": {key: repr(value) for key, value in table.items()}}
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"[{time.time() - start:5.1f}s] {tokens}", flush=True)
        show(ledger)
        if base.keep is not None:
            report["parts of a layer"] = parts_of_a_layer(model, tokens, base)
            print(json.dumps(report["parts of a layer"]))
        if args.device.startswith("cuda") and not args.no_kernels and number == 0:
            report["kernels"] = {"dense": kernels(model, tokens, None), "sparse FFN": kernels(model, tokens, base)}
        path.write_text(json.dumps(report, indent=1) + "\n")


def show(ledger: Ledger) -> None:
    for entry in ledger.entries:
        realised = ledger.realised(entry)
        print(
            f"{entry.name:34} {entry.seconds:8.4f} s  saved FLOPs {ledger.saved_flops(entry):6.1%}  "
            f"seconds {ledger.saved_seconds(entry):6.1%}  realised {'-' if realised is None else f'{realised:.0%}'}  "
            f"{ {key: round(value, 4) for key, value in entry.part_seconds.items()} }",
            flush=True,
        )


if __name__ == "__main__":
    main()
