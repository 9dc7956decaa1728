"""How the tensors of an attention module depend on the order of its heads.

Projections are head-major, so a new order of the KV heads is a gather of rows (q, k, v, their biases, attention sinks,
norms with a weight per head) and of columns (the output projection). This module finds the tensors and says what to
gather; it changes nothing and does not choose an order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RedKnotError, shorten
from ..heads.profile import HeadProfile

if TYPE_CHECKING:
    import torch

__all__ = ["attention_modules", "attention_tensors", "gather_plan"]

Plan = dict[str, tuple[int, list[int]]]


def gather_plan(tensors: Mapping[str, Any], order: Sequence[int], query_heads: int, where: str) -> Plan:
    """For every tensor of an attention module that changes: the dimension and the new order along it.

    Args:
        tensors: the module's parameters and buffers by name, e.g. "q_proj.weight"; shape and dtype are looked at.
        order: `order[p]` is the KV head that comes to position p.
        query_heads: of the module.
        where: named in errors.

    Raises:
        RedKnotError: a tensor is not understood (named), or a projection is missing.
    """
    kv_heads = len(order)
    group = query_heads // kv_heads
    query_order = [head * group + i for head in order for i in range(group)]
    width = _rows_per_head(tensors, query_heads, kv_heads)
    plan: dict[str, tuple[int, list[int]]] = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if type(tensor).__name__ == "DTensor":
            raise RedKnotError(f"{where}: {name} is sharded already; relabel the heads before sharding the model")
        # Packed integers hide the head dimension: rows may divide by the heads and still not be heads.
        plain = tensor.is_floating_point()
        found = _classify(name, shape, query_heads, kv_heads, width) if plain else None
        if found is None:
            raise RedKnotError(
                f"{where}: cannot relabel heads, because {name} of shape {list(shape)} and {tensor.dtype} is not "
                "understood "
                "(quantised weights, adapters and attention variants with further parameters are not supported)"
            )
        dim, parts = found
        index: list[int] = []
        start = 0
        for kind, size in parts:
            heads = query_order if kind == "q" else order
            index += [start + head * size + i for head in heads for i in range(size)]
            start += size * len(heads)
        if parts:
            plan[name] = (dim, index)
    missing = [n for n in ("q_proj", "k_proj", "v_proj") if f"{n}.weight" not in tensors]
    if "qkv_proj.weight" in tensors:
        missing = []
    if not any(f"{n}.weight" in tensors for n in _OUTPUT):
        missing.append("o_proj")
    if missing:
        raise RedKnotError(f"{where}: cannot relabel heads, because it has no {', '.join(missing)}")
    return plan


_OUTPUT = ("o_proj", "out_proj", "dense")


def _rows_per_head(tensors: Mapping[str, Any], query_heads: int, kv_heads: int) -> dict[str, int]:
    """Rows of the query and key projection per head; 0 where there is no such projection."""

    def rows(name: str, heads: int) -> int:
        weight = tensors.get(f"{name}.weight")
        return 0 if weight is None or not weight.shape else weight.shape[0] // heads

    fused = rows("qkv_proj", query_heads + 2 * kv_heads)
    return {"q": rows("q_proj", query_heads) or fused, "kv": rows("k_proj", kv_heads) or fused}


def _classify(
    name: str, shape: tuple[int, ...], query_heads: int, kv_heads: int, width: Mapping[str, int]
) -> tuple[int, list[tuple[str, int]]] | None:
    """How a tensor depends on the heads: (dimension, [(kind, elements per head)...]); no parts means it does not.

    None when it is not understood. Projections are head-major: all rows of head 0, then of head 1 (a gated query
    projection has twice the rows per head, still head-major).
    """
    owner, _, leaf = name.rpartition(".")
    heads = {"q_proj": query_heads, "k_proj": kv_heads, "v_proj": kv_heads}.get(owner)
    if leaf in ("weight", "bias") and len(shape) == (2 if leaf == "weight" else 1):
        if heads is not None and shape[0] % heads == 0:
            return 0, [("q" if owner == "q_proj" else "kv", shape[0] // heads)]
        if owner == "qkv_proj" and shape[0] % (query_heads + 2 * kv_heads) == 0:
            size = shape[0] // (query_heads + 2 * kv_heads)
            return 0, [("q", size), ("kv", size), ("kv", size)]
        if owner in _OUTPUT and leaf == "weight" and shape[1] % query_heads == 0:
            return 1, [("q", shape[1] // query_heads)]
        if owner in _OUTPUT and leaf == "bias":
            return 0, []
    if name == "sinks" and shape == (query_heads,):
        return 0, [("q", 1)]
    if owner in ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "v_norm") and leaf in ("weight", "bias"):
        kind = "q" if owner.startswith("q") else "kv"
        return _classify_norm(shape, kind, query_heads if kind == "q" else kv_heads, width[kind])
    return None


def _classify_norm(
    shape: tuple[int, ...], kind: str, heads: int, width: int
) -> tuple[int, list[tuple[str, int]]] | None:
    if len(shape) == 2 and shape[0] == heads:  # a row per head
        return 0, [(kind, 1)]
    if len(shape) != 1:
        return None
    if shape[0] == heads * width:  # over all heads at once: a mean of squares does not mind the order, the weight does
        return 0, [(kind, width)]
    return (0, []) if shape[0] <= width else None  # one weight per head dimension, the same for all heads


def attention_modules(model: torch.nn.Module, profile: HeadProfile) -> dict[int, torch.nn.Module]:
    """Attention modules by layer, found by their projections and `layer_idx`.

    Raises:
        RedKnotError: they are not those of the profile's attention layers.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        has_projection = any(hasattr(module, projection) for projection in ("q_proj", "qkv_proj", "k_proj"))
        if not isinstance(layer, int) or not has_projection:
            continue
        if layer in found:
            raise RedKnotError(f"two attention modules have layer_idx {layer} ({name} is the second); not supported")
        found[layer] = module
    _check_layers(set(found), profile, f"the model {type(model).__name__}")
    return found


def attention_tensors(names: Iterable[str], profile: HeadProfile, what: str) -> dict[int, dict[str, str]]:
    """Names of a checkpoint that belong to attention modules: layer -> name in the module -> name in the checkpoint.

    Raises:
        RedKnotError: they are not those of the profile's attention layers.
    """
    groups: dict[int, dict[str, str]] = {}
    prefixes: dict[int, str] = {}
    for name in names:
        match = re.fullmatch(r"((?:.*\.)?layers\.(\d+)\.(?:self_attn|attn|attention|self_attention)\.)(.+)", name)
        if match:
            layer = int(match[2])
            if prefixes.setdefault(layer, match[1]) != match[1]:
                raise RedKnotError(f"two attention modules have layer {layer}: {prefixes[layer]} and {match[1]}")
            groups.setdefault(layer, {})[match[3]] = name
    _check_layers(set(groups), profile, what)
    return groups


def _check_layers(found: set[int], profile: HeadProfile, what: str) -> None:
    expected = set(profile.attention_layers)
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise RedKnotError(
            f"cannot relabel heads: {what} shows q/k/v/o projections in {len(found)} layers, the profile has "
            f"{len(expected)} attention layers (missing {shorten(missing)}, unexpected {shorten(extra)})"
        )
