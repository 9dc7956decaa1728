"""The ranks of a tensor-parallel group, and short messages between them.

Messages are JSON in tensors: what comes from another rank is parsed, never unpickled. Collectives of torch.distributed
are used and nothing else, so every backend serves (gloo, NCCL).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from .. import compat
from ..errors import RedKnotError

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the heads of one model.

    Attributes:
        rank, size: which of how many.
        group: the process group of the ranks, None for the default one.
        connected: whether the ranks can talk to each other.
    """

    rank: int
    size: int
    group: Any = None
    connected: bool = False

    @classmethod
    def of(cls, rank: int, size: int, group: Any = None) -> Ranks:
        """The ranks of a cache or model that is share ``rank`` of ``size``.

        Raises:
            RedKnotError: ``group`` has another size.
        """
        if size == 1:
            return cls(rank, size)
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls(rank, size)
        found = distributed.get_world_size(group)
        if found != size:
            if group is not None:
                raise RedKnotError(f"group has {found} processes, the model's heads are spread over {size}")
            return cls(rank, size)  # data-parallel copies beside us: the caller has to say which ranks are ours
        return cls(rank, size, group, True)

    @classmethod
    def of_model(cls, config: Any, model: Any = None, group: Any = None) -> Ranks:
        """The ranks of a model, or of the model that ``config`` belongs to."""
        share = compat.config_tensor_parallel(config) if model is None else compat.tensor_parallel(model)
        return cls.of(*share, group)

    def exchange(self, value: Any) -> list[Any]:
        """What every rank gave, in the order of the ranks; all ranks call it.

        Args:
            value: anything JSON can hold.
        """
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        self.require("exchange messages")
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        device = self._device()
        length = torch.tensor([raw.numel()], dtype=torch.int64, device=device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        distributed.all_gather(lengths, length, group=self.group)
        counts = [int(n) for n in lengths]
        mine = torch.zeros(max(counts), dtype=torch.uint8, device=device)
        mine[: raw.numel()] = raw.to(device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine, group=self.group)
        texts = [part[:count].cpu().numpy().tobytes() for part, count in zip(everyone, counts, strict=True)]
        return [json.loads(text) for text in texts]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of int64 ``values``; all ranks call it."""
        if self.size == 1:
            return values
        self.require("add up")
        summed = values.to(self._device())
        distributed.all_reduce(summed, group=self.group)
        return summed.cpu()

    def require(self, what: str) -> None:
        if self.size > 1 and not self.connected:
            raise RedKnotError(
                f"rank {self.rank} of {self.size} has to {what} with the others: start the processes with torchrun, and "
                "pass group=model._device_mesh['tp'].get_group() where there are other ranks beside these"
            )

    def _device(self) -> torch.device:
        if "nccl" in str(distributed.get_backend(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
