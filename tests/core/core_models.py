"""Tiny random models of the kinds of attention that matter, and how the tests run and compare them.

Three layers, six query heads over three KV heads: head counts that are no power of two, like SmolLM2's. fp32, so that
equality means 1e-5 on the logits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from redknot_hf import HeadProfile, RedKnotCache

LOGITS = 1e-5  # largest difference of fp32 logits, which are below 1 here
SIZES = dict(
    vocab_size=97,
    hidden_size=96,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),  # norms of queries and keys
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=12),  # a window in every layer
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=12, query_pre_attn_scalar=16),  # softcap, windows in turn
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        sliding_window=12,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=12),  # sinks
}
FAMILIES = list(CONFIGS)
SINK, WINDOW = 3, 8


@functools.cache
def tiny(name: str, seed: int = 0) -> Any:
    """The model of ``CONFIGS[name]``, running "redknot". Tests must leave it so."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="redknot").eval()
    with torch.no_grad():  # fresh weights attend almost evenly, which would hide a wrong key
        for key, weight in model.named_parameters():
            if "q_proj.weight" in key or "k_proj.weight" in key:
                weight.mul_(4)
    return model


def default_implementation(name: str) -> str:
    return "eager" if name in ("gemma2", "gpt_oss") else "sdpa"


def mixed(config: Any) -> HeadProfile:
    """Every other head local, three sinks, windows of 8 and 5: shorter than the models' own of 12."""
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    keep = {(l, h) for l in range(layers) for h in range(heads) if (l + h) % 2 == 0}
    profile = HeadProfile.uniform(config, sink=SINK, window=WINDOW, global_heads=keep)
    profile.window[1][0], profile.sink[1][0] = 5, 0
    profile.validate()
    return profile


def tokens(count: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], side: str = "left", seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths in one batch: ids and mask."""
    width = max(lengths)
    ids, mask = tokens(width, len(lengths), seed), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, width - length :] = 1
        else:
            mask[row, :length] = 1
    return ids.masked_fill(mask == 0, 0), mask


def generate(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    """generate() with the logits of every step; greedy and 9 tokens unless told otherwise."""
    torch.manual_seed(5)
    settings = {"do_sample": False, "max_new_tokens": 9, **options}
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None, **kw: Any):
    """Logits ``[batch, n, vocab]`` of one forward."""
    return model(ids, attention_mask=mask, past_key_values=cache, **kw).logits


def assert_same(one: Any, other: Any, bound: float = LOGITS) -> None:
    """The same tokens, logits within ``bound``."""
    assert torch.equal(one.sequences, other.sequences)
    off = max((a - b).abs().max().item() for a, b in zip(one.logits, other.logits, strict=True))
    assert off <= bound, off


def global_cache(model: Any, **options: Any) -> RedKnotCache:
    return RedKnotCache(model.config, HeadProfile.all_global(model.config), **options)


def mixed_cache(model: Any, **options: Any) -> RedKnotCache:
    return RedKnotCache(model.config, mixed(model.config), **{"page_size": 16, **options})


def plain_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)
