"""MInference's best-pattern JSON: a list with one object per layer, `{"query head": [pattern, a, b, score]}`.

MInference sparsifies the *prefill* per query head and keeps every key; so only one of its patterns says that a head can
do without far tokens:

- `stream_llm` (A-shape): the query sees `a` first and `b` last tokens. A KV head all of whose query heads are A-shaped
  becomes local, with the largest sink and window among them.
- `vertical_and_slash`, `block_sparse`: which far keys count is decided at run time, per prompt, from the whole
  context. A KV head with one such query head keeps everything: global. Their sizes and all scores are not used.

Any other pattern name is refused. Published files hold few A-shape heads, so the result usually saves little memory: it
carries over what the file says, not what the model could do. No published file was at hand when this was written; the
form is that of the project's documentation and of its `best_pattern` reader.

Source: Jiang et al., MInference 1.0, arXiv 2407.02490.
"""

from __future__ import annotations

from typing import Any

from ..errors import ProfileError, shorten
from .profile import HeadProfile
from .selection import integer

__all__ = ["convert", "recognises"]

_STREAMING = "stream_llm"
_PATTERNS = (_STREAMING, "vertical_and_slash", "block_sparse")


def recognises(document: Any) -> bool:
    """A list of objects whose values are lists that begin with a name."""
    if not isinstance(document, list) or not document or not isinstance(document[0], dict):
        return False
    first = next(iter(document[0].values()), None)
    return isinstance(first, list) and bool(first) and isinstance(first[0], str)


def convert(document: Any, num_kv_heads: int | None = None) -> HeadProfile:
    """A profile from prefill patterns.

    Args:
        document: the parsed JSON.
        num_kv_heads: KV heads of the model; divides the number of query heads.

    Raises:
        ProfileError: an unknown pattern, a missing head or a malformed cell, named; no `num_kv_heads`.
    """
    if not isinstance(document, list) or not document:
        raise ProfileError(f"a MInference map is a JSON list with one object per layer, not {shorten(document)}")
    layers = [_layer(row, l) for l, row in enumerate(document)]
    query_heads = len(layers[0])
    for l, row in enumerate(layers):
        if len(row) != query_heads:
            raise ProfileError(f"layer {l} has {len(row)} query heads; layer 0 has {query_heads}")
    if num_kv_heads is None:
        raise ProfileError(
            f"a MInference file lists query heads ({query_heads} per layer here) and does not say how many KV heads "
            "the model has; pass num_kv_heads="
        )
    num_kv_heads = integer(num_kv_heads, "num_kv_heads", 1, query_heads)
    if query_heads % num_kv_heads:
        raise ProfileError(f"num_kv_heads is {num_kv_heads}, which does not divide the {query_heads} query heads")
    group = query_heads // num_kv_heads

    classes, sinks, windows = [], [], []
    for row in layers:
        groups = [row[k * group : (k + 1) * group] for k in range(num_kv_heads)]
        local = [all(reach is not None for reach in g) for g in groups]
        classes.append(["local" if streaming else "global" for streaming in local])
        sinks.append(
            [
                max(reach[0] for reach in g if reach) if streaming else 0
                for g, streaming in zip(groups, local, strict=True)
            ]
        )
        windows.append(
            [
                max(reach[1] for reach in g if reach) if streaming else 0
                for g, streaming in zip(groups, local, strict=True)
            ]
        )
    metadata = {
        "method": "minference A-shape heads",
        "source": "MInference (arXiv 2407.02490)",
        "imported_from": {"format": "minference", "query_heads_per_kv_head": group},
    }
    return HeadProfile(len(layers), num_kv_heads, classes, sinks, windows, metadata)


def _layer(row: Any, l: int) -> list[tuple[int, int] | None]:
    """Per query head: (sink, window) of an A-shape, None of a pattern that needs all keys."""
    if not isinstance(row, dict) or not row:
        raise ProfileError(f"layer {l} is {shorten(row)}; expected an object of query heads")
    reaches: list[tuple[int, int] | None] = []
    for h in range(len(row)):
        cell = row.get(str(h))
        where = f"layer {l}, head {h}"
        if cell is None:
            raise ProfileError(f"{where} is missing; expected heads 0 to {len(row) - 1}")
        if not isinstance(cell, list) or len(cell) not in (3, 4) or cell[0] not in _PATTERNS:
            name = cell[0] if isinstance(cell, list) and cell else cell
            raise ProfileError(
                f"{where} is {shorten(name)}; expected [pattern, size, size, score] with a pattern of "
                f"{', '.join(map(repr, _PATTERNS))}"
            )
        sizes = [integer(cell[i], f"{where}, size {i}", 0) for i in (1, 2)]
        if cell[0] != _STREAMING:
            reaches.append(None)
        else:
            reaches.append((sizes[0], integer(cell[2], f"{where}, window", 1)))
    return reaches
