"""Measure which heads need everything, save the profile, read it again.

The numbers are far below the defaults, so that it ends within two minutes on a CPU. The validation it prints has one
prompt of each kind and wide intervals: good for seeing how it works. For a real profile leave `context`, `samples` and
`gate_steps` alone, or run `redknot profile`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from redknot_hf import HeadProfile, profile_heads
from redknot_hf.demo_model import get_demo_model


def main(target: str = "smollm2-profile.json") -> HeadProfile:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    profile = profile_heads(
        model,
        tokenizer,
        budget=0.25,
        context=256,
        samples=1,
        gate_steps=2,
        windows=(64, 128),
        mean_window=64,
        progress=False,
    )
    path = profile.save(target)
    print(f"{path}: {path.stat().st_size:,} bytes, {profile.count('global')} of 90 heads global")
    print("validation:", profile.metadata["validation"])
    for tokens in (2048, 8192, 32768):
        print(
            f"at {tokens:6} tokens: {profile.kv_bytes(tokens) / profile.dense_kv_bytes(tokens):.0%} of a dense cache's bytes"
        )
    again = HeadProfile.load(path)
    assert again.head_class == profile.head_class
    return again


if __name__ == "__main__":
    main(*map(str, map(Path, sys.argv[1:2])))
