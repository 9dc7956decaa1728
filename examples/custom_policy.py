"""A head policy of your own, and what it costs.

A policy is a function that returns a HeadProfile. This one keeps the heads whose last query looks furthest back on one
text, and compares with a random choice of as many heads, in KL divergence from the full cache.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from redknot_hf import HeadProfile, RedKnotCache, attention
from redknot_hf.demo_model import get_demo_model

TEXT = "A beekeeper's year has twelve chapters, and each begins with a look at the sky. In March the bees fly out. "
KEEP, SINK, WINDOW = 22, 4, 64


def far_attention(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Share of attention that the last query pays to keys outside sink and window; fp32 `[layers, kv_heads]`."""
    shares: dict[int, torch.Tensor] = {}

    def look(module, query, key, mask, scaling, sliding_window, softcap, s_aux, kwargs):  # type: ignore[no-untyped-def]
        groups = query.shape[1] // key.shape[1]
        weights = (query[:, :, -1:] @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling).softmax(-1)
        shares[module.layer_idx] = weights[0, :, 0, SINK:-WINDOW].sum(-1).view(-1, groups).amax(1)

    attention.observe(look)
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        attention.observe(look, wanted=False)
    return torch.stack([shares[layer] for layer in sorted(shares)])


def kl_against_full(model: Any, profile: HeadProfile, ids: torch.Tensor, tail: int = 64) -> float:
    """Mean KL(full || profile) of the next-token distributions over the last `tail` positions, in nats."""
    logits = []
    for chosen in (HeadProfile.all_global(model.config), profile):
        with torch.no_grad():
            logits.append(
                model(ids, past_key_values=RedKnotCache(model.config, chosen)).logits[0, -tail:].log_softmax(-1)
            )
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


def main() -> tuple[float, float]:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    measured_on = tokenizer(TEXT * 8, return_tensors="pt")["input_ids"]
    judged_on = tokenizer(
        "Numbers: " + " ".join(str(n * n) for n in range(120)) + ". " + TEXT * 4, return_tensors="pt"
    )["input_ids"]
    scores = far_attention(model, measured_on)
    cells = [divmod(int(i), scores.shape[1]) for i in scores.flatten().argsort(descending=True)]
    results = []
    for name, chosen in (("looks far", cells[:KEEP]), ("random", random.Random(0).sample(cells, KEEP))):
        profile = HeadProfile.uniform(model.config, sink=SINK, window=WINDOW, global_heads=set(chosen))
        results.append(kl_against_full(model, profile, judged_on))
        print(f"{name:10} {KEEP} of {len(cells)} heads global: KL {results[-1]:.4f} nats per token")
    return results[0], results[1]


if __name__ == "__main__":
    main()
