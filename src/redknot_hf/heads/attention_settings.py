"""What of a config, beside its shape, decides where heads look: positions, the model's own windows, scale and caps.

Two models of one shape whose settings differ need different heads: a head that reaches far under one RoPE base does not
under another. Values are those of the config, without those that change nothing (None, a partial rotary factor of 1, a
sliding window that no layer uses), so that configs of different transformers versions compare as equal.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import shorten

__all__ = ["attention_settings", "settings_difference"]

# (none of them is a shape: those are in `config_hash`)
_FIELDS = (
    "attention_chunk_size", "attention_multiplier", "attn_logit_softcapping", "no_rope_layers",
    "original_max_position_embeddings", "partial_rotary_factor", "qk_layernorm", "query_pre_attn_scalar", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "use_qk_norm",
)  # fmt: skip


def attention_settings(text: Any) -> dict[str, Any]:
    """The settings of a decoder's config as plain JSON values; empty for one that has none.

    Args:
        text: the decoder's config (`model_shape.text_config`).
    """
    rope = _rope(text)
    kinds = {part.get("rope_type", "default") for part in rope.values() if isinstance(part, dict)}
    kinds |= {rope.get("rope_type", "default")}
    found = {name: _read(text, name) for name in _FIELDS}
    found["rope_parameters"] = rope
    if kinds != {"default"}:  # yarn, longrope and dynamic compare a position with it; others only bound the prompt
        found["max_position_embeddings"] = _read(text, "max_position_embeddings")
    types = _read(text, "layer_types")
    if isinstance(types, (list, tuple)) and set(types) != {"full_attention"}:
        found["layer_types"] = list(types)
    slides = types is None or "sliding_attention" in types
    if slides and _read(text, "use_sliding_window") is not False:
        found["sliding_window"] = _read(text, "sliding_window")
    if found.get("sliding_window") and types is None and _read(text, "use_sliding_window"):
        found["max_window_layers"] = _read(text, "max_window_layers")
    if found["partial_rotary_factor"] in (1, rope.get("partial_rotary_factor")):
        del found["partial_rotary_factor"]
    plain = {name: value for name, value in found.items() if value is not None and value != {}}
    return json.loads(json.dumps(plain, default=str))  # as it comes back from a file: lists, not tuples


def settings_difference(recorded: Any, text: Any) -> str | None:
    """Which recorded settings this config does not have, as words; None if all agree or none were recorded."""
    if not isinstance(recorded, dict):
        return None
    used = attention_settings(text)
    names = sorted(name for name in {*recorded, *used} if recorded.get(name) != used.get(name))
    if not names:
        return None
    return "; ".join(
        f"{shorten(name)} {_words(recorded.get(name))}, used with {_words(used.get(name))}" for name in names
    )


def _rope(text: Any) -> dict[str, Any]:
    """RoPE parameters of all layers, or of each type of layer; from the older attributes where there are no newer ones."""
    given = _read(text, "rope_parameters")
    if not isinstance(given, dict):
        given = dict(_read(text, "rope_scaling") or {})
        if _read(text, "rope_theta") is not None:
            given = {"rope_type": "default", **given, "rope_theta": text.rope_theta}
    return _without_defaults(given)


def _without_defaults(given: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in given.items():
        if isinstance(value, dict):
            kept[name] = _without_defaults(value)
        elif value is not None and name != "type" and not (name == "partial_rotary_factor" and value == 1):
            kept[name] = value
    return kept


def _read(text: Any, name: str) -> Any:
    try:
        return getattr(text, name, None)
    except RuntimeError:  # every layer has its own (transformers' AmbiguousGlobalPerLayerAttributeError)
        return None


def _words(value: Any) -> str:
    return "none" if value is None else shorten(value, 120)
