"""Head-class JSON of the RedKnot authors' SGLang fork.

What the format means, as its own loader treats it:

- `kv_head_classification[L][H]`: local, global, retrieval, dense, and older names of local.
- `kv_head_max_distance[L][H]`: window of a local head; anything else on other heads is stale and ignored. A local head
  with a distance below 1 takes the file's `window`, or 512.
- `kv_head_sink_size[L][H]`: may be missing; then `sink_size`, or 4.
- `dense_prefix_layers`: the first rows are dense whatever the matrix says.
- `full_attention_layers`: in hybrids, row i belongs to this layer; the other layers have no KV.

Refused by name: maps of MLA models (DeepSeek-V4), whose query heads share one latent KV, so that no head can evict
alone; per-layer indexer budgets; sparse-FFN schedules; descriptions of a rule that name no head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import ProfileError, shorten
from .profile import HEAD_CLASSES, HeadProfile
from .selection import integer

__all__ = ["convert", "recognises"]

_ALIASES = {"local_full": "local", "limited": "local", "streaming": "local", "sink_dominant": "local"}
_DEFAULT_WINDOW = 512
_DEFAULT_SINK = 4
_MATRIX = "kv_head_classification"
_OWN_KEYS = {_MATRIX, "mla_head_classification", "index_topk_per_layer", "head_map", "full_attention_layers"}
_FFN_KEYS = {"mass_thresh", "dense_until", "linear_attention"}


def recognises(document: Any) -> bool:
    """True for every kind of file of that project, also those `convert` refuses: the refusal says why."""
    if not isinstance(document, dict):
        return False
    return bool(_OWN_KEYS & document.keys() or _FFN_KEYS & document.keys()) or "component" in document


def convert(document: Any, num_layers: int | None = None, attention_layers: Sequence[int] | None = None) -> HeadProfile:
    """A profile from the parsed file.

    Args:
        document: the parsed JSON.
        num_layers: decoder layers of the model. Needed for a hybrid whose last layer is not an attention layer, because
            the file lists attention layers only.
        attention_layers: which layers have KV, for files that do not say.

    Raises:
        ProfileError: refused (see the module's text) or malformed, naming the cell.
    """
    if not isinstance(document, dict):
        raise ProfileError(f"a RedKnot head map is a JSON object, not {shorten(document)}")
    _refuse_other_kinds(document)
    if _MATRIX not in document:
        return _from_query_heads(document, attention_layers)

    classes = _matrix(document, _MATRIX)
    rows, heads = len(classes), len(classes[0])
    for key, found in (("num_layers", rows), ("num_kv_heads", heads)):
        if document.get(key, found) != found:
            raise ProfileError(f"{_MATRIX} is {rows} x {heads}, but the file's {key} is {shorten(document[key])}")
    window = integer(document.get("window", _DEFAULT_WINDOW), "window", 1)
    sink = integer(document.get("sink_size", _DEFAULT_SINK), "sink_size", 0)
    dense_rows = integer(document.get("dense_prefix_layers") or 0, "dense_prefix_layers", 0)
    distances = _matrix(document, "kv_head_max_distance", (rows, heads))
    sinks = _matrix(document, "kv_head_sink_size", (rows, heads))

    named = [[_class_of(name, l, h) for h, name in enumerate(row)] for l, row in enumerate(classes)]
    named = [["dense"] * heads if l < dense_rows else row for l, row in enumerate(named)]
    stale = 0
    head_sinks = [[0] * heads for _ in range(rows)]
    head_windows = [[0] * heads for _ in range(rows)]
    for l, row in enumerate(named):
        for h, name in enumerate(row):
            distance = window if distances is None else integer(distances[l][h], f"kv_head_max_distance[{l}][{h}]", -1)
            if name == "local":
                head_windows[l][h] = distance if distance > 0 else window
                head_sinks[l][h] = sink if sinks is None else integer(sinks[l][h], f"kv_head_sink_size[{l}][{h}]", 0)
            elif distances is not None and distance > 0:
                stale += 1

    layers = _layers(document.get("full_attention_layers", attention_layers), rows)
    metadata = _metadata(document, {"stale_distances_ignored": stale} if stale else {})
    if dense_rows:
        metadata["imported_from"]["dense_prefix_layers"] = dense_rows
    if layers is None:
        if num_layers is not None and num_layers != rows:
            raise ProfileError(
                f"the file has {rows} rows for num_layers={shorten(num_layers)} layers and does not say which layers "
                "they belong to; pass attention_layers="
            )
        return HeadProfile(rows, heads, named, head_sinks, head_windows, metadata)
    total = layers[-1] + 1 if num_layers is None else integer(num_layers, "num_layers", layers[-1] + 1, 10_000)
    return _spread(layers, total, heads, named, head_sinks, head_windows, metadata)


def _from_query_heads(document: dict[str, Any], attention_layers: Sequence[int] | None) -> HeadProfile:
    """`head_map[L][query head]` of booleans over all layers; only attention layers mean KV."""
    if "head_map" not in document:
        raise ProfileError(
            "this RedKnot file describes how to choose heads but lists none (no kv_head_classification); import the "
            "file of the same model whose name ends in _server.json"
        )
    flags = _matrix(document, "head_map")
    kv_heads = integer(document.get("num_kv_heads"), "num_kv_heads", 1, len(flags[0]))
    layers = _layers(document.get("full_attention_layers", attention_layers), None)
    if layers is None:
        raise ProfileError(
            "this RedKnot head_map has a row for every layer and does not say which of them are attention layers (the "
            "rest is linear attention, which has no KV); pass attention_layers=, e.g. range(3, 40, 4)"
        )
    if len(flags[0]) % kv_heads or layers[-1] >= len(flags):
        raise ProfileError(
            f"head_map is {len(flags)} layers x {len(flags[0])} query heads; that does not fit "
            f"num_kv_heads={kv_heads} and attention_layers up to {layers[-1]}"
        )
    group = len(flags[0]) // kv_heads
    params = document.get("params")
    params = params if isinstance(params, dict) else {}
    window = integer(params.get("full_window_size", _DEFAULT_WINDOW), "params.full_window_size", 1)
    named = []
    for l in layers:
        for h, flag in enumerate(flags[l]):
            if not isinstance(flag, bool):
                raise ProfileError(f"head_map[{l}][{h}] is {shorten(flag)}; expected true (global) or false (local)")
        # One query head that needs far tokens keeps them for its whole group.
        named.append(["global" if any(flags[l][k * group : (k + 1) * group]) else "local" for k in range(kv_heads)])
    sinks = [[_DEFAULT_SINK] * kv_heads for _ in named]
    windows = [[window] * kv_heads for _ in named]
    metadata = _metadata(document, {"query_heads_per_kv_head": group, "rule": "global when any query head is"})
    return _spread(layers, len(flags), kv_heads, named, sinks, windows, metadata)


def _refuse_other_kinds(document: dict[str, Any]) -> None:
    if "mla_head_classification" in document:
        raise ProfileError(
            "this RedKnot file classifies the query heads of an MLA model (DeepSeek-V4: "
            f"physical_kv_heads={shorten(document.get('physical_kv_heads', 1))}); all of them read one latent KV, so "
            "dropping tokens for one head would drop them for all: such maps cannot be expressed per KV head"
        )
    if "index_topk_per_layer" in document:
        raise ProfileError("this RedKnot file sets the top-k of DeepSeek-V4's indexer per layer; it is not a head map")
    if _MATRIX not in document and (_FFN_KEYS & document.keys() or document.get("component") == "linear_attention"):
        raise ProfileError("this RedKnot file is a sparse-FFN or linear-attention schedule; it is not a head map")


def _matrix(document: dict[str, Any], key: str, shape: tuple[int, int] | None = None) -> Any:
    """A checked list of equally long rows, or None for an optional matrix that is absent or null."""
    rows = document.get(key)
    if rows is None and shape is not None:
        return None
    if not isinstance(rows, list) or not rows:
        raise ProfileError(f"{key} is {shorten(rows)}; expected a list of rows, one per layer")
    width = shape[1] if shape else len(rows[0]) if isinstance(rows[0], list) else 0
    if shape and len(rows) != shape[0]:
        raise ProfileError(f"{key} has {len(rows)} rows; expected {shape[0]}")
    for l, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width or not row:
            raise ProfileError(f"{key}[{l}] is {shorten(row)}; expected a list of {width or 'some'} entries")
    return rows


def _class_of(name: Any, l: int, h: int) -> str:
    found = _ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(found, str) or found not in HEAD_CLASSES:
        expected = ", ".join(map(repr, (*HEAD_CLASSES, *_ALIASES)))
        raise ProfileError(f"{_MATRIX}[{l}][{h}] is {shorten(name)}; expected one of {expected}")
    return found


def _layers(value: Any, rows: int | None) -> list[int] | None:
    if value is None:
        return None
    what = "full_attention_layers"
    if isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__"):
        raise ProfileError(f"{what} is {shorten(value)}; expected increasing layer numbers")
    layers = [integer(layer, f"{what}[{i}]", 0, 10_000) for i, layer in enumerate(value)]
    if not layers or sorted(set(layers)) != layers or (rows is not None and len(layers) != rows):
        count = "" if rows is None else f"{rows} "
        raise ProfileError(f"{what} is {shorten(value)}; expected {count}increasing layer numbers")
    return layers


def _spread(
    layers: list[int],
    num_layers: int,
    num_kv_heads: int,
    classes: list[list[str]],
    sinks: list[list[int]],
    windows: list[list[int]],
    metadata: dict[str, Any],
) -> HeadProfile:
    """Put the rows of attention layers at their layers; the rows between them are never read."""
    full_classes = [["global"] * num_kv_heads for _ in range(num_layers)]
    full_sinks = [[0] * num_kv_heads for _ in range(num_layers)]
    full_windows = [[0] * num_kv_heads for _ in range(num_layers)]
    for row, layer in enumerate(layers):
        full_classes[layer], full_sinks[layer], full_windows[layer] = classes[row], sinks[row], windows[row]
    if len(layers) < num_layers:
        metadata["attention_layers"] = layers
    return HeadProfile(num_layers, num_kv_heads, full_classes, full_sinks, full_windows, metadata)


def _metadata(document: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    def text(key: str) -> str | None:
        value = document.get(key)
        return value[:500] if isinstance(value, str) and value else None

    model = text("hf_repo") or text("model")
    head_dim = document.get("head_dim")
    found: dict[str, Any] = {
        "model": model if model and re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", model) else None,
        "model_type": text("model_type"),
        "method": f"redknot: {text('method')}" if text("method") else "redknot",
        "source": "rednote-machine-learning/RedKnot",
        "head_dim": head_dim if type(head_dim) is int and head_dim > 0 else None,
        "notes": text("rationale") or text("notes") or text("comment"),
        "imported_from": notes,
    }
    if "retrieval_top_p" in document and isinstance(document["retrieval_top_p"], float):
        found["retrieval_top_p"] = document["retrieval_top_p"]
    return {key: value for key, value in found.items() if value is not None}
