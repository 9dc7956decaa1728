"""Keys and values of one layer whose heads keep different numbers of tokens, as flat tensors of a `SegmentEntry`.

For layer i an entry holds
    layer.{i}.k, layer.{i}.v   [T, D]  rows of head 0, then head 1, ...; T = sum of the counts (K and V may differ in D)
    layer.{i}.pos              [T]     int32 request position of each row when it was computed
    layer.{i}.count            [H]     int32 rows of each KV head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from redknot_hf.errors import RedKnotError
from redknot_hf.segments.codec import CorruptEntry, SegmentEntry

__all__ = ["LayerRows", "pack_layer", "unpack_layer"]


class LayerRows(NamedTuple):
    """Rows of one layer, one tensor per KV head h: `keys[h]`, `values[h]` [n_h, D] and `positions[h]` [n_h] int32."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    positions: list[torch.Tensor]


def pack_layer(
    layer: int,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors of one layer for `SegmentEntry.tensors`.

    Args:
        layer: layer index.
        keys, values: per KV head `[n_h, D]`; `n_h` may differ and may be 0.
        positions: per KV head `[n_h]` integer request positions.

    Raises:
        RedKnotError: if the three do not agree in heads or rows.
    """
    counts = [k.shape[0] for k in keys]
    if counts != [v.shape[0] for v in values] or counts != [p.numel() for p in positions]:
        raise RedKnotError(
            f"layer {layer}: keys, values and positions disagree about the rows per head: {counts}, "
            f"{[v.shape[0] for v in values]}, {[p.numel() for p in positions]}"
        )
    prefix = f"layer.{layer}."
    return {
        prefix + "k": torch.cat(list(keys)),
        prefix + "v": torch.cat(list(values)),
        prefix + "pos": torch.cat([p.reshape(-1).to(torch.int32) for p in positions]),
        prefix + "count": torch.tensor(counts, dtype=torch.int32),
    }


def unpack_layer(entry: SegmentEntry, layer: int) -> LayerRows:
    """The rows of one layer, as views of the entry's tensors.

    Raises:
        CorruptEntry: if the layer is not there or its tensors do not agree.
    """
    prefix = f"layer.{layer}."
    try:
        k, v, pos, count = (entry.tensors[prefix + name] for name in ("k", "v", "pos", "count"))
    except KeyError as e:
        raise CorruptEntry(f"the entry has no tensor {e}") from e
    counts = count.tolist()
    total = sum(counts)
    if min(counts, default=0) < 0 or total != k.shape[0] or total != v.shape[0] or total != pos.shape[0]:
        raise CorruptEntry(
            f"layer {layer}: {k.shape[0]} keys, {v.shape[0]} values, {pos.shape[0]} positions for {counts}"
        )
    return LayerRows(list(k.split(counts)), list(v.split(counts)), list(pos.split(counts)))
