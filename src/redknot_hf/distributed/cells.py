"""The visible tokens of single heads: read out of a cache and put into another one.

A cell is one (layer, KV head): keys ``[tokens, dim]`` and values, all rows of the batch one after the other, each row's
sinks first and its window behind them. Only what a later query can see is in it: of a row with n tokens a head with sink
s and window W has the positions ``[0, s)`` and ``[n - W + 1, n)``. Which positions these are follows from the profile
and the lengths, so they are not stored.

Knows page tables, not where cells go or come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import CacheError
from ..layer import RedKnotLayer
from ..paging.pages import KEEP_ALL, LayerPages
from ..sessions.sleep import install

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["cell_tokens", "fill_layer", "read_layer", "visible_positions"]

Cell = tuple[torch.Tensor, torch.Tensor]


def visible_positions(sink: int, window: int, length: int) -> np.ndarray:
    """Positions that a query after ``length`` tokens can still see, increasing."""
    if window >= KEEP_ALL:
        return np.arange(length)
    first = min(sink, length)
    return np.concatenate([np.arange(first), np.arange(max(first, length - window + 1), length)])


def cell_tokens(layer: RedKnotLayer, head: int, lens: np.ndarray) -> int:
    """Tokens of a cell, over all rows."""
    sink, window = int(layer.sink[head]), int(layer.window[head])
    if window >= KEEP_ALL:
        return int(lens.sum())
    first = np.minimum(sink, lens)  # counted, not listed: the lengths may come from anywhere
    return int((first + lens - np.maximum(first, lens - window + 1)).sum())


def read_layer(layer: RedKnotLayer, rows: np.ndarray) -> list[Cell]:
    """Cells of this process's heads of a layer, in host memory.

    Args:
        rows: which rows of the batch, in order.

    Raises:
        CacheError: a head lacks tokens that it shows.
    """
    pages = layer.pages
    assert pages is not None
    lens = pages.lens[rows]
    cells: list[Cell | None] = [None] * layer.num_heads
    for source, heads, at in _sources(layer, pages):
        for group in _alike(layer, heads):
            members, places = heads[group], at[group]
            sink, window = int(layer.sink[members[0]]), int(layer.window[members[0]])
            per_row = [visible_positions(sink, window, int(n)) for n in lens]
            _check_held(layer, source, places, rows, per_row)
            positions = np.zeros((source.batch_size, max(map(len, per_row), default=0)), np.int64)
            for row, found in zip(rows, per_row, strict=True):
                positions[row, : len(found)] = found
            halves = [half.cpu() for half in source.gather(positions, places)]
            for i, head in enumerate(members):
                parts = ([half[row, i, : len(p)] for row, p in zip(rows, per_row, strict=True)] for half in halves)
                k, v = (torch.cat(part) for part in parts)
                cells[head] = (k, v)
    return cells  # type: ignore[return-value]


def _sources(layer: RedKnotLayer, pages: LayerPages) -> Iterator[tuple[LayerPages, np.ndarray, np.ndarray]]:
    """(table, heads of the layer, their numbers in that table): far tokens of retrieval heads are behind another table."""
    far = getattr(pages, "far", None)
    behind = np.zeros(0, np.int64) if far is None else np.asarray(far.heads)
    here = np.setdiff1d(np.arange(layer.num_heads), behind)
    if len(here):
        yield pages, here, here
    if far is not None and len(behind):
        yield pages.archive, behind, far.rows_of_archive()  # type: ignore[attr-defined]


def _alike(layer: RedKnotLayer, heads: np.ndarray) -> list[np.ndarray]:
    """Indices into ``heads``, grouped by sink and window."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, head in enumerate(heads):
        groups.setdefault((int(layer.sink[head]), int(layer.window[head])), []).append(i)
    return [np.array(group) for group in groups.values()]


def _check_held(
    layer: RedKnotLayer, table: LayerPages, heads: np.ndarray, rows: np.ndarray, per_row: list[np.ndarray]
) -> None:
    for row, positions in zip(rows, per_row, strict=True):
        for head in heads:
            behind_sinks = positions[positions >= int(table.sink[head])]
            if len(behind_sinks) and behind_sinks[0] < int(table.oldest[row, head]):
                raise CacheError(
                    f"layer {layer.index}, head {head} lacks tokens that its window shows: the cache cannot be handed over"
                )


def fill_layer(cache: RedKnotCache, layer: RedKnotLayer, lens: np.ndarray, cells: list[Cell]) -> None:
    """Give an empty, initialised layer the content of cells.

    Args:
        lens: int64 ``[batch]``, tokens fed to each row.
        cells: one per head of this process, on any device.

    Raises:
        PoolExhausted: the device has no memory; the layer is still empty then.
    """
    pages = cache.new_pages(layer)
    pages.prepare(lens)
    oldest = pages.oldest.copy()
    index, keys, values = [], [], []
    for head, (k, v) in enumerate(cells):
        sink, window = int(layer.sink[head]), int(layer.window[head])
        for row, length in enumerate(lens):
            positions = visible_positions(sink, window, int(length))
            table = np.zeros((len(lens), len(positions)), np.int64)
            table[row] = positions
            index.append(pages.rows(table, np.array([head]))[row, 0])
            if window < KEEP_ALL:
                oldest[row, head] = max(sink, int(length) - window + 1)
        keys.append(k)
        values.append(v)
    halves = {"k": _on(layer.device, keys), "v": _on(layer.device, values)}
    where = torch.from_numpy(np.concatenate(index)).to(layer.device)
    with pages.pool.lock:
        for slab, half in ((pages.pool.k, halves["k"]), (pages.pool.v, halves["v"])):
            slab.view(-1, slab.shape[2]).index_copy_(0, where, half)
    pages.lens, pages.oldest = lens.copy(), oldest
    pages._changed()
    install(layer, pages)


def _on(device: torch.device, parts: list[torch.Tensor]) -> torch.Tensor:
    """``parts`` one after the other on ``device``, through page-locked memory on the way to a GPU."""
    if device.type != "cuda":
        return torch.cat(parts).to(device)
    rows = sum(len(part) for part in parts)
    staged = torch.empty(rows, parts[0].shape[1], dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(parts, out=staged).to(device, non_blocking=True)
