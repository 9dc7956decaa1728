"""The keys and values of one segment as the tensors of a `SegmentEntry`.

Layers of one shape lie in one tensor, ``k.<group>`` and ``v.<group>`` ``[layers, kv_heads, tokens, dim]``, so that an
entry is read, checked and sent to a GPU in a few large pieces. Keys are stored as the model made them, rotated for
the positions ``start, start + 1, ...``.

Every row of every head is kept, those of local heads too: a row is needed wherever a recomputed row lies at most a
window behind it, and which rows those are is decided for each prompt. What a prompt does not need is not copied into
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .codec import CorruptEntry, SegmentEntry
from .transfer import to_device

__all__ = ["SegmentRows", "pack", "unpack"]


class SegmentRows:
    """Views into an entry.

    Args:
        keys, values: per layer ``[kv_heads, tokens, dim]``.
        start: position of the first token when the keys were computed.
        tier: the store that the entry came from; ``"computed"`` if it was made for this prompt.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], start: int, tier: str, nbytes: int):
        self.keys, self.values, self.start, self.tier, self.nbytes = keys, values, start, tier, nbytes

    def __len__(self) -> int:
        return self.keys[0].shape[1]


def pack(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], start: int) -> SegmentEntry:
    """An entry from per-layer keys and values ``[kv_heads, tokens, dim]``."""
    shapes: dict[tuple[torch.Size, torch.Size], int] = {}
    group_of = [shapes.setdefault((k.shape, v.shape), len(shapes)) for k, v in zip(keys, values, strict=True)]
    tensors = {}
    for group in range(len(shapes)):
        members = [i for i, g in enumerate(group_of) if g == group]
        tensors[f"k.{group}"] = torch.stack([keys[i] for i in members])
        tensors[f"v.{group}"] = torch.stack([values[i] for i in members])
    return SegmentEntry(tensors, num_tokens=keys[0].shape[1], start=start, extra={"groups": group_of})


def unpack(
    entry: SegmentEntry, layers: int, tokens: int, start: int, dtype: torch.dtype, device: torch.device | str
) -> SegmentRows:
    """The rows of an entry on ``device``, after a look at everything that a prompt relies on.

    Raises:
        CorruptEntry: the entry is not what a segment of ``tokens`` tokens of this model looks like.
    """
    groups = entry.extra.get("groups")
    if entry.num_tokens != tokens or entry.start != start or not isinstance(groups, list) or len(groups) != layers:
        raise CorruptEntry(
            f"it holds {entry.num_tokens} tokens from position {entry.start} in {len(groups or [])} layers; expected "
            f"{tokens} from {start} in {layers}"
        )
    for name, tensor in entry.tensors.items():
        if tensor.dim() != 4 or tensor.shape[2] != tokens or tensor.dtype != dtype:
            raise CorruptEntry(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} with {tokens} tokens")
    stacks = to_device(entry.tensors, device)
    keys, values, taken = [], [], [0] * (len(stacks) // 2)
    try:
        for group in groups:
            keys.append(stacks[f"k.{group}"][taken[group]])
            values.append(stacks[f"v.{group}"][taken[group]])
            taken[group] += 1
    except (KeyError, IndexError, TypeError) as error:
        raise CorruptEntry(f"its layers do not agree with its tensors: {error!r}") from error
    return SegmentRows(keys, values, start, entry.tier, entry.nbytes)
