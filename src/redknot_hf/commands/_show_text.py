"""The text form of `redknot show`: tables, heat map, provenance.

Takes the plain data that `show.collect` made and the profile for the heat map; computes nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..heads import HeadProfile

__all__ = ["render", "size_text"]

_PROVENANCE = (
    "model", "model_aliases", "revision", "config_hash", "date", "method", "budget", "prefill", "seed", "source",
    "license", "imported_from", "notes",
)  # fmt: skip


def render(profile: HeadProfile, report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    from ..heads.plots import terminal_heatmap

    meta = report["metadata"]
    classes = ", ".join(f"{count} {name}" for name, count in report["classes"].items() if count)
    lines = [
        f"{_printable(meta.get('model') or 'head profile')}: {report['num_layers']} layers x {report['num_kv_heads']} "
        f"KV heads, {classes}",
        "",
        *_layer_table(report["layers"]),
        "",
        terminal_heatmap(profile),
        "",
        f"at {report['seq_len']} tokens x {report['batch']}: {report['kept_share']:.1%} of all tokens kept",
    ]
    memory = report["memory"]
    if memory:
        lines += [
            f"  KV in pages of {memory['page_size']}, {memory['dtype']}: {size_text(memory['pages'])} "
            f"({memory['share']:.1%} of dense), page tables {size_text(memory['tables'])}",
            f"  dense cache: {size_text(memory['dense'])}",
        ]
    else:
        lines += ["  bytes unknown: the profile does not record head_dim; pass --head-dim or --model"]
    if "placement" in report:
        lines += ["", *_placement_lines(report["placement"])]
    if "capacity" in report:
        lines += ["", *_capacity_lines(report["capacity"])]
    provenance = [(key, meta[key]) for key in _PROVENANCE if meta.get(key) is not None]
    if provenance:
        lines += ["", "provenance", *[f"  {key}: {_value(value)}" for key, value in provenance]]
        if report["scores"]:
            lines += [f"  scores kept: {_value(report['scores'])}"]
    if meta.get("validation"):
        lines += ["", "validation", *_tree(meta["validation"], "  ")]
    for key in ("saved", "plot"):
        if key in report:
            lines += ["", f"{key}: {report[key]}"]
    return "\n".join(lines)


def _layer_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = ["  layers   global retrieval dense local   sink        window        kept"]
    for run in runs:
        layers = str(run["first"]) if run["first"] == run["last"] else f"{run['first']}-{run['last']}"
        lines.append(
            f"  {layers:8} {run['global']:6} {run['retrieval']:9} {run['dense']:5} {run['local']:5}   "
            f"{_range(run['sink']):10}  {_range(run['window']):12}  {run['kept_share']:.1%}"
        )
    return lines


def _placement_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"over {found['world_size']} tensor-parallel ranks (largest over mean KV bytes; 1.00 is even)"]
    if found["replicas"] > 1:
        lines[0] += f", every KV head on {found['replicas']} ranks"
    for name, label in (("before", "as the model orders heads"), ("after", "after place_heads")):
        row = found[name]
        per_rank = row.get("bytes_per_rank")
        span = f": {size_text(min(per_rank))} to {size_text(max(per_rank))} per rank" if per_rank else ""
        lines.append(
            f"  {label:26} {row['imbalance']:.3f}{span}; busiest rank reads {row['decode_tokens']} tokens per step"
        )
    return [*lines, f"  {'bound for any order':26} {found['lower_bound']:.3f}"]


def _capacity_lines(found: dict[str, Any]) -> list[str]:
    taken = " and ".join(f"{name} {size_text(found[name])}" for name in ("weights", "runtime"))
    lines = [
        f"sessions on a device of {size_text(found['gpu_memory'])} ({taken} taken, {size_text(found['available'])} left for "
        f"them and a forward, activations {size_text(found['activations'])})"
    ]
    kinds = (
        ("dense", "dense", "dense"),
        ("paged", "paged", "paged, all heads"),
        ("head_aware", "head_aware", "head-aware"),
        ("separate", "head_aware", "  a cache each"),
        ("fixed", "head_aware", "  max_cache_len"),
    )
    for key, bytes_of, label in kinds:
        rest, extra = found[f"{bytes_of}_bytes"], found[f"{key}_extra"]
        lines.append(f"  {label:18} {found[key]:6}   ({size_text(rest)} each + {size_text(extra)} extra)")
    return [*lines, *[f"  assumed: {text}" for text in found["assumptions"]]]


def _tree(value: Any, indent: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{indent}{_value(value)}"]
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{_printable(key)}", *_tree(item, indent + "  ")]
        else:
            lines.append(f"{indent}{_printable(key)}: {_value(item)}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_printable(key)} {_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return _printable(value)


def _printable(value: Any) -> str:
    """Text from a file, without control characters: a stranger's file must not move the cursor."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text.encode(encoding, "replace").decode(encoding)


def _range(values: list[int]) -> str:
    if not values:
        return "-"
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def size_text(count: int) -> str:
    """Bytes with a binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
