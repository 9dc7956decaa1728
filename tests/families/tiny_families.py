"""A tiny random model of every decoder family that transformers knows.

`tiny_config(model_type)` takes the family's default config and replaces every size it finds by a small one, in nested
configs too. What cannot be told from names is in `SPECIAL`. It knows nothing of caches.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, WINDOW = 4, 4, 2, 16, 64, 99, 8
MOST_PARAMETERS = 40_000_000

_GROUPS: list[tuple[int, str]] = [
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size "
        "encoder_hash_byte_group_vocab",
    ),
    (
        HIDDEN,
        "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
        "intermediate_size ffn_dim n_inner d_ff dff dim_ff d_inner ffn_hidden_size expert_ffn_hidden_size "
        "decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp dense_intermediate_size shared_intermediate_size "
        "input_embedding_size output_embedding_size feed_forward_size mamba_d_ssm dim_model_base "
        "pronunciation_embed_dim shape_embed_dim router_hidden_size attention_hidden_size prompt_mid_dim",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "shared_experts_intermediate_size index_head_dim adapter_rank mamba_d_head mamba_headdim "
        "attention_head_dim time_step_rank mamba_dt_rank",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
        "num_encoder_layers num_blocks",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads "
        "attention_heads encoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts "
        "num_local_experts moe_num_experts linear_num_value_heads linear_num_heads swa_num_attention_heads "
        "mamba_n_heads mamba_num_heads n_mamba_heads index_n_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
        "moe_topk moe_top_k moe_k top_k_experts linear_num_key_heads depth",
    ),
    (
        HEAD_DIM,
        "head_dim v_head_dim kv_lora_rank swa_head_dim linear_head_dim linear_key_head_dim "
        "qk_head_dim linear_value_head_dim kv_channels dim_head attention_head_size d_head global_head_dim "
        "mamba_head_dim query_pre_attn_scalar ssm_state_size state_size",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size local_attention "
        "attention_chunk_size qk_nope_head_dim qk_rope_head_dim mamba_d_state hidden_size_per_layer_input laurel_rank "
        "rotary_dim o_lora_rank hc_lowrank ple_embed_dim gated_norm_rank d_rel ngram_size rel_extent",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "first_k_dense_replace zero_expert_num num_dense_layers mamba_n_groups mamba_ngroups n_groups "
        "num_nextn_predict_layers",
    ),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length "
        "max_source_positions original_max_position_embeddings index_topk",
    ),
]
SIZES: dict[str, Any] = {name: size for size, names in _GROUPS for name in names.split()}
SIZES.update(pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1, is_decoder=True)
# None means "off" for these: a family that has it off keeps it off
KEEP_NONE = {"sliding_window", "attention_chunk_size", "q_lora_rank", "n_inner"}
UNSET_FIRST = ("eos_token_id", "head_dim", "num_key_value_heads")

# Sizes that follow from others in a way no name tells.
_MAMBA = ["linear_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots3_note": {"adapter_in_dim": HIDDEN},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "granitemoehybrid": {"layer_types": _MAMBA, "layers_block_type": _MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "prophetnet": {"num_hidden_layers": NotImplemented},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "axk1": {"head_dim": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v3": {"head_dim": 8},
    "youtu": {"head_dim": 8},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 16},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """Model types that `AutoModelForCausalLM` builds, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _settable(config: Any, name: str) -> bool:
    """Whether a config takes ``name``: not a read-only property, not an alias of another name."""
    own = getattr(type(config), name, None)
    read_only = isinstance(own, property) and own.fset is None
    return not read_only and name not in (getattr(type(config), "attribute_map", None) or {})


def _shrink(config: Any) -> dict[str, Any]:
    """Small values for every size that ``config`` has, nested configs included."""
    small: dict[str, Any] = {}
    for name, size in SIZES.items():
        try:
            present = hasattr(config, name)
            given = getattr(config, name, None)
        except Exception:  # a property that raises is not a size
            continue
        if present and _settable(config, name) and not (given is None and name in KEEP_NONE):
            small[name] = [size] * LAYERS if isinstance(given, list) and name != "eos_token_id" else size
    if "q_lora_rank" in config.__dict__ and config.q_lora_rank is not None:
        small["q_lora_rank"] = HEAD_DIM
    if getattr(config, "num_kv_shared_layers", 0):
        small["num_kv_shared_layers"] = 2
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, (list, tuple)) and kinds and _settable(config, name):
            small[name] = (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS]
    if "kv_lora_rank" in small:  # latent attention: every query head has its own keys
        small["num_key_value_heads"] = HEADS
    for name in getattr(type(config), "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            small[name] = _shrink(part)
    return small


def tiny_config(model_type: str) -> Any:
    """The config of a small model of the family.

    Raises:
        Exception: whatever the family's config raised last, when none of the attempts was accepted.
    """
    try:
        small = _shrink(AutoConfig.for_model(model_type))
    except Exception:
        small = {}
    special = SPECIAL.get(model_type, {})
    small.update(special)
    small = {name: size for name, size in small.items() if size is not NotImplemented}
    error: Exception | None = None
    for without in (
        (),
        ("layer_types",),
        ("head_dim",),
        ("head_dim", "layer_types"),
        ("num_key_value_heads",),
        UNSET_FIRST,
    ):
        try:
            return AutoConfig.for_model(
                model_type, **{k: v for k, v in small.items() if k not in without or k in special}
            )
        except Exception as problem:
            error = problem
    assert error is not None
    raise error


def tiny_model(model_type: str, seed: int = 0) -> Any:
    """A random fp32 model of the family in its default attention implementation.

    Raises:
        ValueError: the shrunk config is still large.
        Exception: the family's own error.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the shrunk model still has {size:,} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval().float()
    # Default initialisation of 0.02 gives nearly uniform attention, which would hide a wrong key.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and weight.is_floating_point() and ("q_proj" in name or "k_proj" in name):
                weight.mul_(6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
