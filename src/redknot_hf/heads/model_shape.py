"""What a head profile needs to know of a model's config: how many layers, KV heads, which layers hold KV, and a name.

Reads attributes only, so transformers is not imported and any object with the usual names will do. It does not know the
live model: where a config cannot tell the number of KV heads the cache holds, the cache checks the tensors it is given.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from ..errors import RedKnotError, shorten
from .attention_settings import attention_settings, settings_difference

__all__ = [
    "HEAD_ORDER",
    "MAX_CELLS",
    "ModelShape",
    "config_hash",
    "describe_config",
    "model_shape",
    "provenance_difference",
]

# layer_types of transformers whose layers hold keys and values per token. Anything else (linear_attention, mamba, conv,
# recurrent...) keeps a state of its own that a head profile does not touch.
_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid"}

HEAD_ORDER = "redknot_head_order"
"""Where a config keeps the order of a relabelled model's heads: see `order`."""

MAX_CELLS = 1_000_000
"""Most (layer, KV head) cells of a model or profile; the largest known have below 20,000."""

_HASHED_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that decide the shape of its KV cache.

    Attributes:
        num_layers: decoder layers, attention or not.
        num_kv_heads: KV heads of an attention layer.
        num_attention_heads: query heads of an attention layer.
        head_dim: elements per head; None when the config does not tell.
        attention_layers: layers that hold KV; None means all of them.
        sliding_window: the model's own window in tokens, None when it has none.
        sliding_layers: layers it applies to; None means all attention layers.
        name: `config._name_or_path`, or "" when unknown.
        model_type: `config.model_type`, or "".
        revision: commit of the Hub repository the config came from; None when unknown.
    """

    num_layers: int
    num_kv_heads: int
    num_attention_heads: int
    head_dim: int | None
    attention_layers: tuple[int, ...] | None
    sliding_window: int | None
    sliding_layers: tuple[int, ...] | None
    name: str
    model_type: str
    revision: str | None


def text_config(config: Any) -> Any:
    """The decoder's config of a composite config; `config` itself when it has no parts."""
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if callable(get) else config


def model_shape(config: Any) -> ModelShape:
    """Read the shape of a model from its config.

    Args:
        config: a transformers config (or any object with its attribute names).

    Raises:
        RedKnotError: the config has no attention heads or no layer count, or different layers have different numbers
            of KV heads.
    """
    text = text_config(config)
    name = str(getattr(config, "_name_or_path", "") or getattr(text, "_name_or_path", "") or "")
    model_type = str(getattr(text, "model_type", "") or "")
    who = f"the config of {name or model_type or type(config).__name__!r}"

    num_layers = _positive(getattr(text, "num_hidden_layers", None), f"{who}: num_hidden_layers")
    heads = _positive(_uniform(_read(text, "num_attention_heads", who), who), f"{who}: num_attention_heads")
    kv_heads = _uniform(_read(text, "num_key_value_heads", who), who)
    if kv_heads is None:
        # Models from before GQA: either all query heads have their own KV, or one KV head serves all of them.
        shared = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
        kv_heads = 1 if shared else heads
    kv_heads = _positive(kv_heads, f"{who}: num_key_value_heads")
    if num_layers * kv_heads > MAX_CELLS:  # before anybody makes a row per layer of it
        raise RedKnotError(
            f"{who} claims {num_layers} layers x {kv_heads} KV heads; expected at most {MAX_CELLS:,} in all"
        )

    head_dim = _read(text, "head_dim")
    if not isinstance(head_dim, int) or head_dim <= 0:
        hidden = getattr(text, "hidden_size", None)
        head_dim = hidden // heads if isinstance(hidden, int) and hidden >= heads else None

    types = getattr(text, "layer_types", None)
    attention_layers = sliding_layers = None
    sliding_window = getattr(text, "sliding_window", None)
    sliding_window = sliding_window if type(sliding_window) is int and sliding_window > 0 else None
    if isinstance(types, (list, tuple)) and len(types) == num_layers:
        held = tuple(i for i, kind in enumerate(types) if kind in _ATTENTION_LAYER_TYPES)
        # No known type at all means names we have never seen, not a model without attention.
        attention_layers = held if 0 < len(held) < num_layers else None
        sliding_layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if not sliding_window or sliding_layers == ():
        sliding_window = sliding_layers = None

    revision = getattr(config, "_commit_hash", None) or getattr(text, "_commit_hash", None)
    return ModelShape(
        num_layers=num_layers,
        num_kv_heads=kv_heads,
        num_attention_heads=heads,
        head_dim=head_dim,
        attention_layers=attention_layers,
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        name=name,
        model_type=model_type,
        revision=revision,
    )


def config_hash(config: Any) -> str:
    """16 hex digits over the fields that fix a decoder's architecture; transformers version and dtype do not matter."""
    text = text_config(config)
    fields = {key: _read(text, key) for key in _HASHED_FIELDS}
    canonical = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def describe_config(config: Any) -> dict[str, Any]:
    """The provenance keys of a profile's metadata that a config can fill: see docs/profile-format.md."""
    shape = model_shape(config)
    order = getattr(text_config(config), HEAD_ORDER, None)
    found = {
        "model": shape.name or None,
        "model_type": shape.model_type or None,
        "revision": shape.revision,
        "config_hash": config_hash(config),
        "attention": attention_settings(text_config(config)) or None,
        "head_dim": shape.head_dim,
        "attention_layers": None if shape.attention_layers is None else list(shape.attention_layers),
        "sliding_window": shape.sliding_window,
        "sliding_layers": None if shape.sliding_layers is None else list(shape.sliding_layers),
        "placement": None if order is None else {"permutation": order},
    }
    return {key: value for key, value in found.items() if value is not None}


def provenance_difference(metadata: dict[str, Any], config: Any) -> str | None:
    """What a profile's metadata records that this model is not, as a sentence; None when nothing speaks against it."""
    shape = model_shape(config)
    recorded = metadata.get("config_hash")
    same_architecture = recorded == config_hash(config) if recorded else None
    aliases = metadata.get("model_aliases")
    known = [metadata.get("model"), *(aliases if isinstance(aliases, list) else [])]
    known_names = {basename(str(model)) for model in known if model}
    used = basename(shape.name)
    differences = []
    # A local directory may be called anything; its name says nothing unless the architecture differs.
    is_directory = bool(shape.name) and os.path.isdir(shape.name)
    if known_names and used and used not in known_names and not (is_directory and same_architecture is not False):
        differences.append(f"model {shorten(metadata.get('model'))}, used with {shorten(shape.name)}")
    if metadata.get("revision") and shape.revision and metadata["revision"] != shape.revision:
        differences.append(f"revision {shorten(metadata['revision'])}, used with {shorten(shape.revision)}")
    if same_architecture is False:
        differences.append(f"config hash {shorten(recorded)}, used with {config_hash(config)}")
    settings = settings_difference(metadata.get("attention"), text_config(config))
    if settings:
        differences.append(settings)
    if not differences:
        return None
    return f"the head profile was made for {'; '.join(differences)}: its head classes may not fit these weights"


def basename(name: str) -> str:
    """The last part of a path or Hub id, in lower case: what model names are compared by."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def _read(config: Any, key: str, who: str = "") -> Any:
    """An attribute of a config; None where it is missing, or where every layer has its own (gemma4's `head_dim`).

    Raises:
        RedKnotError: every layer has its own and ``who`` is given, i.e. the caller cannot do without.
    """
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        if who:
            raise RedKnotError(
                f"{who} gives different layers different values of {key}; head profiles need the same number of KV heads "
                "in every layer"
            ) from None
        return None


def _uniform(value: Any, who: str) -> Any:
    """One number for all layers, from a number or a list of equal numbers."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) > 1:
        raise RedKnotError(
            f"{who} gives different layers different numbers of heads ({shorten(list(value))}); "
            "head profiles need the same number of KV heads in every layer"
        )
    return value[0] if value else None


def _positive(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RedKnotError(f"{what} is {shorten(value)}; expected a positive integer (a decoder with attention heads)")
    return value
