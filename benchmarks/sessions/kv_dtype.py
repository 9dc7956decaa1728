"""What keeping a prefix in one byte per channel does to what follows: KL divergence, most likely tokens, greedy text.

    python benchmarks/sessions/kv_dtype.py --model DIR --out benchmarks/results/cpu [--tokens 1000] [--probe 65]

Every head keeps every token, so quantising is the only difference. The text is the article that the demo asks about.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import redknot_hf
from redknot_hf import HeadProfile
from redknot_hf.prefix import compress_prefix


def continued(model: Any, cache: Any, ids: torch.Tensor, new: int) -> list[int]:
    """Greedy tokens after the prefix ``ids`` and the next token of the text, which the cache does not hold."""
    out = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=1000, help="of the prefix")
    parser.add_argument("--probe", type=int, default=65, help="tokens that follow it in the text")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="redknot").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = importlib.resources.files("redknot_hf").joinpath("data", "aardvark.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens + args.probe]
    prefix, probe, request = ids[:, : args.tokens], ids[:, args.tokens :], ids[:, : args.tokens + 1]
    profile = HeadProfile.all_global(model.config)
    exact = continued(model, compress_prefix(model, prefix, profile), request, args.new_tokens)
    rows = []
    for dtype in ("int8", "fp8"):
        cache = compress_prefix(model, prefix, profile, kv_dtype=dtype, probe=probe)
        report = cache.prefix_report
        found = continued(model, cache.fork(), request, args.new_tokens)
        same = next((i for i, (a, b) in enumerate(zip(exact, found, strict=True)) if a != b), args.new_tokens)
        rows.append(
            {
                "kv_dtype": dtype, "live_bytes": report.live, "dense_bytes": report.dense, "kl": report.kl,
                "same_top1": report.same_top1, "greedy_tokens_alike": same,
            }
        )  # fmt: skip
        print(rows[-1])
    result = {
        "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "model": Path(args.model).name,
        "dtype": "float32", "device": "cpu",
        "threads": torch.get_num_threads(), "tokens": args.tokens, "probe": args.probe,
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "redknot_hf": redknot_hf.__version__,
        },
        "rows": rows,
    }  # fmt: skip
    (args.out / "kv_dtype.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
