"""Decode speed and capacity of an 8B model with random weights: RedKnotCache against the caches of transformers.

Every cache holds random keys and values of the stated context (what they are does not change the time) and decodes the
same number of steps in the same process:

    DynamicCache + sdpa           as shipped, and with cuDNN SDPA off: a new cuDNN plan for every length costs 30-40 ms of
                                  CPU a step, which would flatter whatever it is compared with
    StaticCache compiled          torch.compile(mode="reduce-overhead"), as generate() does it
    RedKnotCache eager, compiled  1 of 8 heads global, 64 + 256 elsewhere; and all heads global
    no attention                  the same model with attention replaced by zeros, compiled: the floor

Times are CUDA-event milliseconds per step over a run of steps, median of several runs, and include what the host needs
to launch them. Capacity is the largest batch whose cache can be built and decoded one step. Correctness is checked in the
same run: the compiled cache must give the eager one's logits, the all-global one DynamicCache's.

    python benchmarks/decode/bench.py --out benchmarks/results/h200            # 8K, 32K, 128K, batch 1 and 8
    python benchmarks/decode/bench.py --quick --out /tmp/x                     # 2 layers, 4K: does it run

Most of the time goes into compiling; see --warm for a machine with many cores.
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
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config, StaticCache
from transformers.modeling_utils import AttentionInterface

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
                store(cache, getattr(keys, HANDLE))


def store(cache: RedKnotCache, handle: Any) -> None:
    """Store a staged chunk without attending, which would take most of the time."""
    layer, step = handle.layer, handle.step
    step.resolve(None, step.batch * [0])
    layer._ready(step)
    layer._append(handle.k, handle.v, step)
    layer._stored(handle)


def timed(step: Callable[[int], Any], steps: int, runs: int) -> tuple[float, float]:
    """Median ms per step by CUDA events, and by the wall clock."""
    events, walls = [], []
    for run in range(runs):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        wall = time.perf_counter()
        begin.record()
        for i in range(steps):
            step(run * steps + i)
        end.record()
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - wall) / steps * 1e3)
        events.append(begin.elapsed_time(end) / steps)
    return statistics.median(events), statistics.median(walls)


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class Bench:
    def __init__(self, shape: str, config: Any, args: argparse.Namespace, save: Callable[[dict[str, Any]], None]):
        self.shape, self.config, self.args, self.save = shape, config, args, save
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="redknot")
        self.model.eval()
        sparse = {(l, l % 8) for l in range(config.num_hidden_layers)}
        self.sparse = HeadProfile.uniform(config, sink=64, window=256, global_heads=sparse)
        self.dense = HeadProfile.all_global(config)
        self.rows: list[dict[str, Any]] = []
        self.compiled: Any = None

    def record(self, **row: Any) -> None:
        row = {"shape": self.shape, **row}
        self.rows.append(row)
        self.save(row)
        print(json.dumps(row), flush=True)

    def decode(
        self, name: str, implementation: str, make: Callable[[], Any], batch: int, context: int, compiled: bool,
        steps: int = 8, runs: int = 3,
    ) -> torch.Tensor | None:  # fmt: skip
        """Time one cache; returns the first step's logits."""
        release()
        torch.cuda.reset_peak_memory_stats()
        if self.args.caches and not any(word in name for word in self.args.caches.split(",")):
            return None
        if self.args.warm and not compiled:
            return None
        config = self.config
        self.model.set_attn_implementation(implementation)
        try:
            cache = make()
            fill(cache, config, batch, 64 if self.args.warm else context, torch.bfloat16, "cuda")
            token = torch.full((batch, 1), 7, device="cuda")
            call = self.model.__call__
            if compiled:
                call = torch.compile(self.model.__call__, mode="reduce-overhead", fullgraph=False)
            position = torch.full((batch, 1), context, device="cuda")

            def step(i: int) -> Any:
                with torch.no_grad():
                    return call(
                        token, past_key_values=cache, position_ids=position + i, use_cache=cache is not None
                    ).logits

            begin = time.perf_counter()
            first = step(0).float().clone()
            for i in range(1, 4):
                step(i)
            torch.cuda.synchronize()
            warm = time.perf_counter() - begin
            if self.args.warm:
                print(f"compiled: {name}, {batch} x {context}, {warm:.0f} s", file=sys.stderr, flush=True)
                return None
            event, wall = timed(lambda i: step(i + 4), steps, runs)
            row = {"cache": name, "batch": batch, "context": context, "ms": round(max(event, wall), 3)}
            row |= {"event_ms": round(event, 3), "wall_ms": round(wall, 3), "warm_up_s": round(warm, 1)}
            row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            self.record(**row)
            return first
        except torch.OutOfMemoryError:
            self.record(cache=name, batch=batch, context=context, ms=None, error="out of memory")
        except redknot_hf.RedKnotError as error:
            self.record(cache=name, batch=batch, context=context, ms=None, error=str(error)[:200])
        return None

    def static_cache(self, context: int) -> StaticCache:
        return StaticCache(config=self.config, max_cache_len=context + HOST_MARGIN)

    def table(self, batch: int, context: int) -> None:
        config, limit = self.config, context + HOST_MARGIN
        quick = self.args.quick
        plain = lambda: DynamicCache(config=config)  # noqa: E731
        a = self.decode("DynamicCache sdpa, cuDNN on", "sdpa", plain, batch, context, False, 4, 2)
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.decode("DynamicCache sdpa, cuDNN off", "sdpa", plain, batch, context, False, 4, 3)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch._dynamo.reset()
        self.decode("StaticCache compiled", "sdpa", lambda: self.static_cache(context), batch, context, True)
        torch._dynamo.reset()
        eager = self.decode(
            "RedKnotCache 1/8 eager", "redknot", lambda: RedKnotCache(config, self.sparse), batch, context, False, 4, 3
        )
        static = lambda profile: RedKnotCache(config, profile, max_cache_len=limit)  # noqa: E731
        fast = self.decode("RedKnotCache 1/8 compiled", "redknot", lambda: static(self.sparse), batch, context, True)
        c = self.decode("RedKnotCache all global compiled", "redknot", lambda: static(self.dense), batch, context, True)
        torch._dynamo.reset()
        for what, left, right in (("compiled = eager", eager, fast), ("all global = DynamicCache", a, c)):
            if left is not None and right is not None:
                error = (left - right).norm() / left.norm()
                self.record(check=what, batch=batch, context=context, relative_error=round(error.item(), 5))
                assert quick or error < 0.15, f"{what}: relative error {error:.3f}"

    def floor(self, batch: int) -> None:
        AttentionInterface.register("no_attention", no_attention)
        torch._dynamo.reset()
        self.decode("no attention compiled", "no_attention", lambda: None, batch, 0, True)
        torch._dynamo.reset()

    def capacity(self, context: int) -> None:
        """The largest batch that can be filled and decoded one step: from the bytes of a row, then by bisection."""
        kinds: dict[str, tuple[str, Callable[[], Any]]] = {
            "RedKnotCache 1/8 static": (
                "redknot",
                lambda: RedKnotCache(self.config, self.sparse, max_cache_len=context + HOST_MARGIN),
            ),
            "RedKnotCache 1/8": ("redknot", lambda: RedKnotCache(self.config, self.sparse)),
            "DynamicCache": ("sdpa", lambda: DynamicCache(config=self.config)),
            "StaticCache": ("sdpa", lambda: self.static_cache(context)),
        }
        for name, (implementation, make) in kinds.items():
            if self.args.caches and not any(word in name for word in self.args.caches.split(",")):
                continue
            self.model.set_attn_implementation(implementation)
            tried: list[dict[str, Any]] = []
            low, high = 0, 1
            fit = self.fits(make, 1, context, tried)
            if fit:
                low, high = 1, max(2, 1 + int(tried[0]["free_gb"] / tried[0]["cache_gb"]))
                guess = int(0.9 * high)
                while high - low > max(1, low // 32):
                    low, high = (guess, high) if self.fits(make, guess, context, tried) else (low, guess)
                    guess = (low + high) // 2
            self.record(capacity=name, context=context, largest_batch=low, not_tried_between=[low, high], trials=tried)

    def fits(self, make: Callable[[], Any], batch: int, context: int, tried: list[dict[str, Any]]) -> bool:
        """Whether ``batch`` rows of ``context`` tokens can be stored and decoded one step; adds a row to ``tried``."""
        release()
        torch.cuda.reset_peak_memory_stats()
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shapes", default="llama-8b")
    parser.add_argument("--cases", default="1x131072,1x32768,1x8192,8x32768", help="batch x context, comma separated")
    parser.add_argument("--capacity", default="131072,32768", help="contexts for the largest batch; empty to skip")
    parser.add_argument(
        "--caches", default="", help="only caches whose name contains one of these words, comma separated"
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="compile what the same call without --warm would compile, and measure nothing: several such calls at the same "
        "time fill the compiler's cache in a fraction of the time",
    )
    parser.add_argument("--quick", action="store_true", help="2 layers, one case: shows that it runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    torch._dynamo.config.cache_size_limit = 64
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
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

    for shape in args.shapes.split(","):
        config = SHAPES[shape]
        if args.quick:
            config.num_hidden_layers, args.cases, args.capacity = 2, "1x4096", ""
        bench = Bench(shape, config, args, save)
        for case in filter(None, args.cases.split(",")):
            batch, context = (int(x) for x in case.split("x"))
            if not any(r.get("cache") == "no attention compiled" and r["batch"] == batch for r in bench.rows):
                bench.floor(batch)
            bench.table(batch, context)
        for context in filter(None, args.capacity.split(",")):
            bench.capacity(int(context))
        del bench
        release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
