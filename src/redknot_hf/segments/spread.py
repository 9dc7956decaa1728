"""What recomputed rows tell about the rows beside them.

A reused row is wrong by what the segments before it would have added. Neighbours in a text, and to a lesser degree all
rows of a segment, are wrong in similar ways: a model adds much the same at all of them. A recomputed row shows how
wrong its stored keys and values were, so the other rows of its segment can be corrected for nothing: each takes a
weighted sum of the changes of the recomputed rows,

    W = C[all, chosen] (C[chosen, chosen] + noise I)^-1,    C[i, j] = common + exp(-|i - j| / distance),

the mean of a Gaussian process with this covariance (kriging, of linear prediction the one with the least expected
squared error if changes vary so). Keys are compared without their rotation. Weights depend on positions alone and are
the same in every layer and head.

Only heads that keep everything are corrected. Where every row is recomputed nothing is left to correct.

What this module does not know: how rows were chosen, where stored rows come from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..paging.pages import KEEP_ALL
from .rope import Relocator
from .rows import RowSet
from .splice import Observer, SpliceLayer

__all__ = ["Spread", "spread_weights"]

COMMON, NOISE = 1.0, 2.0  # in units of the part of the change that depends on the distance


def spread_weights(length: int, chosen: np.ndarray, distance: float) -> np.ndarray:
    """fp32 ``[length, n]``: what each row of a segment takes of the changes of its ``n`` rows ``chosen``."""

    def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return COMMON + np.exp(-np.abs(a[:, None] - b[None]) / distance)

    among = covariance(chosen, chosen) + NOISE * np.eye(len(chosen))
    return np.linalg.solve(among, covariance(chosen, np.arange(length))).T.astype(np.float32)


class _Part(NamedTuple):
    """One segment: where its recomputed rows lie in the forward, its rows in the prompt, and the weights."""

    first: int
    last: int
    start: int
    stop: int
    weights: torch.Tensor


class Spread(Observer):
    """Corrects stored rows of a layer before its recomputed rows overwrite theirs.

    Args:
        spans: ``(start, stop)`` of the segments that are corrected.
        relocator: of the model.
        distance: tokens over which changes resemble each other.
    """

    compares = True

    def __init__(self, spans: list[tuple[int, int]], relocator: Relocator, distance: float = 16.0):
        self.spans, self.relocator, self.distance = spans, relocator, distance
        self._parts: tuple[RowSet, list[_Part]] | None = None

    def rows(self, layer: SpliceLayer, rows: RowSet, k: torch.Tensor, v: torch.Tensor) -> None:
        heads = np.flatnonzero(np.asarray(layer.window) >= KEEP_ALL)
        if not len(heads) or rows.partial is not None:
            return
        assert layer.k is not None and layer.v is not None
        every = len(heads) == len(layer.window)
        index = torch.from_numpy(heads).to(k.device)
        rotates = layer.index not in self.relocator.nope_layers
        for part in self._parts_of(rows):
            at = rows.positions[part.first : part.last]
            everywhere = torch.arange(part.start, part.stop, device=at.device)
            for store, new, rotated in ((layer.k, k, rotates), (layer.v, v, False)):
                change = new[:, :, part.first : part.last].float() - store.index_select(2, at).float()
                if rotated:
                    change = self.relocator.relocate(change, -at, layer.index, source=at)
                spread = torch.einsum("tn,bhnd->bhtd", part.weights, change)
                if rotated:
                    spread = self.relocator.relocate(
                        spread, everywhere, layer.index, source=torch.zeros_like(everywhere)
                    )
                mine = store[:, :, part.start : part.stop]
                if every:
                    mine += spread.to(store.dtype)
                else:
                    mine.index_add_(1, index, spread.index_select(1, index).to(store.dtype))

    def _parts_of(self, rows: RowSet) -> list[_Part]:
        if self._parts is None or self._parts[0] is not rows:
            parts = []
            for start, stop in self.spans:
                first, last = np.searchsorted(rows.host, (start, stop))
                if 0 < last - first < stop - start:
                    weights = spread_weights(stop - start, rows.host[first:last] - start, self.distance)
                    parts.append(_Part(int(first), int(last), start, stop, torch.from_numpy(weights).to(rows.device)))
            self._parts = rows, parts
        return self._parts[1]
