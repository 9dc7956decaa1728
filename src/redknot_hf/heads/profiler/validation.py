"""What a head map costs: all heads together, in the mode that is deployed, against the full cache.

`measure` runs prompts under a map and returns one row per prompt; `summarise` turns rows into means with 95 % intervals
(bootstrap over prompts, Wilson for accuracies). Two modes exist and differ a lot: "full" prefills the context with full
attention and evicts before the question; "windowed" applies the windows while prefilling too, which is what
`RedKnotCache` does by default. The map is applied as a mask: exactly the keys that eviction leaves.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import RedKnotError
from ..profile import HeadProfile
from .context import ContextCache, prefill, run_suffix
from .tasks import Batch
from .visibility import HeadMap, visible_attention, windowed_handler

__all__ = [
    "PREFILL_MODES",
    "Prompts",
    "Row",
    "compare",
    "full_reference",
    "measure",
    "rounded",
    "summarise",
    "validate_profile",
    "wilson",
]

PREFILL_MODES = ("windowed", "full")


@dataclass
class Prompts:
    """A batch with what the full cache says about it.

    Attributes:
        batch: contexts and suffixes.
        cache: the contexts' KV under full attention.
        log_probs: `[targets, vocabulary]` of full attention at the target rows, row-major over (sample, row).
    """

    batch: Batch
    cache: ContextCache
    log_probs: Tensor


@dataclass(frozen=True)
class Row:
    """One prompt under one map. KL and NLL in nats per target token; `hit`: every answer token is the greedy one."""

    kind: str
    kl: float
    delta_nll: float
    top1: float
    hit: bool
    full_hit: bool


@torch.no_grad()
def full_reference(model: Any, batch: Batch) -> Prompts:
    """Prefill the contexts and record what full attention answers."""
    cache = prefill(model, batch.context, visible_attention)
    logits = run_suffix(model, cache, batch.suffix, visible_attention)
    return Prompts(batch, cache, logits[batch.target].float().log_softmax(-1))


@torch.no_grad()
def measure(model: Any, prompts: Prompts, head_map: HeadMap, mode: str) -> list[Row]:
    """Run a batch under a map.

    Args:
        model: the decoder.
        prompts: from `full_reference`.
        head_map: sinks and windows.
        mode: "windowed" or "full".

    Raises:
        RedKnotError: an unknown mode.
    """
    if mode not in PREFILL_MODES:
        raise RedKnotError(f"prefill is {mode!r}; expected one of {', '.join(map(repr, PREFILL_MODES))}")
    batch, handler = prompts.batch, windowed_handler(head_map)
    cache = prompts.cache if mode == "full" else prefill(model, batch.context, handler)
    logits = run_suffix(model, cache, batch.suffix, handler)
    return compare(logits[batch.target].float().log_softmax(-1), prompts)


def compare(log_probs: Tensor, prompts: Prompts) -> list[Row]:
    """One row per prompt from a map's log-probabilities `[targets, vocabulary]`."""
    batch, reference = prompts.batch, prompts.log_probs
    truth = batch.next_ids[batch.target][:, None]
    kl = (reference.exp() * (reference - log_probs)).sum(-1)
    delta = (reference.gather(1, truth) - log_probs.gather(1, truth))[:, 0]
    best, full_best = log_probs.argmax(-1), reference.argmax(-1)
    columns = torch.stack(
        [kl, delta, (best == full_best).float(), (best == truth[:, 0]).float(), (full_best == truth[:, 0]).float()]
    )
    parts = columns.double().cpu().split(batch.target.sum(1).tolist(), dim=1)
    return [
        Row(kind, float(part[0].mean()), float(part[1].mean()), float(part[2].mean()), *map(bool, part[3:].all(1)))
        for kind, part in zip(batch.kinds, parts, strict=True)
    ]


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile 95 % interval of the mean, resampling prompts."""
    if len(values) < 2 or not draws:
        return (min(values), max(values)) if values else (0.0, 0.0)
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def summarise(rows: Sequence[Row], draws: int = 1000) -> dict[str, Any]:
    """Means with 95 % intervals: `text` and `needle` apart.

    Args:
        rows: from `measure`.
        draws: of the bootstrap; 0 skips it and gives the range.

    Returns:
        `{"text": {"n", "kl", "kl_95", "delta_nll", "delta_nll_95", "top1"}, "needle": {"n", "kl", "kl_95", "top1",
        "accuracy", "accuracy_95", "full_accuracy"}}`; a part without prompts is left out.
    """
    out: dict[str, Any] = {}
    text = [row for row in rows if row.kind == "text"]
    needle = [row for row in rows if row.kind != "text"]
    for name, part in (("text", text), ("needle", needle)):
        if not part:
            continue
        n = len(part)
        kl = [row.kl for row in part]
        entry: dict[str, Any] = {"n": n, "kl": sum(kl) / n, "kl_95": list(bootstrap(kl, draws))}
        entry["top1"] = sum(row.top1 for row in part) / n
        if name == "text":
            delta = [row.delta_nll for row in part]
            entry["delta_nll"] = sum(delta) / n
            entry["delta_nll_95"] = list(bootstrap(delta, draws))
        else:
            hits = sum(row.hit for row in part)
            entry["accuracy"] = hits / n
            entry["accuracy_95"] = list(wilson(hits, n))
            entry["full_accuracy"] = sum(row.full_hit for row in part) / n
        out[name] = entry
    return out


def validate_profile(
    model: Any, references: Sequence[Prompts], profile: HeadProfile, mode: str, context: int, bar: Any
) -> dict[str, Any]:
    """Run all prompts under a profile and summarise.

    Returns:
        `summarise`'s object with `prefill`, `context` (tokens) and `kv_bytes_fraction` (of the full cache at that
        length).
    """
    rows: list[Row] = []
    visible = HeadMap.from_profile(profile)
    for prompts in references:
        rows += measure(model, prompts, visible, mode)
        bar.update(1)
    share = profile.kv_bytes(context, page_size=1) / profile.dense_kv_bytes(context)
    return {"prefill": mode, "context": context, "kv_bytes_fraction": round(share, 4), **rounded(summarise(rows))}


def rounded(value: Any) -> Any:
    """Floats cut to four significant digits, through lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
