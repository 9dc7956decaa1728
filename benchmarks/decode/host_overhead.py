"""What a decode step costs on the host: Python and torch calls of a 32-layer model in eager mode, on a CPU.

On a fast GPU an eager decode step waits for the host, so what the cache and the attention function do there is what a
token costs. Here the model is so narrow that its arithmetic takes next to no time, and the way to the kernels is taken as
on a GPU up to the call of the driver, which returns at once: what is left is the host's work. (The driver's part is left
out for all: three launches per layer for RedKnotCache, and four or five inside torch for DynamicCache.) Every form runs
in one process, in turns, so that a noisy machine disturbs all of them alike; the median is reported.

    no attention      neither cache nor attention: what the rest of the model costs
    DynamicCache      sdpa over a handful of tokens
    RedKnotCache      the growing form and the static form, not compiled, at each context

It says nothing of how fast a GPU decodes; that is `bench.py` beside this file.

    python benchmarks/decode/host_overhead.py                       # table, and one JSON line per row
    python benchmarks/decode/host_overhead.py --profile 25          # where the time goes, by function
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from segpaged_attention import append_kernel, decode_kernel, launching, ops, replay, tiles
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_utils import AttentionInterface

import redknot_hf.kernel_path
from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.attention import HANDLE


def no_attention(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    return query.transpose(1, 2).contiguous(), None


class Compiled:
    """Stands for a Triton kernel that was compiled: what launches it returns at once."""

    function, packed_metadata = 0, None

    def __init__(self, kernel: Any):
        self.arg_names = kernel.arg_names

    @staticmethod
    def run(*_: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self


def without_device() -> None:
    """Let the CPU take the way of a Hopper GPU: operators, launchers and repeated launches run, the driver's call does not."""
    hopper = tiles.Device(processors=132, shared_memory=227 << 10, hopper=True)
    stream = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 0))
    for module in (launching, replay):
        module.triton = SimpleNamespace(JITFunction=Compiled, runtime=SimpleNamespace(driver=stream))
    for module in (append_kernel, decode_kernel, tiles):
        module.device_of = lambda device: hopper
    for module, name in (
        (append_kernel, "_append_kernel"),
        (decode_kernel, "_decode_kernel"),
        (decode_kernel, "_combine_kernel"),
    ):
        setattr(module, name, Compiled(getattr(module, name)))
    ops.why_not = lambda *_: None
    replay._current_device = torch.cuda.current_device = lambda: None
    library = torch.library.Library("segpaged_attention", "IMPL")
    globals()["_library"] = library  # the operators stay as long as it lives
    library.impl("append", ops._append_cuda, "CPU")
    library.impl("decode", ops._decode_cuda, "CPU")
    redknot_hf.kernel_path.unavailable = lambda *_: None
    setup = redknot_hf.kernel_path.KernelLayer.__init__

    def as_on_a_gpu(self: Any, pages: Any) -> None:
        setup(self, pages)
        self.replays = True

    redknot_hf.kernel_path.KernelLayer.__init__ = as_on_a_gpu


def fill(cache: Any, config: LlamaConfig, batch: int, context: int) -> None:
    """Count ``context`` tokens in; what they are does not matter here."""
    for begin in range(0, context, 32768):
        length = min(32768, context - begin)
        for layer in range(config.num_hidden_layers):
            k = torch.zeros(batch, config.num_key_value_heads, 1, config.head_dim).expand(-1, -1, length, -1)
            keys, values = cache.update(k, k, layer)
            if isinstance(cache, RedKnotCache):
                getattr(keys, HANDLE).store()
            del keys, values


class Count(TorchDispatchMode):
    """Counts the torch operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--contexts", default="8192,131072", help="tokens stored before the first step, comma separated"
    )
    parser.add_argument("--steps", type=int, default=60, help="timed steps of every form")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="the N most expensive functions of each form"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    without_device()
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=args.layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=16, max_position_embeddings=1 << 20, eos_token_id=None,
    )  # fmt: skip
    AttentionInterface.register("no_attention", no_attention)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()
    profile = HeadProfile.uniform(
        config, sink=64, window=256, global_heads={(layer, layer % 8) for layer in range(args.layers)}
    )
    forms: dict[str, tuple[str, Any, int]] = {
        "no attention": ("no_attention", None, 0),
        "DynamicCache": ("sdpa", DynamicCache(config=config), 16),
    }
    for context in map(int, args.contexts.split(",")):
        room = context + 8 * args.steps + 64
        forms[f"RedKnotCache at {context}"] = ("redknot", RedKnotCache(model.config, profile), context)
        static = RedKnotCache(model.config, profile, max_cache_len=room)
        forms[f"RedKnotCache static at {context}"] = ("redknot", static, context)
    steps: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        for name, (implementation, cache, context) in forms.items():
            model.set_attn_implementation(implementation)
            if cache is not None:
                fill(cache, config, args.batch, context)
            token = torch.ones(args.batch, 1, dtype=torch.long)
            position = torch.full((args.batch, 1), context)
            steps[name] = lambda cache=cache, token=token, position=position: model(
                token, past_key_values=cache, position_ids=position, use_cache=cache is not None
            )
        times: dict[str, list[float]] = {name: [] for name in forms}
        counts: dict[str, int] = {}
        for turn in range(args.steps + 4):
            for name, step in steps.items():
                model.set_attn_implementation(forms[name][0])
                if turn == 3:
                    with Count() as count:
                        step()
                    counts[name] = count.calls.total()
                    continue
                begin = time.thread_time()
                step()
                if turn > 3:
                    times[name].append(time.thread_time() - begin)
        floor = statistics.median(times["no attention"])
        for name, all_times in times.items():
            median = statistics.median(all_times)
            row = {
                "form": name,
                "batch": args.batch,
                "ms_per_step": round(median * 1e3, 2),
                "us_per_layer_over_floor": round((median - floor) / args.layers * 1e6, 1),
                "operators_per_layer_over_floor": round((counts[name] - counts["no attention"]) / args.layers, 1),
            }
            print(json.dumps(row), flush=True)
        for name, step in steps.items() if args.profile else ():
            model.set_attn_implementation(forms[name][0])
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(20):
                step()
            profiler.disable()
            print(f"\n{name}, 20 steps")
            pstats.Stats(profiler).sort_stats("tottime").print_stats(args.profile)


if __name__ == "__main__":
    main()
