"""DuoAttention's published gates: `full_attention_heads.tsv` (layers x KV heads) and the `config.json` beside it.

A gate near 1 means the head needs all tokens. Two ways to quantise them, as that project does:

- `threshold`: gate >= threshold is global; their config's default 0.5. On GQA models that keeps 80 to 95 % of the
  heads.
- `sparsity`: that share of the heads, those with the lowest gates, becomes local; what their paper evaluates (0.5 for
  GQA models, 0.75 for MHA). They break ties by random noise; here they go to the earlier layer and lower head.

Sink and recent size come from the config (128 and 256: the sizes the gates were trained with). The window counts the
current token. Gates slightly outside [0, 1], left by the optimiser, are clipped.

Source: Xiao et al., DuoAttention, arXiv 2410.10819.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import ProfileError, shorten
from .profile import HeadProfile
from .selection import integer, select_by_score
from .strict_json import read_bytes, read_json

__all__ = ["convert", "recognises"]

_GATES = "full_attention_heads.tsv"
_CONFIG = "config.json"


def recognises(path: Path) -> bool:
    """A directory with the gates, the gates, or the config beside them."""
    if path.is_dir():
        return (path / _GATES).is_file()
    return path.suffix.lower() == ".tsv" or (path.name == _CONFIG and (path.parent / _GATES).is_file())


def convert(
    path: Path,
    threshold: float | None = None,
    sparsity: float | None = None,
    sink: int | None = None,
    window: int | None = None,
) -> HeadProfile:
    """A profile from gates.

    Args:
        path: directory, TSV or config.
        threshold: gates at or above it are global. Default: the config's, else 0.5.
        sparsity: share of local heads, instead of a threshold. Default: the config's, usually none.
        sink: default: the config's `sink_size`; needed when there is no config.
        window: default: the config's `recent_size`; needed when there is no config.

    Raises:
        ProfileError: files missing or malformed, naming the line and column; both rules given.
    """
    if threshold is not None and sparsity is not None:
        raise ProfileError("give threshold= or sparsity=, not both")
    if not path.exists():
        raise ProfileError(f"no such file or directory: {shorten(str(path), 200)}")
    directory = path if path.is_dir() else path.parent
    gates_file = path if path.suffix.lower() == ".tsv" else directory / _GATES
    config = read_json(directory / _CONFIG) if (directory / _CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise ProfileError(f"{_CONFIG} of a DuoAttention map holds {shorten(config)}; expected an object")

    gates = _read_gates(gates_file)
    sink = _size(sink, config, "sink_size", "sink")
    window = _size(window, config, "recent_size", "window")
    if threshold is None and sparsity is None:
        sparsity = config.get("sparsity")
        if sparsity is None:
            threshold = config.get("threshold", 0.5)
    if sparsity is None:
        chosen = select_by_score(gates, threshold=threshold)
        rule: dict[str, Any] = {"threshold": threshold}
    else:
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
            raise ProfileError(f"sparsity is {shorten(sparsity)}; expected a share of local heads from 0 to 1")
        chosen = select_by_score(gates, fraction=1 - sparsity)
        rule = {"sparsity": sparsity}

    classes = [["global" if (l, h) in chosen else "local" for h in range(len(row))] for l, row in enumerate(gates)]
    metadata: dict[str, Any] = {
        "method": "duo_attention gates",
        "source": "mit-han-lab/duo-attention",
        "license": "mit",
        "scores": {"gate": gates},
        "imported_from": {"format": "duo_attention", "file": gates_file.name, **rule},
    }
    model = config.get("model_name")
    if isinstance(model, str) and model.strip("/"):
        metadata["model"] = model.rstrip("/").rsplit("/", 1)[-1]
    if isinstance(config.get("exp_name"), str):
        metadata["imported_from"]["experiment"] = config["exp_name"][:200]
    if type(config.get("seed")) is int:
        metadata["seed"] = config["seed"]
    return HeadProfile(len(gates), len(gates[0]), classes, sink, window, metadata)  # type: ignore[arg-type]


def _read_gates(path: Path) -> list[list[float]]:
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ProfileError(f"{path.name} is not UTF-8 text") from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = []
        for column, text in enumerate(line.split(), 1):
            try:
                gate = float(text)
            except ValueError:
                gate = math.nan
            # The optimiser overshoots by thousandths; anything far outside is some other table.
            if not -0.5 <= gate <= 1.5:
                raise ProfileError(
                    f"{path.name}, line {number}, column {column} is {shorten(text)}; expected a gate from 0 to 1"
                )
            row.append(min(1.0, max(0.0, gate)))
        if rows and len(row) != len(rows[0]):
            raise ProfileError(f"{path.name}, line {number} has {len(row)} gates; the lines above have {len(rows[0])}")
        rows.append(row)
    if not rows:
        raise ProfileError(f"{path.name} is empty; expected one line of gates per layer")
    return rows


def _size(given: int | None, config: dict[str, Any], key: str, name: str) -> int:
    value = given if given is not None else config.get(key)
    if value is None:
        raise ProfileError(f"no {_CONFIG} with {key!r} beside the gates; pass {name}=")
    return integer(value, name if given is not None else f"{_CONFIG}: {key}", 1 if name == "window" else 0)
