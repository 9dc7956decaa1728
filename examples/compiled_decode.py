"""The static form: fixed memory, and decode steps that are compiled.

On an NVIDIA GPU `generate` compiles the decode step by itself because the cache says that it can be compiled. Here, on a
CPU, that takes a C++ compiler and `--compile`; without it the same cache runs eagerly and gives the same tokens.
"""

from __future__ import annotations

import sys

import torch
from transformers import CompileConfig

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.demo_model import get_demo_model


def main(compiled: bool = False) -> bool:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = get_demo_model(attn_implementation="redknot", device=device)
    profile = HeadProfile.load("SmolLM2-135M-Instruct")
    inputs = tokenizer("The three primary colours are", return_tensors="pt").to(device)
    options = {"max_new_tokens": 24, "do_sample": False}
    if compiled and device == "cpu":
        options["compile_config"] = CompileConfig(fullgraph=True, mode="default")
        options["compile_config"]._compile_all_devices = True  # transformers' own switch for the CPU

    cache = RedKnotCache(model.config, profile, max_cache_len=128)
    with torch.no_grad():
        fixed = model.generate(**inputs, past_key_values=cache, **options)
        taken = cache.memory_report().allocated
        cache.reset()  # memory and addresses stay, so compiled code stays valid
        again = model.generate(**inputs, past_key_values=cache, **options)
        grown = model.generate(
            **inputs, past_key_values=RedKnotCache(model.config, profile), max_new_tokens=24, do_sample=False
        )
    print(tokenizer.decode(fixed[0]))
    print(f"{taken:,} bytes before and {cache.memory_report().allocated:,} after the second prompt")
    same = fixed.tolist() == again.tolist() == grown.tolist()
    print("the same tokens as a cache that grows:", same)
    return same


if __name__ == "__main__":
    sys.exit(0 if main("--compile" in sys.argv[1:]) else 1)
