"""Seeing and replacing the attention of a live model, without one line of per-model code.

`intercept(model, handler)` switches a model to a private attention function for the length of a `with` block; the
function hands queries, keys and values to `handler` and returns its result to the model. `decoder_layout(model)` runs a
few tokens through it and reports which layers hold KV heads, or refuses the model by name. Nothing is registered at
import, and nothing stays switched afterwards. It does not know what a head profile is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import RedKnotError
from ..model_shape import model_shape, text_config

__all__ = ["AttentionCall", "DecoderLayout", "Handler", "decoder_layout", "intercept"]

_NAME = "redknot_profiler"
_UNSUPPORTED_ARGUMENTS = ("position_bias", "indices", "block_indices")
_active = threading.local()


@dataclass
class AttentionCall:
    """One attention layer's inputs.

    Attributes:
        layer: `module.layer_idx`.
        query: `[batch, query_heads, rows, head_dim]`, after rotary embedding.
        key: `[batch, kv_heads, keys, head_dim]`; the last `rows` of them belong to the query rows.
        value: `[batch, kv_heads, keys, value_dim]`.
        scaling: factor on the scores.
        model_window: the layer's own sliding window in tokens, 0 for none.
        softcap: bound of the scores' tanh, None for none.
        sink_logits: learned per-query-head logits that join the softmax with no value (`[query_heads]`), None for none.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    model_window: int = 0
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def offset(self) -> int:
        """Position of the first query row."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key.shape[1]


Handler = Callable[[AttentionCall], Tensor]
"""Returns the attention output `[batch, query_heads, rows, value_dim]`."""


@dataclass(frozen=True)
class DecoderLayout:
    """What the profiler must know of a decoder.

    Attributes:
        num_layers: decoder layers, attention or not.
        num_kv_heads: KV heads per attention layer.
        num_query_heads: query heads per attention layer.
        head_dim: elements per head.
        layers: attention layers that were seen, increasing.
        model_window: `[num_layers]` the model's own sliding windows in tokens, 0 for none.
    """

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_dim: int
    layers: tuple[int, ...]
    model_window: tuple[int, ...]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = getattr(module, "layer_idx", None)
    what = type(module).__name__
    if layer is None:
        raise RedKnotError(f"{what} has no layer_idx: the profiler cannot tell its layer; this model is not supported")
    causal = kwargs.get("is_causal")
    if (causal if causal is not None else getattr(module, "is_causal", True)) is False:
        raise RedKnotError(f"{what} (layer {layer}) attends in both directions; head profiles are for causal decoders")
    for name in _UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise RedKnotError(
                f"{what} (layer {layer}) passes {name!r} to its attention, which the profiler cannot follow"
            )
    if s_aux is None:
        s_aux = kwargs.get("sinks")
    windows = _active.windows
    window = windows[layer] if layer < len(windows) else 0
    if sliding_window and not window:
        window = int(sliding_window)
    call = AttentionCall(
        layer, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap, s_aux
    )
    return _active.handler(call).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Every batch of the profiler is unpadded and causal, so the handlers need no mask."""
    return None


def _configs(model: Any) -> list[Any]:
    """Every config object of the model that carries an attention implementation, outermost first."""
    found: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "_attn_implementation"):
            continue
        parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
        for part in parts:
            if part is not None and hasattr(part, "_attn_implementation") and not any(part is known for known in found):
                found.append(part)
    return found


@contextmanager
def intercept(model: Any, handler: Handler) -> Iterator[None]:
    """Route every attention layer of `model` through `handler` inside the block (this thread only).

    Raises:
        RedKnotError: the model does not take an attention implementation (falcon, bloom, mpt and other old families).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    outer = (getattr(_active, "handler", None), getattr(_active, "windows", ()))
    if outer[0] is not None:  # nested: only the handler changes
        _active.handler = handler
        try:
            yield
        finally:
            _active.handler = outer[0]
        return

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    saved = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        model.set_attn_implementation(_NAME)
        text = text_config(model.config)
        if text._attn_implementation != _NAME:
            raise RedKnotError(
                f"{type(model).__name__} does not let its attention be replaced (it predates transformers' attention "
                "interface), so its heads cannot be profiled; use HeadProfile.uniform or import a published profile"
            )
        _active.handler, _active.windows = handler, _model_windows(text)
        yield
    finally:
        _active.handler, _active.windows = None, ()
        for config, implementation in saved:
            config._attn_implementation = implementation


def _model_windows(text: Any) -> tuple[int, ...]:
    """The sliding window of every layer as transformers' own cache understands the config; 0 for none."""
    from transformers import DynamicCache

    layers = DynamicCache(config=text).layers
    return tuple(int(getattr(layer, "sliding_window", 0) or 0) for layer in layers)


@torch.no_grad()
def decoder_layout(model: Any) -> DecoderLayout:
    """Find the attention layers of a decoder by running eight tokens through it.

    Raises:
        RedKnotError: not a causal decoder, or one whose KV heads a head profile cannot describe; names the reason.
    """
    from .visibility import visible_attention

    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise RedKnotError(f"{name} is an encoder-decoder; head profiles are for decoders")
    shape = model_shape(model.config)
    text = text_config(model.config)
    types = getattr(text, "layer_types", None) or []
    if "chunked_attention" in types:
        raise RedKnotError(f"{name} uses chunked attention, which restarts every chunk; the profiler cannot follow it")
    if getattr(text, "num_kv_shared_layers", 0):
        raise RedKnotError(f"{name} shares KV between layers; a head profile cannot be measured for such models yet")

    seen: dict[int, tuple[int, ...]] = {}

    def record(call: AttentionCall) -> Tensor:
        dims = (call.key.shape[1], call.query.shape[1], call.key.shape[3], call.value.shape[3])
        if seen.setdefault(call.layer, dims) != dims:
            raise RedKnotError(f"{name}: layer {call.layer} attends twice with different shapes; not supported")
        return visible_attention(call)

    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % int(text.vocab_size)
    with intercept(model, record):
        windows = _active.windows
        model(input_ids=ids, use_cache=False)
    if not seen:
        raise RedKnotError(f"{name}: no attention layer called the attention interface; this model cannot be profiled")
    dims = set(seen.values())
    if len(dims) > 1:
        raise RedKnotError(
            f"{name}: layers differ in their head counts or sizes {sorted(dims)}; a head profile needs one"
        )
    kv_heads, query_heads, key_dim, value_dim = dims.pop()
    if key_dim != value_dim or kv_heads != shape.num_kv_heads:
        raise RedKnotError(
            f"{name}: attention sees {kv_heads} KV heads of {key_dim} (keys) and {value_dim} (values), the config says "
            f"{shape.num_kv_heads}: the cache does not hold per-head keys and values (latent attention?)"
        )
    if max(seen) >= shape.num_layers:
        raise RedKnotError(
            f"{name}: layer_idx {max(seen)} with {shape.num_layers} layers; this layout is not supported"
        )
    padded = tuple(windows[i] if i < len(windows) else 0 for i in range(shape.num_layers))
    return DecoderLayout(shape.num_layers, kv_heads, query_heads, key_dim, tuple(sorted(seen)), padded)
