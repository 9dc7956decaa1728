"""Tiny random models of the block forms that a sparse FFN meets, and a definition of it to compare with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

import redknot_hf  # noqa: F401  # registers "redknot"

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=12, query_pre_attn_scalar=12),  # sandwich norms, softcap
    "cohere": lambda: CohereConfig(**SIZES),  # a parallel block
    "gpt_neox": lambda: GPTNeoXConfig(  # the other parallel block, other names
        **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}, use_parallel_residual=True
    ),
}
FFN = {"gpt_neox": "mlp"}
SEQUENTIAL = ["llama", "qwen3", "mixtral", "gemma2"]


@functools.cache
def tiny(name: str, seed: int = 0) -> Any:
    """The model of ``CONFIGS[name]`` with weights large enough that attention is uneven and FFNs matter; fp32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="redknot").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 0.15 if "embed" not in key else 0.7)
    return model.float()


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def with_rows(model: Any, ids: torch.Tensor, passing: dict[int, torch.Tensor], **options: Any) -> torch.Tensor:
    """Logits by the definition: every FFN runs over all rows, and what it gives for rows that do not pass is zeroed.

    Args:
        passing: layer -> bool ``[batch, rows]``.
    """
    hooks = []
    for layer, rows in passing.items():
        block = model.get_decoder().layers[layer]

        def zero(module: Any, args: Any, output: Any, rows: torch.Tensor = rows) -> Any:
            if isinstance(output, tuple):
                return (output[0] * rows[..., None], *output[1:])
            return output * rows[..., None]

        hooks.append(block.mlp.register_forward_hook(zero))
    try:
        return model(ids, **options).logits
    finally:
        for hook in hooks:
            hook.remove()
