"""Reads the RedKnot authors' five ``sparse_ffn_params`` files (Apache-2.0, rednote-machine-learning/RedKnot).

Three of them (Llama 70B, Mistral 7B, Qwen3 32B) give thresholds of cumulative mass of the attention-output norm. Two
(Qwen3.5) give a multiple of the mean attention mass under which a token skips the routed experts. What a schedule
cannot say of a file is listed in the schedule's `notes`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import RedKnotError, shorten
from ..heads.strict_json import read_json
from .schedule import Band, SparseFFNSchedule

__all__ = ["read_parameters"]

logger = logging.getLogger(__name__)

_MASS = {"dense_until", "mass_thresh", "deep_layer_start", "mass_thresh_deep", "recent_n"}
_MASS_OPTIONAL = {"local_window"}
_MOE = {"method", "deep_moe_start_layer", "mass_thresh"}
_MOE_METHOD = "deep_token_sparse_by_attention_mass"


def read_parameters(path: Any) -> SparseFFNSchedule:
    """The schedule in one parameter file.

    Raises:
        RedKnotError: no such file, not a file of this kind, or a value out of range.
    """
    path = Path(path)
    data = read_json(path)
    if not isinstance(data, dict):
        raise RedKnotError(f"{path.name}: expected a JSON object, found {type(data).__name__}")
    if data.keys() >= _MASS and data.keys() <= _MASS | _MASS_OPTIONAL:
        return _with_notes(_of_mass(data, path), path)
    moe = data.get("moe")
    if isinstance(moe, dict) and moe.get("method") == _MOE_METHOD and moe.keys() >= _MOE:
        return _with_notes(_of_moe(data, moe, path), path)
    missing = sorted(_MASS - data.keys())
    unknown = sorted(data.keys() - _MASS - _MASS_OPTIONAL)
    why = f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(map(shorten, unknown))}"
    raise RedKnotError(
        f"{path.name}: not a sparse_ffn_params file of the RedKnot authors: {why}, and has no 'moe' entry with the method "
        f"{_MOE_METHOD!r}"
    )


def _of_mass(data: dict[str, Any], path: Path) -> SparseFFNSchedule:
    first, deep = _layer(data, "dense_until", path), _layer(data, "deep_layer_start", path)
    if deep < first:
        raise RedKnotError(f"{path.name}: deep_layer_start={deep} lies before dense_until={first}")
    notes: tuple[str, ...] = ()
    if "local_window" in data:
        notes = (f"local_window={data['local_window']} is about attention heads, not about FFNs",)
    return SparseFFNSchedule(
        mass=_share(data, "mass_thresh", path),
        first_layer=first,
        bands=(Band(deep, mass=_share(data, "mass_thresh_deep", path)),),
        recent=_layer(data, "recent_n", path),
        importance="attention_norm",
        name=f"redknot-{path.stem}",
        notes=notes,
    )


def _of_moe(data: dict[str, Any], moe: dict[str, Any], path: Path) -> SparseFFNSchedule:
    return SparseFFNSchedule(
        above_mean=_share(moe, "mass_thresh", path),
        first_layer=_layer(moe, "deep_moe_start_layer", path),
        importance="received_attention",
        name=f"redknot-{path.stem}",
        notes=(
            "the authors still run the shared expert on skipped rows; here these rows skip the whole block",
            "the authors take the attention mass from the deep half of the layers; here each layer uses its own",
            "the linear-attention windows of this file are not part of the FFN schedule",
        ),
    )


def _with_notes(schedule: SparseFFNSchedule, path: Path) -> SparseFFNSchedule:
    for note in schedule.notes:
        logger.warning("%s: %s", path.name, note)
    return schedule


def _layer(data: dict[str, Any], name: str, path: Path) -> int:
    value = data[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 100_000:
        raise RedKnotError(f"{path.name}: {name}={shorten(value)}: expected a whole number, 0 or more")
    return value


def _share(data: dict[str, Any], name: str, path: Path) -> float:
    value = data[name]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise RedKnotError(f"{path.name}: {name}={shorten(value)}: expected a number from 0 to 1")
    return float(value)
