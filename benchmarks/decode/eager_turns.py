"""Eager decode steps of an 8B shape: RedKnotCache and DynamicCache in turns, in one process.

An eager step at batch 1 waits for the host, and what the host gets done varies from second to second by more than the
caches differ. So every form takes a few steps, then the next one, round after round; medians and quartiles of the rounds
are written. cuDNN SDPA is off (`bench.py` says why).

    python benchmarks/decode/eager_turns.py --out benchmarks/results/h200
    python benchmarks/decode/eager_turns.py --quick --out /tmp/x               # 2 small layers; also on a CPU
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import CUDA, Bench, Case, release, synchronize

FORMS = ("DynamicCache sdpa, cuDNN off", "RedKnotCache 1/8 eager", "RedKnotCache all global eager")


def turns(bench: Bench, batch: int, context: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """ms per step of each form."""
    forms = {}
    for name in FORMS:
        case = Case(name, batch, context)
        implementation = "sdpa" if name.startswith("Dynamic") else "redknot"
        forms[name] = implementation, bench.ready(case, context)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, (implementation, step) in forms.items():
            bench.model.set_attn_implementation(implementation)
            count = steps if turn else 3  # the first turn compiles kernels
            step(0)
            synchronize()
            begin = time.perf_counter()
            for i in range(count):
                step(1 + i)
            synchronize()
            if turn:
                times[name].append((time.perf_counter() - begin) / count * 1e3)
    base = statistics.median(times[FORMS[0]])
    rows = []
    for name, found in times.items():
        row: dict[str, Any] = {"cache": name, "batch": batch, "context": context}
        low, median, high = statistics.quantiles(found, n=4)
        row |= {"ms": round(median, 2), "quartiles": [round(low, 2), round(high, 2)]}
        rows.append(row | {"of_dynamic": round(median / base, 3), "rounds": len(found)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--cases", default="1x8192,1x32768,1x131072,8x8192,8x32768", help="batch x context")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps of each form in a round")
    parser.add_argument("--quick", action="store_true", help="2 small layers, one case")
    args = parser.parse_args()
    if not CUDA and not args.quick:
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    if args.quick:
        args.cases, args.rounds, args.steps = "1x512,2x256", 2, 1
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.shape, args.quick)
    torch.backends.cuda.enable_cudnn_sdp(False)
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if CUDA else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [],
    }
    for case in args.cases.split(","):
        batch, context = map(int, case.split("x"))
        for row in turns(bench, batch, context, args.rounds, args.steps):
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
        (out / "eager.json").write_text(json.dumps(result, indent=1) + "\n")
        release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
