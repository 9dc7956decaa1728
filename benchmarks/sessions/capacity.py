"""How many sessions really fit on a GPU, against what `redknot show --gpu-memory` prints.

    python benchmarks/sessions/capacity.py --layers 4 --context 32768 --memory 12GiB --out DIR   # a process limited to 12 GiB
    python benchmarks/sessions/capacity.py --layers 32 --context 131072 --out DIR                # the whole card

A Llama-8B shape with random weights and random keys, one head of eight global, 64 + 256 elsewhere. Caches are filled
with all but the last 2048 tokens of a context directly and with these by a forward (a batch: 2048 tokens of its rows
together), then decode a step. ``separate`` adds one cache after the other until memory ends; the batches are searched by
bisection around the printed figure. With ``--memory`` the process may allocate that much, and ``--reserve`` stands for
the libraries' workspaces alone, since the CUDA context does not count there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.attention import HANDLE
from redknot_hf.commands.show import _bytes, _tokens
from redknot_hf.heads.capacity import RUNTIME_BYTES, Activations, capacity

TAIL = 2048  # tokens fed by the model itself


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=_tokens, default=32768)
    parser.add_argument("--memory", type=_bytes, help="limit of the process; default: the whole card")
    parser.add_argument("--reserve", type=_bytes, help="default 1GiB, or 96MiB with --memory")
    parser.add_argument("--kinds", default="separate,head_aware,fixed,dense,paged")
    parser.add_argument("--seconds", type=float, default=60, help="start nothing new after this time")
    parser.add_argument("--out", help="folder; appends to capacity.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    end = time.monotonic() + args.seconds
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=args.layers, head_dim=128, rope_theta=500000.0, max_position_embeddings=131072,
    )  # fmt: skip
    total = torch.cuda.get_device_properties(0).total_memory
    memory = args.memory or total
    reserve = args.reserve if args.reserve is not None else 96 << 20 if args.memory else RUNTIME_BYTES
    if args.memory:
        torch.cuda.set_per_process_memory_fraction(memory / total)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="redknot").eval()
    profile = HeadProfile.uniform(
        config, sink=64, window=256, global_heads={(layer, layer % 8) for layer in range(args.layers)}
    )
    weights = sum(parameter.nbytes for parameter in model.parameters())
    printed = capacity(
        profile, args.context, memory, weights, runtime=reserve, activations=Activations.of(config, TAIL), chunk=TAIL
    )
    every, limit = HeadProfile.all_global(config), args.context + 64
    makers: dict[str, tuple[Callable[[], Any], str]] = {
        "head_aware": (lambda: RedKnotCache(config, profile), "redknot"),
        "fixed": (lambda: RedKnotCache(config, profile, max_cache_len=limit), "redknot"),
        "paged": (lambda: RedKnotCache(config, every), "redknot"),
        "dense": (lambda: DynamicCache(config=config), "sdpa"),
    }
    for kind in args.kinds.split(","):
        if time.monotonic() > end:
            break
        make, implementation = makers["head_aware" if kind == "separate" else kind]
        model.set_attn_implementation(implementation)
        expected = getattr(printed, kind)
        if kind == "separate":
            found: dict[str, Any] = separate(model, make, args.context, 2 * expected + 8, end)
        else:
            found = batch(model, make, args.context, expected, end)
        row = {
            "kind": kind, "printed": expected, **found, "context": args.context, "layers": args.layers,
            "memory": memory, "reserve": reserve, "weights": weights, "device": torch.cuda.get_device_name(),
            "torch": torch.__version__, "command": "python benchmarks/sessions/capacity.py " + " ".join(sys.argv[1:]),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            with open(Path(args.out) / "capacity.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


def separate(model: Any, make: Callable[[], Any], context: int, most: int, end: float) -> dict[str, Any]:
    """Caches one after the other, until there is no memory for another."""
    release()
    caches: list[Any] = []
    error = "stopped"
    try:
        while len(caches) < most and time.monotonic() < end:
            cache = make()
            use(model, cache, 1, context)
            caches.append(cache)
    except (torch.OutOfMemoryError, RedKnotError) as problem:
        error = str(problem)[:160]
    return {"fits": len(caches), "ended": error, **gigabytes()}


def batch(model: Any, make: Callable[[], Any], context: int, expected: int, end: float) -> dict[str, Any]:
    """The largest number of rows that fits, searched from the printed one on."""
    tried: list[dict[str, Any]] = []
    low, high, rows = 0, None, max(1, expected)
    while time.monotonic() < end and (high is None or high - low > 1):
        fits = attempt(model, make, context, rows, tried)
        if fits:
            low = rows
            rows = low + max(1, low // 50) if high is None else (low + high) // 2
        else:
            high = rows
            rows = high - max(1, high // 50) if low == 0 else (low + high) // 2
            if rows < 1:
                break
    return {"fits": low, "fails": high, "tried": tried}


def attempt(model: Any, make: Callable[[], Any], context: int, rows: int, tried: list[dict[str, Any]]) -> bool:
    release()
    row: dict[str, Any] = {"rows": rows, "fits": True}
    try:
        use(model, make(), rows, context)
    except (torch.OutOfMemoryError, RedKnotError) as problem:
        row |= {"fits": False, "error": str(problem)[:160]}
    tried.append({**row, **gigabytes()})
    print(tried[-1], file=sys.stderr, flush=True)
    return row["fits"]


def use(model: Any, cache: Any, rows: int, context: int) -> None:
    """Fill a cache and decode a step; the last tokens of the prompt go through the model, so many at a time in all."""
    config = model.config
    each = max(64, TAIL // rows)
    chunk = min(context - each, max(64, 8 * TAIL // rows))
    shape = (rows, config.num_key_value_heads, chunk, config.head_dim)
    k, v = (torch.empty(shape, dtype=model.dtype, device=model.device).normal_() for _ in range(2))
    with torch.no_grad():
        for begin in range(0, context - each, chunk):
            length = min(chunk, context - each - begin)
            for layer in range(config.num_hidden_layers):
                keys, _ = cache.update(k[:, :, :length], v[:, :, :length], layer)
                if isinstance(cache, RedKnotCache):
                    getattr(keys, HANDLE).store()  # attending would take most of the time
        del k, v
        ids = torch.full((rows, each - 1), 7, device=model.device)
        model(ids, past_key_values=cache, position_ids=torch.arange(context - each, context - 1, device=model.device)[None],
              logits_to_keep=1)  # fmt: skip
        model(
            ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[context - 1]], device=model.device)
        ).logits.float()
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def gigabytes() -> dict[str, float]:
    free, total = torch.cuda.mem_get_info()
    found = {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated(),
             "reserved": torch.cuda.memory_reserved(), "outside": total - free - torch.cuda.memory_reserved()}  # fmt: skip
    return {f"{name}_gb": round(value / 1e9, 3) for name, value in found.items()}


if __name__ == "__main__":
    sys.exit(main())
