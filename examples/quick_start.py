"""The same answer as DynamicCache, in a part of the bytes.

A fact is hidden in a long text and asked for at its end. Three caches answer: transformers' DynamicCache, a RedKnotCache with
all heads global (exact), and one with the profile that is shipped for this model.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.demo_model import get_demo_model

TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FACT = "The secret word is marmalade. "
QUESTION = "Remember: the secret word is"


def main() -> dict[str, str]:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    inputs = tokenizer(TEXT * 10 + FACT + TEXT * 30 + QUESTION, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    caches = {
        "DynamicCache": DynamicCache(config=model.config),
        "RedKnotCache, all heads global": RedKnotCache(model.config, HeadProfile.all_global(model.config)),
        "RedKnotCache, shipped profile": RedKnotCache(model.config, "SmolLM2-135M-Instruct"),
    }
    answers = {}
    for name, cache in caches.items():
        with torch.no_grad():
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
        answers[name] = tokenizer.decode(output[0, length:])
        if isinstance(cache, RedKnotCache):
            size = cache.memory_report().live
        else:
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        print(f"{name:32} {size:>12,} bytes after {length} tokens: {QUESTION}{answers[name]}")
    return answers


if __name__ == "__main__":
    main()
