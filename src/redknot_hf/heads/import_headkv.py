"""HeadKV's retrieval-reasoning scores: a JSON object `{"layer-head": [score, ...]}` per *query* head.

That project gives every query head its own token budget; here a KV head either keeps everything or a window. A query
head's score is the mean over its list, as theirs is; a KV head's is the maximum (default) or mean over its query heads,
because one head that retrieves needs the keys of the whole group. The `fraction` highest KV heads become global. The
file names neither model nor number of KV heads, so the latter must be given.

Source: Fu et al., Not All Heads Matter, arXiv 2410.19258.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import ProfileError, shorten
from .profile import HeadProfile
from .selection import integer, select_by_score

__all__ = ["convert", "recognises"]

_KEY = re.compile(r"(\d{1,4})-(\d{1,4})")


def recognises(document: Any) -> bool:
    """An object whose first keys look like "0-0"."""
    return isinstance(document, dict) and bool(document) and all(_KEY.fullmatch(key) for key in list(document)[:8])


def convert(
    document: Any,
    num_kv_heads: int | None = None,
    fraction: float = 0.25,
    reduce: str = "max",
    sink: int = 4,
    window: int = 256,
) -> HeadProfile:
    """A profile from query-head scores.

    Args:
        document: the parsed JSON.
        num_kv_heads: KV heads of the model (8 for Llama-3-8B and Mistral-7B); divides the number of query heads.
        fraction: share of KV heads that become global.
        reduce: "max" or "mean" over the query heads of a group.
        sink: first tokens local heads keep.
        window: last tokens local heads keep.

    Raises:
        ProfileError: a missing or malformed head, named; a bad option.
    """
    if reduce not in ("max", "mean"):
        raise ProfileError(f"reduce is {shorten(reduce)}; expected 'max' or 'mean'")
    scores = _query_scores(document)
    query_heads = len(scores[0])
    if num_kv_heads is None:
        raise ProfileError(
            f"a HeadKV file scores query heads ({query_heads} per layer here) and does not say how many KV heads the "
            "model has; pass num_kv_heads="
        )
    num_kv_heads = integer(num_kv_heads, "num_kv_heads", 1, query_heads)
    if query_heads % num_kv_heads:
        raise ProfileError(f"num_kv_heads is {num_kv_heads}, which does not divide the {query_heads} query heads")
    group = query_heads // num_kv_heads
    groups = [[row[k * group : (k + 1) * group] for k in range(num_kv_heads)] for row in scores]
    kv_scores = [[max(g) if reduce == "max" else sum(g) / group for g in row] for row in groups]
    chosen = select_by_score(kv_scores, fraction=fraction)
    classes = [["global" if (l, h) in chosen else "local" for h in range(num_kv_heads)] for l in range(len(scores))]
    sink, window = integer(sink, "sink", 0), integer(window, "window", 1)
    metadata = {
        "method": "headkv retrieval-reasoning scores",
        "source": "HeadKV (arXiv 2410.19258)",
        "budget": fraction,
        "scores": {"retrieval_reasoning": kv_scores},
        "imported_from": {"format": "headkv", "query_heads_per_kv_head": group, "reduce": reduce},
    }
    return HeadProfile(len(scores), num_kv_heads, classes, sink, window, metadata)  # type: ignore[arg-type]


def _query_scores(document: Any) -> list[list[float]]:
    if not isinstance(document, dict) or not document:
        raise ProfileError(f'a HeadKV map is a JSON object {{"layer-head": [scores]}}, not {shorten(document)}')
    found: dict[tuple[int, int], float] = {}
    for key, values in document.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise ProfileError(f'the key {shorten(key)} is not "layer-head"')
        values = values if isinstance(values, list) else [values]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e12:
                raise ProfileError(f"the score {shorten(value)} of head {key} is not a number")
        if not values:
            raise ProfileError(f"head {key} has no scores")
        cell = int(match[1]), int(match[2])
        if cell in found:
            raise ProfileError(f"head {key} appears twice")
        found[cell] = sum(values) / len(values)
    layers = 1 + max(l for l, _ in found)
    heads = 1 + max(h for _, h in found)
    # Compare counts first: two far-apart keys must not make a loop over millions of absent cells.
    if len(found) != layers * heads:
        missing = next((l, h) for l in range(layers) for h in range(heads) if (l, h) not in found)
        raise ProfileError(
            f"scores for {len(found)} heads do not fill {layers} layers x {heads} query heads: "
            f"{missing[0]}-{missing[1]} is missing"
        )
    return [[found[l, h] for h in range(heads)] for l in range(layers)]
