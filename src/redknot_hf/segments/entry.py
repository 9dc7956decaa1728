"""The keys and values of one segment as the tensors of a `SegmentEntry`.

Layers of one shape lie in one tensor, ``k.<group>`` and ``v.<group>`` ``[layers, kv_heads, tokens, dim]``, so that an
entry is read, checked and sent to a GPU in a few large pieces. Keys are stored as the model made them, rotated for
the positions ``start, start + 1, ...``.

Every row of every head is kept, those of local heads too: a row is needed wherever a recomputed row lies at most a
window behind it, and which rows those are is decided for each prompt. What a prompt does not need is not copied into
it.

An entry may be kept in int8, at half the bytes or less: each row of each head is divided by a scale of its own and
rounded. ``s.<group>`` float32 ``[layers, kv_heads, tokens, 2]`` holds the scales of keys and of values; rows are multiplied
out where they are placed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import RedKnotError, shorten
from ..paging.freezing import quantised
from .codec import CorruptEntry, SegmentEntry
from .transfer import Upload

__all__ = ["SegmentRows", "in_int8", "inspect", "pack", "unpack"]


class SegmentRows:
    """Views into an entry.

    Args:
        stacks: ``k.<group>`` and ``v.<group>`` ``[layers of the group, kv_heads, tokens, dim]``; in int8 their scales, too.
        groups: per layer the group that it belongs to; layers of a group lie in order.
        start: position of the first token when the keys were computed.
        tier: the store that the entry came from; ``"computed"`` if it was made for this prompt.
        nbytes: of the entry.
        upload: what brings the tensors to the GPU: a layer is there after ``upload.need(layer)``.
    """

    def __init__(
        self,
        stacks: dict[str, torch.Tensor],
        groups: Sequence[int],
        start: int,
        tier: str,
        nbytes: int,
        upload: Upload | None = None,
    ):
        self.upload = upload
        self.stacks, self.start, self.tier, self.nbytes = stacks, start, tier, nbytes
        self.where = _where(tuple(groups))
        self._tokens = next(iter(stacks.values())).shape[2]

    def __len__(self) -> int:
        return self._tokens

    @property
    def quantised(self) -> bool:
        """Whether the rows are kept in int8."""
        return "s.0" in self.stacks

    def key(self, layer: int) -> torch.Tensor:
        """``[kv_heads, tokens, dim]``; float32 if they are kept in int8."""
        return self._part("k", layer, 0)

    def value(self, layer: int) -> torch.Tensor:
        """``[kv_heads, tokens, dim]``; float32 if they are kept in int8."""
        return self._part("v", layer, 1)

    def _part(self, part: str, layer: int, which: int) -> torch.Tensor:
        group, index = self.where[layer]
        stored = self.stacks[f"{part}.{group}"][index]
        scales = self.stacks.get(f"s.{group}")
        return stored if scales is None else stored.float() * scales[index][..., which, None]

    def shapes(self) -> list[tuple[int, int, int]]:
        """Per layer (kv_heads, key dim, value dim)."""
        return _shapes(self.stacks, [group for group, _ in self.where])


@functools.lru_cache(maxsize=256)
def _where(groups: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Of each layer its group and its place in that group; the same for every segment of a model."""
    taken: dict[int, int] = {}
    where = []
    for group in groups:
        where.append((group, taken.setdefault(group, 0)))
        taken[group] += 1
    return tuple(where)


def _shapes(stacks: dict[str, torch.Tensor], groups: Sequence[int]) -> list[tuple[int, int, int]]:
    """Per layer (kv_heads, key dim, value dim)."""
    found = {}
    for group in set(groups):
        k, v = stacks[f"k.{group}"].shape, stacks[f"v.{group}"].shape
        found[group] = (k[1], k[3], v[3])
    return [found[group] for group in groups]


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


def in_int8(entry: SegmentEntry) -> SegmentEntry:
    """What `pack` made, with a scale for each row of each head.

    Raises:
        RedKnotError: a row holds something that is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    halves: dict[str, list[torch.Tensor]] = {}  # keys come first
    for name, tensor in sorted(entry.tensors.items()):
        part, _, group = name.partition(".")
        rows = tensor.float().reshape(-1, 1, tensor.shape[-1])
        stored, scales = quantised(rows, torch.ones_like(rows[..., 0], dtype=torch.bool), torch.int8)
        if not bool(torch.isfinite(scales).all()):
            kind = "keys" if part == "k" else "values"
            raise RedKnotError(f"kv_dtype='int8': some {kind} are not finite, so they cannot be kept so; leave it out")
        tensors[name] = stored.view(torch.int8).view(tensor.shape)
        halves.setdefault(f"s.{group}", []).append(scales.view(tensor.shape[:-1]))
    tensors.update((name, torch.stack(both, -1)) for name, both in halves.items())
    return replace(entry, tensors=tensors)


def unpack(entries: Sequence[SegmentEntry], upload: Upload) -> list[SegmentRows]:
    """The rows of entries that `inspect` has passed, as ``upload`` brings them."""
    return [
        SegmentRows(found, entry.extra["groups"], entry.start, entry.tier, entry.nbytes, upload)
        for found, entry in zip(upload.stacks, entries, strict=True)
    ]


def inspect(
    entry: SegmentEntry,
    shapes: Sequence[tuple[int, int, int]] | int,
    tokens: int,
    start: int,
    dtype: torch.dtype,
    in_int8: bool = False,
) -> None:
    """Look at everything that a prompt relies on.

    Args:
        shapes: per layer (kv_heads, key dim, value dim) of the model, or only the number of layers.
        dtype: of the model.
        in_int8: what `in_int8` makes is expected.

    Raises:
        CorruptEntry: the entry is not what a segment of ``tokens`` tokens of this model looks like.
    """
    layers = shapes if isinstance(shapes, int) else len(shapes)
    groups = entry.extra.get("groups")
    if entry.num_tokens != tokens or entry.start != start or not isinstance(groups, list) or len(groups) != layers:
        raise CorruptEntry(
            f"it holds {shorten(entry.num_tokens)} tokens from position {shorten(entry.start)} in layers "
            f"{shorten(groups)}; expected "
            f"{tokens} from {start} in {layers}"
        )
    for name, tensor in entry.tensors.items():
        scales = in_int8 and name.startswith("s.")
        stored = torch.float32 if scales else torch.int8 if in_int8 else dtype
        if tensor.dim() != 4 or tensor.shape[2] != tokens or tensor.dtype != stored:
            raise CorruptEntry(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {stored} with {tokens} tokens")
    parts = "kvs" if in_int8 else "kv"
    counts = [groups.count(group) for group in range(len(entry.tensors) // len(parts))]
    expected = {f"{part}.{group}": count for group, count in enumerate(counts) for part in parts}
    found = {name: tensor.shape[0] for name, tensor in entry.tensors.items()}
    if found != expected or sum(counts) != layers or any(type(group) is not int for group in groups):
        raise CorruptEntry(f"its layers do not agree with its tensors: {shorten(groups)}, {shorten(found)}")
    if any(entry.tensors[f"k.{g}"].shape[1] != entry.tensors[f"v.{g}"].shape[1] for g in range(len(counts))):
        raise CorruptEntry("keys and values have different numbers of heads")
    if in_int8:
        for group in range(len(counts)):
            if entry.tensors[f"s.{group}"].shape != (*entry.tensors[f"k.{group}"].shape[:3], 2):
                raise CorruptEntry(f"k.{group} and its scales do not agree")
    if not isinstance(shapes, int):
        found_shapes = _shapes(entry.tensors, groups)
        if found_shapes != list(shapes):
            raise CorruptEntry(f"its layers have (heads, dims) {found_shapes[0]}, the model has {shapes[0]}")
