"""Tiny random models of several families, and the profile the static tests use."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config

from redknot_hf import HeadProfile

SHAPE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=96, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=3, head_dim=16, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "mistral-sliding": lambda: MistralConfig(**SHAPE, sliding_window=12),
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=12, query_pre_attn_scalar=16),
    "gpt-oss": lambda: GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=12),
}


@functools.cache
def model(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="redknot").eval()


def mixed(config: Any, window: int = 8) -> HeadProfile:
    """Every second head global, the others sink 3 and a short window."""
    heads = {(l, h) for l in range(config.num_hidden_layers) for h in range(config.num_key_value_heads)}
    return HeadProfile.uniform(config, sink=3, window=window, global_heads={c for c in heads if sum(c) % 2 == 0})


def prompt(rows: int = 1, length: int = 40, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids ``[rows, length]`` and their mask; rows but the last are left-padded by 4 and 11."""
    ids = torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in zip(range(rows - 1), (11, 4), strict=False):
        mask[row, :pad] = 0
    ids[mask == 0] = 0
    return ids.to(device), mask.to(device)


def generate(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14, **options}
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def assert_same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    assert torch.equal(a.sequences, b.sequences)
    worst = max((x - y).abs().max().item() for x, y in zip(a.logits, b.logits, strict=True))
    assert worst <= tolerance, worst
