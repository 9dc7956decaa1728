"""Decode, prefill and KV bytes on the CPU: RedKnotCache against DynamicCache + sdpa, side by side in one process.

The three caches are measured in turn, round after round, on the same real text; figures are medians, ratios are medians
of the per-round ratios. Tokens are fed by the model's forward (no sampling), so every cache decodes the same tokens.
Before anything is timed, the all-global cache must give DynamicCache's tokens.

    python benchmarks/cpu/bench.py --model PATH --threads 2 --out benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

# retrieval heads measured on SmolLM2-135M-Instruct, filled up to 15 % of 90 heads
GLOBAL_HEADS = {(6, 0), (7, 2), (17, 0), (17, 1), (18, 2), (20, 1), (20, 2), (21, 2), (22, 1), (23, 0), (12, 1), (14, 0), (10, 2), (15, 1)}  # fmt: skip  # noqa: E501


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder; default: the demo model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", default="512,4096,8192")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="decode steps per round and cache")
    parser.add_argument("--prefill-rounds", type=int, default=2)
    parser.add_argument("--out", default=None, help="folder for cpu.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import pydoc_data.topics

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    import redknot_hf
    from redknot_hf import HeadProfile, RedKnotCache

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    if args.model:
        path = args.model
    else:
        from redknot_hf.demo_model import get_demo_model_path

        path = str(get_demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="redknot", dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n".join(pydoc_data.topics.topics.values())
    longest = max(int(c) for c in args.contexts.split(","))
    ids = tokenizer(text[: longest * 8], return_tensors="pt").input_ids

    mixed = HeadProfile.uniform(model.config, sink=4, window=256, global_heads=GLOBAL_HEADS)
    dense = HeadProfile.all_global(model.config)
    kinds = {
        "DynamicCache + sdpa": ("sdpa", lambda: DynamicCache(config=model.config)),
        "RedKnotCache all global": ("redknot", lambda: RedKnotCache(model.config, dense)),
        f"RedKnotCache {len(GLOBAL_HEADS) / 90:.1%} global, window 256": (
            "redknot",
            lambda: RedKnotCache(model.config, mixed),
        ),
    }
    base = next(iter(kinds))
    rows = []
    with torch.no_grad():
        for context in (int(c) for c in args.contexts.split(",")):
            prompt = ids[:, : context - args.steps]
            caches, prefill = {}, {name: [] for name in kinds}
            for _ in range(args.prefill_rounds):
                for name, (implementation, make) in kinds.items():
                    model.set_attn_implementation(implementation)
                    cache = make()
                    begin = time.perf_counter()
                    logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits
                    prefill[name].append(time.perf_counter() - begin)
                    caches[name] = (cache, logits)
            want = caches[base][1]
            got = caches["RedKnotCache all global"][1]
            error = (want - got).abs().max().item()
            same_token = bool((want.argmax(-1) == got.argmax(-1)).all())
            assert same_token, "the all-global cache must predict DynamicCache's token"
            decode = {name: [] for name in kinds}
            for round_ in range(args.rounds + 1):  # the first round warms up
                for name, (implementation, _) in kinds.items():
                    model.set_attn_implementation(implementation)
                    cache = caches[name][0]
                    begin = time.perf_counter()
                    for step in range(args.steps):
                        token = ids[:, (context + step) % ids.shape[1]][:, None]
                        model(token, past_key_values=cache)
                    if round_:
                        decode[name].append((time.perf_counter() - begin) / args.steps)
            for name in kinds:
                cache = caches[name][0]
                if name == base:
                    size = sum(t.untyped_storage().nbytes() for l in cache.layers for t in (l.keys, l.values))
                    report = {"allocated": size, "live": size}
                else:
                    full = cache.memory_report()
                    report = {"allocated": full.allocated, "live": full.live, "ideal": full.ideal}
                ratio = statistics.median(a / b for a, b in zip(decode[base], decode[name], strict=True))
                speedup = statistics.median(a / b for a, b in zip(prefill[base], prefill[name], strict=True))
                rows.append(
                    {
                        "context": context,
                        "cache": name,
                        "decode_ms": round(statistics.median(decode[name]) * 1e3, 2),
                        "decode_speedup": round(ratio, 3),
                        "prefill_s": round(statistics.median(prefill[name]), 3),
                        "prefill_speedup": round(speedup, 3),
                        "kv_bytes": report,
                        "max_logit_difference_to_dynamic": error if name != base else 0.0,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": "python " + " ".join(sys.argv),
        "model": "SmolLM2-135M-Instruct",
        "dtype": args.dtype,
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "redknot_hf": redknot_hf.__version__,
        },
        "rows": rows,
    }
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, f"cpu-{args.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
