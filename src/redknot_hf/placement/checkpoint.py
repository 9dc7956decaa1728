"""Relabel a checkpoint on disk, file by file: no model is built, and one file is in memory at a time.

The result is an ordinary checkpoint folder. `from_pretrained` loads it under any tensor-parallel plan, so the relabelling
costs nothing afterwards; its config remembers the order of the heads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RedKnotError
from ..heads.model_shape import model_shape
from ..heads.order import config_order, set_config_order
from .placing import HeadPlacement
from .weights import attention_tensors, gather_plan

__all__ = ["relabel_checkpoint"]

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def relabel_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], placement: HeadPlacement
) -> Path:
    """Write the checkpoint at ``source`` to ``target`` with its heads in the order of ``placement``.

    Args:
        source: folder of a transformers checkpoint with safetensors files.
        target: a folder that does not exist yet, or is empty. Files that do not depend on the heads (tokenizer,
            generation config) are copied.
        placement: made for the model's profile, e.g. ``place_heads(profile, 4)``.

    Returns:
        The target folder.

    Raises:
        RedKnotError: the folders do not fit, or a tensor of the attention is not understood (named). Nothing is written
            then.

    Example:
        >>> relabel_checkpoint("Llama-3.1-8B-Instruct", "Llama-3.1-8B-TP4", place_heads(profile, 4))
    """
    from transformers import AutoConfig

    source, target = Path(source), Path(target)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise RedKnotError(f"source: {source} has no *.safetensors files; save the model with save_pretrained first")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RedKnotError(f"target: {target} exists and is not an empty folder")
    config = AutoConfig.from_pretrained(source)
    placement.source.validate_for(config)
    if config_order(config) is not None:
        raise RedKnotError(f"source: the heads of {source} were relabelled before; start from the original checkpoint")
    plans = _plans(files, placement, model_shape(config).num_attention_heads, str(source))

    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        _rewrite(file, target / file.name, plans)
    for other in source.iterdir():
        if other.is_file() and other not in files and other.suffix not in _OTHER_WEIGHTS:
            shutil.copy2(other, target / other.name)
    set_config_order(config, placement.permutation)
    config.save_pretrained(target)
    return target


class _Shape:
    """What `gather_plan` looks at, without the bytes."""

    def __init__(self, shape: list[int], dtype: str):
        self.shape, self.dtype = tuple(shape), dtype

    def is_floating_point(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


def _plans(
    files: list[Path], placement: HeadPlacement, query_heads: int, what: str
) -> dict[str, tuple[int, list[int]]]:
    """For every tensor of the checkpoint that changes: the dimension and the order along it."""
    shapes = {name: shape for file in files for name, shape in _shapes(file)}
    plans: dict[str, tuple[int, list[int]]] = {}
    for layer, names in attention_tensors(shapes, placement.source, what).items():
        tensors = {name: shapes[key] for name, key in names.items()}
        plan = gather_plan(tensors, placement.permutation[layer], query_heads, f"layer {layer}")
        plans.update({names[name]: found for name, found in plan.items()})
    return plans


def _shapes(file: Path) -> Iterator[tuple[str, _Shape]]:
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            raise RedKnotError(f"source: {file} is not a safetensors file")
        header: dict[str, Any] = json.loads(stream.read(length))
    for name, row in header.items():
        if name != "__metadata__":
            yield name, _Shape(row["shape"], row["dtype"])


def _rewrite(source: Path, target: Path, plans: dict[str, tuple[int, list[int]]]) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as opened:
        tensors = {}
        for name in opened.keys():  # noqa: SIM118  # a safetensors handle, not a dictionary
            tensor = opened.get_tensor(name)
            if name in plans:
                dim, index = plans[name]
                tensor = tensor.index_select(dim, torch.tensor(index))
            tensors[name] = tensor
        save_file(tensors, target, metadata=opened.metadata())
