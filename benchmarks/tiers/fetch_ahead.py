"""Retrieval heads that read some far pages: time per token and pages found, with and without fetching ahead.

    python benchmarks/tiers/fetch_ahead.py --out benchmarks/results/h200                     # SmolLM2, real text
    python benchmarks/tiers/fetch_ahead.py --shape llama-8b --layers 4 --tokens 65536 --out benchmarks/results/h200

Every KV head is a retrieval head with its archive in host memory (``--cold disk``: in a file). The same tokens are decoded
with

    fetch all    every far page is read in every step (exact)
    none kept    the pages of a step are fetched when it asks, and forgotten
    kept         as many pages as a step reads stay on the device (``resident_pages=0``)
    ahead x2     twice as many stay, and likely ones are fetched ahead of the step (the default)
    ahead x4     four times as many
    global       for comparison: every token on the device, no cold tier
    DynamicCache, OffloadedCache    of transformers, with sdpa: everything on the device; everything on the host, a layer
                 fetched while the one before it computes (``DynamicCache(offloading=True)``). Both once more without
                 cuDNN's attention, which compiles a plan for every new length and is torch's first choice

Those that read some pages must give the same logits, bit by bit. A step is timed from its call to the end of its work on
the device; the median of ``--steps`` is reported, after ``--warm`` steps. ``--shape`` gives random weights and random keys:
times of a large model, but its choices mean nothing, so the share of pages found is that of unrelated queries and not of
text (``--same-token`` feeds one token again and again: queries that are more alike than those of a text). ``--retrieval-heads
8`` makes one head in eight a retrieval head and the others local, 64 + 256.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "llama-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, rope_theta=500000.0, max_position_embeddings=131072,
    ),
    "tiny": dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder; default: the demo model")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    parser.add_argument("--layers", type=int, default=4, help="layers of --shape")
    parser.add_argument("--text", help="text file to read (default: Python's own help topics)")
    parser.add_argument("--tokens", type=int, default=8000, help="tokens before the first timed step")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--warm", type=int, default=4, help="steps before the first timed one")
    parser.add_argument("--retrieval-heads", type=int, default=1, metavar="N", help="one head of N; others are local")
    parser.add_argument("--same-token", action="store_true", help="with --shape: feed one token again and again")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no arm after this time")
    parser.add_argument("--retrieve", default="32", help="pages per head, or a share such as 0.95")
    parser.add_argument("--near", type=int, default=256)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--cold", default="cpu", choices=["cpu", "disk"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--arms", default="", help="only arms whose name contains one of these, comma separated")
    parser.add_argument(
        "--profile", help="file: where the host's time goes in one step of each arm, after the timed ones"
    )
    parser.add_argument("--out", help="folder; appends to fetch_ahead.jsonl, one line per arm")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch
    from transformers import DynamicCache

    import redknot_hf
    from redknot_hf import HeadProfile, RedKnotCache

    end = time.monotonic() + args.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model, ids, name = _model(args, device, dtype)
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    every = args.retrieval_heads
    classes = [["retrieval" if (l + h) % every == 0 else "local" for h in range(heads)] for l in range(layers)]
    sink, window = ([[n if c == "local" else 0 for c in row] for row in classes] for n in (64, 256))
    retrieval = HeadProfile(layers, heads, classes, sink, window)
    pick: int | float = float(args.retrieve) if "." in args.retrieve else int(args.retrieve)
    options: dict[str, Any] = {"cold": args.cold, "near_tokens": args.near, "page_size": args.page_size}
    wide = None if isinstance(pick, float) else 4 * (pick + 1)
    arms: dict[str, tuple[HeadProfile | None, dict[str, Any]]] = {
        "ahead x2": (retrieval, {**options, "retrieve": pick}),
        "DynamicCache": (None, {}),
        "kept": (retrieval, {**options, "retrieve": pick, "resident_pages": 0}),
        "OffloadedCache": (None, {"offloading": device == "cuda"}),
        "DynamicCache, cuDNN off": (None, {}),
        "OffloadedCache, cuDNN off": (None, {"offloading": device == "cuda"}),
        "global": (HeadProfile.all_global(config), {"page_size": args.page_size}),
        "none kept": (retrieval, {**options, "retrieve": pick, "resident_pages": 0}),
        "fetch all": (retrieval, options),
        "ahead x4": (retrieval, {**options, "retrieve": pick, "resident_pages": wide}),
    }
    about = {
        "model": name, "tokens": args.tokens, "layers": layers, "kv_heads": heads, "retrieve": pick, "near": args.near,
        "page_size": args.page_size, "cold": args.cold, "dtype": args.dtype, "steps": args.steps, "warm": args.warm,
        "retrieval_heads": f"1 of {every}", "same_token": args.same_token,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "redknot_hf": redknot_hf.__version__},
        "command": "python benchmarks/tiers/fetch_ahead.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    reference = None
    for arm, (profile, given) in arms.items():
        if (args.arms and not any(word in arm for word in args.arms.split(","))) or (arm == "ahead x4" and not wide):
            continue
        if device == "cpu" and "cuDNN" in arm:
            continue
        if time.monotonic() > end:
            break
        gc.collect()
        model.set_attn_implementation("sdpa" if profile is None else "redknot")
        cache: Any = DynamicCache(config=config, **given) if profile is None else RedKnotCache(config, profile, **given)
        torch.backends.cuda.enable_cudnn_sdp("cuDNN off" not in arm)
        row, logits = measure(model, cache, ids, args, forget=arm == "none kept")
        if args.profile:
            profile_step(model, cache, ids, args, arm)
        torch.backends.cuda.enable_cudnn_sdp(True)
        del cache
        if "retrieve" in given:
            reference = logits if reference is None else reference
            assert torch.equal(logits, reference), f"{arm}: other logits than the first arm"
        row = {"arm": arm, **row, **about}
        print(json.dumps({key: row[key] for key in list(row)[: list(row).index("model")]}), flush=True)
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            with open(Path(args.out) / "fetch_ahead.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        del logits
    return 0


def measure(model: Any, cache: Any, ids: Any, args: argparse.Namespace, forget: bool) -> tuple[dict[str, Any], Any]:
    """Fill the cache, decode the tokens that follow, and say what it took."""
    import torch

    on_gpu = model.device.type == "cuda"
    config, found, times = model.config, [], []
    with torch.no_grad():
        if args.shape:
            generator = torch.Generator(model.device).manual_seed(1)
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            shape = (1, config.num_key_value_heads, args.tokens, dim)
            make = lambda: torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)  # noqa: E731
            pairs = ((make(), make()) for _ in range(config.num_hidden_layers))
            if hasattr(cache, "adopt"):
                cache.adopt(pairs, args.tokens)
            else:
                for layer, (k, v) in enumerate(pairs):
                    cache.update(k, v, layer)
        else:
            for start in range(0, args.tokens, 2048):
                model(ids[:, start : min(start + 2048, args.tokens)], past_key_values=cache, logits_to_keep=1)
        before, ours = None, hasattr(cache, "memory_report")
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        for step in range(args.steps + args.warm):
            if step == args.warm:  # the first steps find nothing on the device, and compile or choose kernels
                before = cache.memory_report().far if ours else None
                before = before + type(before)() if before is not None else None
            if forget:
                for layer in cache.layers:
                    layer.pages.far.resident = []
            position = args.tokens + step
            token = ids[:, :1] if args.same_token else ids[:, position : position + 1]
            begin = time.perf_counter()
            logits = model(token, past_key_values=cache, position_ids=torch.tensor([[position]], device=model.device))
            if on_gpu:
                torch.cuda.synchronize()
            if step >= args.warm:
                times.append((time.perf_counter() - begin) * 1e3)
                found.append(logits.logits[0, -1].float().cpu())
    row: dict[str, Any] = {"ms": round(statistics.median(times), 3), "ms_least": round(min(times), 3)}
    row["ms_p90"] = round(sorted(times)[int(0.9 * len(times))], 3)
    if not ours:
        return row, torch.stack(found)
    report = cache.memory_report()
    if report.far is not None and before is not None:
        per_step = {
            word: round((getattr(report.far, word) - getattr(before, word)) / args.steps, 2)
            for word in ("asked", "found", "late", "ahead", "moved")
        }
        row |= {"found_share": round(per_step["found"] / per_step["asked"], 4), "per_step": per_step}
    row |= {"hot_bytes": report.hot, "cold_bytes": report.cold, "resident_bytes": report.resident}
    return row, torch.stack(found)


def profile_step(model: Any, cache: Any, ids: Any, args: argparse.Namespace, arm: str) -> None:
    import cProfile
    import io
    import pstats

    import torch

    text = io.StringIO()
    position = args.tokens + args.steps + args.warm
    where = torch.tensor([[position]], device=model.device)
    with torch.no_grad():
        for _ in range(2):  # the second one is kept
            profile = cProfile.Profile()
            profile.runcall(model, ids[:, -1:], past_key_values=cache, position_ids=where)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            where = where + 1
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(25)
    with open(args.profile, "a") as file:
        file.write(f"{arm}\n{text.getvalue()}\n")


def _model(args: argparse.Namespace, device: str, dtype: Any) -> tuple[Any, Any, str]:
    import pydoc_data.topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    need = args.tokens + args.steps + args.warm
    torch.manual_seed(0)
    if args.shape:
        config = LlamaConfig(**SHAPES[args.shape], num_hidden_layers=args.layers)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="redknot").eval()
        ids = torch.randint(2, config.vocab_size, (1, need), generator=torch.Generator().manual_seed(0))
        return model, ids.to(device), f"{args.shape}, random weights"
    if args.model is None:
        from redknot_hf.demo_model import get_demo_model_path

        args.model = str(get_demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="redknot", dtype=dtype)
    text = Path(args.text).read_text() if args.text else "\n".join(pydoc_data.topics.topics.values())
    ids = AutoTokenizer.from_pretrained(args.model)(text[: 8 * need], return_tensors="pt").input_ids[:, :need]
    assert ids.shape[1] == need, f"the text has only {ids.shape[1]} tokens"
    return model.to(device).eval(), ids.to(device), Path(args.model).name


if __name__ == "__main__":
    sys.exit(main())
