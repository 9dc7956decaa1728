"""The state of the layers that a RedKnotCache leaves to transformers: linear, hybrid, chunked and sliding ones.

Only classes whose whole state is known here are taken; any other is refused by name rather than saved in part. A state
is split into tensors and a few plain values, and goes back only into attributes listed here.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils

from ..errors import CacheError, UnsupportedModel, shorten

__all__ = ["capture_plain", "restore_plain"]

_ATTENTION = ("keys", "values")
_SLIDING = (*_ATTENTION, "cumulative_length", "record_past")
_LINEAR = (
    "conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized",
    "has_previous_state", "conv_kernel_size", "record_past",
)  # fmt: skip

_STATE: dict[str, tuple[str, ...]] = {
    "DummyLayer": (),
    "DynamicLayer": _ATTENTION,
    "DynamicSlidingWindowLayer": _SLIDING,
    "LinearAttentionLayer": _LINEAR,
    "LinearAttentionAndFullAttentionLayer": (*_LINEAR, *_ATTENTION),
    "LinearAttentionAndSlidingWindowAttentionLayer": (*_LINEAR, *_SLIDING),
}
_INTEGER = ("cumulative_length",)
_FLAG = ("record_past",)
_TENSOR = _ATTENTION
_TENSORS = ("conv_states", "recurrent_states")  # {state index: tensor or None}
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")
MAX_LENGTH = 1 << 40


def capture_plain(index: int, layer: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``(description, tensors)`` of one layer.

    Raises:
        UnsupportedModel: the class is not known here, or holds something in an unexpected form.
    """
    name = type(layer).__name__
    if name not in _STATE or getattr(cache_utils, name, None) is not type(layer):
        raise UnsupportedModel(
            f"layer {index} is a {name}, whose state cannot be saved: sessions of this model cannot be saved or moved"
        )
    values: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for field in _STATE[name]:
        value = getattr(layer, field, None)
        if field in _TENSOR:
            if isinstance(value, torch.Tensor):
                tensors[field] = value
        elif isinstance(value, dict):
            for state, entry in value.items():
                if isinstance(entry, torch.Tensor):
                    tensors[f"{field}.{state}"] = entry
            if field not in _TENSORS:
                values[field] = [value[state] for state in sorted(value)]
        elif isinstance(value, torch.Tensor):
            raise UnsupportedModel(f"layer {index} ({name}) keeps {field} as a tensor, which cannot be saved")
        elif value is not None:
            values[field] = value
    device = getattr(layer, "device", None)
    description = {
        "type": name,
        "initialized": bool(getattr(layer, "is_initialized", False)),
        "device": None if device is None else str(device),
        "values": values,
    }
    return description, tensors


def restore_plain(
    index: int, layer: Any, description: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device
) -> None:
    """Put a captured state into a fresh layer of the same class; the tensors are copied to ``device``.

    Raises:
        CacheError: the state is that of another class, or malformed.
    """
    name = type(layer).__name__
    if description.get("type") != name or name not in _STATE:
        raise CacheError(f"layer {index} was saved as {shorten(description.get('type'))} and is a {name} in this model")
    values = description.get("values")
    if not isinstance(values, dict) or not set(values) <= set(_STATE[name]):
        raise CacheError(f"layer {index}: unknown fields in the saved state of a {name}")
    states = getattr(layer, "number_of_states", 0)
    allowed = {field for field in _STATE[name] if field in _TENSOR}
    allowed |= {f"{field}.{state}" for field in _STATE[name] if field in _TENSORS for state in range(states)}
    if not set(tensors) <= allowed:
        raise CacheError(f"layer {index}: unexpected tensors {shorten(sorted(set(tensors) - allowed))} for a {name}")
    for field, value in values.items():
        _set_value(index, layer, field, value, states)
    for label, tensor in tensors.items():
        field, _, state = label.partition(".")
        # contiguous copies: views of a mapped file must not outlive this call
        copy = tensor.to(device, copy=True)
        if state:
            getattr(layer, field)[int(state)] = copy
        else:
            setattr(layer, field, copy)
    if description.get("initialized") is True and name != "DummyLayer":
        layer.is_initialized = True
    first = next(iter(tensors.values()), None)
    if first is not None:
        layer.dtype, layer.device = first.dtype, device
    if hasattr(layer, "_sliding_window_tensor"):
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(device)


def _set_value(index: int, layer: Any, field: str, value: Any, states: int) -> None:
    if field in _INTEGER:
        good = type(value) is int and 0 <= value < MAX_LENGTH
    elif field in _FLAG:
        good = type(value) is bool
    else:
        good = isinstance(value, list) and len(value) == states
        kinds = (bool,) if field in _FLAGS else (int, type(None))
        good = good and all(type(entry) in kinds for entry in value)
    if not good or field in (*_TENSOR, *_TENSORS):
        raise CacheError(f"layer {index}: {field} is {shorten(value)} in the saved state of a {type(layer).__name__}")
    setattr(layer, field, dict(enumerate(value)) if isinstance(value, list) else value)
