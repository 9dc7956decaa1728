"""A digest of a model's weights that does not depend on how they are spread over ranks, or on the order of the heads."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..errors import UnsupportedModel
from .ranks import Ranks

__all__ = ["weights_digest"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_digest(model: torch.nn.Module, ranks: Ranks) -> str:
    """64 hex digits over the sums of all weights' bits, equal for every world size; all ranks call it.

    One pass over the weights. It tells models apart that were trained apart; it is no protection against somebody who
    constructs weights with the same sums.

    Raises:
        UnsupportedModel: weights are offloaded and cannot be read.
    """
    found: list[list[Any]] = []  # name, shape, dtype, sum of the bits
    sharded: list[int] = []
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if local.is_meta:
            raise UnsupportedModel(
                f"model: the weight {name} is offloaded and cannot be compared: leave out model (publish), or pass its "
                "config and device (fetch)"
            )
        bits = local.contiguous().view(_BITS.get(local.element_size(), torch.int8))
        if any(placement.is_shard() for placement in getattr(parameter, "placements", ())):
            sharded.append(len(found))
        found.append([name, list(parameter.shape), str(parameter.dtype), int(bits.sum(dtype=torch.int64))])
    if sharded:
        summed = ranks.total(torch.tensor([found[i][3] for i in sharded])).tolist()
        for i, total in zip(sharded, summed, strict=True):
            found[i][3] = total
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
