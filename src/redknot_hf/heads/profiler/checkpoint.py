"""State of an interrupted profiling run: one safetensors file, rewritten after every unit of work.

A unit is one scored batch, a few gate steps or a round of the search. The file carries a fingerprint of everything that
fixes the numbers (model shape and weights, tokenizer, texts, all arguments), so a run never continues from another run's
state. No pickle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import RedKnotError

__all__ = ["Checkpoint"]


class Checkpoint:
    """Named tensors and a JSON note, saved atomically; without a path it only remembers.

    Args:
        path: file to read and to write; None keeps nothing on disk.
        fingerprint: of the run.

    Raises:
        RedKnotError: the file exists and is another run's, or is not such a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint
        self.tensors: dict[str, Tensor] = {}
        self.note: dict[str, Any] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            self.note = json.loads(metadata["note"])
            found = metadata["fingerprint"]
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise RedKnotError(
                f"checkpoint {str(self.path)!r} is not a profiler checkpoint ({error}); delete it"
            ) from error
        if found != fingerprint:
            raise RedKnotError(
                f"checkpoint {str(self.path)!r} belongs to a run with another model or other arguments; delete it "
                "or pass another path"
            )

    def save(self) -> None:
        """Write the state; a crash while writing leaves the previous file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        tensors = {key: value.contiguous().cpu() for key, value in self.tensors.items()} or {"empty": torch.zeros(1)}
        save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint, "note": json.dumps(self.note)})
        os.replace(temporary, self.path)

    def remove(self) -> None:
        """Delete the file of a finished run."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
