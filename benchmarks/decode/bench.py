"""Decode speed and capacity of an 8B model with random weights: RedKnotCache against the caches of transformers.

Every cache holds random keys and values of the stated context (what they are does not change the time) and decodes the
same number of steps:

    DynamicCache + sdpa           as shipped, and with cuDNN SDPA off: a new cuDNN plan for every length costs 30-40 ms of
                                  CPU a step, which would flatter whatever it is compared with
    StaticCache compiled          torch.compile(mode="reduce-overhead"), as generate() does it
    RedKnotCache eager, compiled  1 of 8 heads global, 64 + 256 elsewhere; and all heads global
    no attention                  the same model with attention replaced by zeros, compiled: the floor

Times are CUDA-event milliseconds per step over a run of steps, median of several runs, and include what the host needs
to launch them. Capacity is the largest batch whose cache can be built and decoded one step. Correctness is checked in the
same run: the compiled cache must give the eager one's logits, the all-global one DynamicCache's.

Compiling takes half a minute a row. With --processes, that many processes compile side by side, each with its own copy of
the weights; whatever is timed runs alone, while the others wait.

    python benchmarks/decode/bench.py --out benchmarks/results/h200            # 8K, 32K, 128K, batch 1 and 8
    python benchmarks/decode/bench.py --quick --out /tmp/x                     # 2 small layers: does it run; also on a CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config, StaticCache
from transformers.modeling_utils import AttentionInterface
from workers import Workers

import redknot_hf
from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.attention import HANDLE

SHAPES = {
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, rope_theta=500000.0, eos_token_id=None,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, rope_theta=1000000.0, eos_token_id=None,
    ),
}  # fmt: skip
HOST_MARGIN = 64  # tokens a cache must hold beyond the context
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COMPILE: dict[str, Any] = {"mode": "reduce-overhead"} if CUDA else {"backend": "eager"}


def shrink(config: Any) -> None:
    """Make a config small enough for anything."""
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size = 2, 256, 256, 512


def no_attention(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    return query.transpose(1, 2).contiguous(), None


def fill(cache: Any, config: Any, batch: int, context: int, dtype: torch.dtype, device: str) -> None:
    """Random keys and values through the cache's own update; the same chunk for every layer, to save the time."""
    if cache is None:
        return
    generator = torch.Generator(device).manual_seed(0)
    rows = min(8192, max(2048, 65536 // batch))  # the chunk shall not be what fills the memory
    shape = (batch, config.num_key_value_heads, min(rows, context), config.head_dim)
    k = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
    v = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
    for begin in range(0, context, rows):
        length = min(rows, context - begin)
        for layer in range(config.num_hidden_layers):
            keys, _ = cache.update(k[:, :, :length], v[:, :, :length], layer)
            if isinstance(cache, RedKnotCache):
                getattr(keys, HANDLE).store()  # attending would take most of the time


def timed(step: Callable[[int], Any], steps: int, runs: int) -> tuple[float, float]:
    """Median ms per step by CUDA events, and by the wall clock."""
    events, walls = [], []
    for run in range(runs):
        synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if CUDA else (None, None)
        wall = time.perf_counter()
        if begin is not None:
            begin.record()
        for i in range(steps):
            step(run * steps + i)
        if end is not None:
            end.record()
        synchronize()
        walls.append((time.perf_counter() - wall) / steps * 1e3)
        events.append(begin.elapsed_time(end) / steps if begin is not None else walls[-1])
    return statistics.median(events), statistics.median(walls)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    cache: str
    batch: int
    context: int

    @property
    def compiled(self) -> bool:
        return self.cache.endswith("compiled")

    def __str__(self) -> str:
        return f"{self.cache} {self.batch}x{self.context}"


# in the order in which a case's rows are measured
CACHES = (
    "DynamicCache sdpa, cuDNN off",
    "RedKnotCache 1/8 eager",
    "RedKnotCache all global eager",
    "DynamicCache sdpa, cuDNN on",
    "StaticCache compiled",
    "RedKnotCache 1/8 compiled",
    "RedKnotCache all global compiled",
)
FLOOR = "no attention compiled"
# what must give the same logits
CHECKS = (
    ("compiled = eager", "RedKnotCache 1/8 eager", "RedKnotCache 1/8 compiled"),
    ("all global = DynamicCache", "DynamicCache sdpa, cuDNN off", "RedKnotCache all global compiled"),
)


class Bench:
    """A model of one shape, and the caches that it is measured with."""

    def __init__(self, shape: str, quick: bool):
        self.shape, self.config = shape, SHAPES[shape]
        if quick:
            shrink(self.config)
        torch._dynamo.config.cache_size_limit = 64
        # each row by itself: the second length must not be compiled for any length
        torch._dynamo.config.automatic_dynamic_shapes = False
        AttentionInterface.register("no_attention", no_attention)
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.bfloat16, attn_implementation="redknot"
            )
        self.model.eval()
        sparse = {(l, l % 8) for l in range(self.config.num_hidden_layers)}
        self.sparse = HeadProfile.uniform(self.config, sink=64, window=256, global_heads=sparse)
        self.dense = HeadProfile.all_global(self.config)
        self.calls: dict[str, Any] = {}  # compiled forwards, by attention implementation
        self.steps, self.runs = (1, 1) if quick else (8, 3)

    def make(self, case: Case) -> tuple[str, Any]:
        """The attention implementation and an empty cache."""
        limit = case.context + HOST_MARGIN if case.compiled else None
        if case.cache == FLOOR:
            return "no_attention", None
        if case.cache.startswith("DynamicCache"):
            return "sdpa", DynamicCache(config=self.config)
        if case.cache.startswith("StaticCache"):
            return "sdpa", self.static_cache(case.context)
        profile = self.dense if "all global" in case.cache else self.sparse
        return "redknot", RedKnotCache(self.config, profile, max_cache_len=limit)

    def static_cache(self, context: int) -> StaticCache:
        return StaticCache(config=self.config, max_cache_len=context + HOST_MARGIN)

    def ready(self, case: Case, context: int) -> Callable[[int], Any]:
        """A decode step over a cache that holds ``context`` tokens; takes the number of the step."""
        release()
        implementation, cache = self.make(case)
        self.model.set_attn_implementation(implementation)
        fill(cache, self.config, case.batch, context, torch.bfloat16, DEVICE)
        token = torch.full((case.batch, 1), 7, device=DEVICE)
        position = torch.full((case.batch, 1), context, device=DEVICE)
        call = self.model.__call__
        if case.compiled:
            call = self.calls.setdefault(implementation, torch.compile(call, fullgraph=False, **COMPILE))

        def step(i: int) -> Any:
            with torch.no_grad():
                return call(token, past_key_values=cache, position_ids=position + i, use_cache=cache is not None).logits

        return step

    def prepare(self, case: Case) -> str:
        """Compile the step of a case, over an almost empty cache."""
        begin = time.perf_counter()
        try:
            self.ready(case, min(64, case.context))(0)
        except (torch.OutOfMemoryError, redknot_hf.RedKnotError) as error:
            return f"{case}: {error}"[:300]
        release()
        return f"compiled: {case} in {time.perf_counter() - begin:.0f} s"

    def measure(self, case: Case) -> tuple[dict[str, Any], torch.Tensor | None]:
        """The row of a case, and the first step's logits (on the CPU)."""
        row: dict[str, Any] = {"shape": self.shape, "cache": case.cache, "batch": case.batch, "context": case.context}
        try:
            torch.backends.cuda.enable_cudnn_sdp("cuDNN off" not in case.cache)
            step = self.ready(case, case.context)
            begin = time.perf_counter()
            first = step(0).float().cpu()
            for i in range(1, 5):
                step(i)
            synchronize()
            warm = time.perf_counter() - begin
            steps = self.steps if case.compiled else -(-self.steps // 2)
            event, wall = timed(lambda i: step(i + 5), steps, self.runs)
            row |= {"ms": round(max(event, wall), 3), "event_ms": round(event, 3), "wall_ms": round(wall, 3)}
            row["warm_up_s"] = round(warm, 1)
            if CUDA:
                row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            return row, first
        except (torch.OutOfMemoryError, redknot_hf.RedKnotError) as error:
            short = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)[:200]
            return row | {"ms": None, "error": short}, None
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)

    def capacity(self, name: str, context: int) -> dict[str, Any]:
        """The largest batch that can be filled and decoded one step: from the bytes of a row, then by bisection."""
        implementation, make = {
            "RedKnotCache 1/8 static": (
                "redknot",
                lambda: RedKnotCache(self.config, self.sparse, max_cache_len=context + HOST_MARGIN),
            ),
            "RedKnotCache 1/8": ("redknot", lambda: RedKnotCache(self.config, self.sparse)),
            "DynamicCache": ("sdpa", lambda: DynamicCache(config=self.config)),
            "StaticCache": ("sdpa", lambda: self.static_cache(context)),
        }[name]
        self.model.set_attn_implementation(implementation)
        tried: list[dict[str, Any]] = []
        low, high = 0, 1
        if self.fits(make, 1, context, tried):
            low, high = 1, max(2, 1 + int(tried[0]["free_gb"] / tried[0]["cache_gb"]))
            guess = int(0.9 * high)
            while high - low > max(1, low // 32):
                low, high = (guess, high) if self.fits(make, guess, context, tried) else (low, guess)
                guess = (low + high) // 2
        row = {"shape": self.shape, "capacity": name, "context": context, "largest_batch": low}
        return row | {"not_tried_between": [low, high], "trials": tried}

    def fits(self, make: Callable[[], Any], batch: int, context: int, tried: list[dict[str, Any]]) -> bool:
        """Whether ``batch`` rows of ``context`` tokens can be stored and decoded one step; adds a row to ``tried``."""
        release()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        row = {"batch": batch, "free_gb": torch.cuda.mem_get_info()[0] / 1e9, "before_gb": before / 1e9}
        try:
            cache = make()
            fill(cache, self.config, batch, context, torch.bfloat16, "cuda")
            row["cache_gb"] = (torch.cuda.memory_allocated() - before) / 1e9
            with torch.no_grad():
                position = torch.full((batch, 1), context, device="cuda")
                self.model(torch.ones_like(position), past_key_values=cache, position_ids=position)
            torch.cuda.synchronize()
            row["fits"] = True
        except (torch.OutOfMemoryError, redknot_hf.RedKnotError) as error:
            row |= {"fits": False, "error": str(error)[:300]}
        row["peak_gb"], row["reserved_gb"] = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9
        row["seconds"] = time.perf_counter() - begin
        tried.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
        print(json.dumps(tried[-1]), file=sys.stderr, flush=True)
        return row["fits"]


CAPACITIES = ("RedKnotCache 1/8 static", "DynamicCache", "StaticCache", "RedKnotCache 1/8")


def wanted(name: str, words: str) -> bool:
    return not words or any(word in name for word in words.split(","))


def run(shape: str, args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """All rows of one shape: those that need no compiling first."""
    sizes = [tuple(map(int, case.split("x"))) for case in filter(None, args.cases.split(","))]
    cases = [Case(cache, *size) for size in sizes for cache in CACHES]
    cases += [Case(FLOOR, batch, 0) for batch in dict.fromkeys(batch for batch, _ in sizes)]
    cases = [case for case in cases if wanted(str(case), args.caches)]
    # sorted so that the largest caches are not made at the same time
    order = (*CACHES, FLOOR)
    compiled = sorted((case for case in cases if case.compiled), key=lambda case: order.index(case.cache))
    workers = Workers(args.processes, Bench, shape, args.quick)
    logits: dict[tuple[str, int, int], torch.Tensor] = {}

    def measure(worker: int, case: Case) -> None:
        row, first = workers.ask(worker, "measure", case)
        save(row)
        if first is None:
            return
        logits[case.cache, case.batch, case.context] = first
        for what, *pair in CHECKS:
            both = [logits.get((name, case.batch, case.context)) for name in pair]
            if case.cache == pair[1] and both[0] is not None and both[1] is not None:
                error = ((both[0] - both[1]).norm() / both[0].norm()).item()
                save(
                    {"shape": shape, "check": what, "batch": case.batch, "context": case.context}
                    | {"relative_error": round(error, 5)}
                )
                assert args.quick or error < 0.15, f"{what}: relative error {error:.3f}"

    for case in cases:
        if not case.compiled:
            measure(0, case)
    workers.spread("prepare", compiled)
    for case in cases:
        if case.compiled:
            measure(compiled.index(case) % args.processes, case)
    workers.stop(*range(1, args.processes))
    for context in map(int, filter(None, args.capacity.split(","))):
        for name in CAPACITIES:
            if wanted(name, args.caches):
                save(workers.ask(0, "capacity", name, context))
    workers.stop(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shapes", default="llama-8b")
    parser.add_argument("--cases", default="1x131072,1x32768,1x8192,8x32768", help="batch x context, comma separated")
    parser.add_argument("--capacity", default="131072,32768", help="contexts for the largest batch; empty to skip")
    parser.add_argument(
        "--caches",
        default="",
        help="only rows whose name and case (as in 'StaticCache compiled 1x8192') contain one of these texts, comma separated",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="how many compile at the same time; each takes 17 GB for its weights"
    )
    parser.add_argument("--quick", action="store_true", help="2 small layers, one case: shows that it runs")
    args = parser.parse_args()
    if not CUDA and not args.quick:
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    if args.quick:
        args.cases, args.capacity = "1x512", ""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if CUDA else platform.machine(),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if CUDA else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "redknot_hf": redknot_hf.__version__,
        },
        "rows": [],
    }

    def save(row: dict[str, Any]) -> None:  # after every row: a run that is cut off leaves what it has measured
        result["rows"].append(row)
        (out / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    for shape in args.shapes.split(","):
        run(shape, args, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
