"""Stored rows brought into a prompt: copied to their places, keys rotated from where they were computed to where they
go.

Heads that keep everything get every row. A local head gets the rows that somebody will read: the sinks, the windows of
the rows that are computed, and the window that it keeps for decoding. Rows that a forward computes itself are not
brought at all. A layer is loaded when a forward reaches it, because which rows those are may be decided on the way.

What this module does not know: how rows were chosen, and where entries come from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from ..paging.pages import KEEP_ALL
from .entry import SegmentRows
from .rope import Relocator, rotate
from .rows import RowSet, kinds
from .splice import SpliceCache, SpliceLayer

__all__ = ["Loader", "Place"]

NEARLY_ALL = 0.6  # from this share on, copying everything is cheaper than picking rows


@dataclass(frozen=True)
class Place:
    """A segment's rows and the prompt position of its first token. Places follow each other without gaps from 0 on."""

    start: int
    rows: SegmentRows

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


class Loader:
    """Fills the layers of a `SpliceCache` from placed segments.

    Args:
        relocate: False leaves the keys rotated for where they were computed. Wrong, and measured as the naive baseline.

    Attributes:
        bytes_moved: copied into the prompt so far, keys and values.
        seconds: spent doing so, on the host.
    """

    def __init__(self, cache: SpliceCache, places: list[Place], relocator: Relocator, relocate: bool = True):
        self.cache, self.places, self.relocator = cache, places, relocator
        self.total = places[-1].stop if places else 0
        source = [place.rows.start + np.arange(len(place.rows)) for place in places]
        self.source = np.concatenate(source) if source else np.zeros(0, np.int64)
        self.moves = relocate and bool((self.source != np.arange(self.total)).any())
        self.bytes_moved, self.seconds = 0, 0.0
        self._there: dict[tuple[int, int, int], np.ndarray] = {}
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}
        cache.loader = self

    def __call__(self, layer: SpliceLayer, rows: RowSet) -> None:
        """Bring what ``rows`` will read in this layer and what stays for decoding."""
        if not self.total:
            return
        begin = time.perf_counter()
        self._load(layer, rows)
        self.seconds += time.perf_counter() - begin

    def _load(self, layer: SpliceLayer, rows: RowSet) -> None:
        if not layer.is_initialized:
            first = self.places[0].rows
            layer.lazy_initialization(first.keys[layer.index][None], first.values[layer.index][None])
        wanted = []
        for sink, window, heads in kinds(layer.sink, layer.window):
            there = self._there.setdefault((layer.index, sink, window), np.zeros(self.total, bool))
            computed = rows.host if rows.partial is None else rows.host[~rows.partial]
            computed = computed[computed < self.total]
            absent = ~there
            if self.cache.observer is None or not self.cache.observer.compares:
                absent[computed] = False
            missing = self._needed(rows, sink, window) & absent
            if missing.mean() > NEARLY_ALL:
                missing = absent
            there |= missing
            there[computed] = True
            if missing.any():
                wanted.append((heads, missing))
        if wanted and all((missing == wanted[0][1]).all() for _, missing in wanted[1:]):
            heads = np.sort(np.concatenate([heads for heads, _ in wanted]))
            wanted = [(heads, wanted[0][1])]
        for heads, missing in wanted:
            self._bring(layer, heads, missing)

    def finish(self) -> None:
        """Bring what no forward has asked for but decoding needs."""
        nothing = RowSet(np.zeros(0, np.int64), "cpu")
        for layer in self.cache.layers:
            self(layer, nothing)

    def _needed(self, rows: RowSet, sink: int, window: int) -> np.ndarray:
        if window >= KEEP_ALL:
            return np.ones(self.total, bool)
        edges = np.zeros(self.total + 1, np.int64)
        last = self.cache.length - 1 - window - self.cache.target.rollback  # first position that decoding keeps
        for low, high in ((rows.host - window + 1, rows.host + 1), (np.array([last]), np.array([self.total]))):
            np.add.at(edges, np.clip(low, 0, self.total), 1)
            np.add.at(edges, np.clip(high, 0, self.total), -1)
        needed = edges[:-1].cumsum() > 0
        needed[:sink] = True
        return needed

    def _bring(self, layer: SpliceLayer, heads: np.ndarray, missing: np.ndarray) -> None:
        assert layer.k is not None and layer.v is not None
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        whole, every = bool(missing.all()), len(heads) == layer.k.shape[1]
        chosen = torch.from_numpy(heads).to(layer.k.device)
        for place in self.places:
            mine = missing[place.start : place.stop]
            if not mine.any():
                continue
            index = None if mine.all() else torch.from_numpy(np.flatnonzero(mine)).to(layer.k.device)
            for into, stored in ((keys, place.rows.keys), (values, place.rows.values)):
                x = stored[layer.index]
                x = x if every else x.index_select(0, chosen)
                into.append(x if index is None else x.index_select(1, index))
        at = np.flatnonzero(missing)
        k = self._relocated(torch.cat(keys, 1) if len(keys) > 1 else keys[0], at, layer.index)
        v = torch.cat(values, 1) if len(values) > 1 else values[0]
        self.bytes_moved += k.numel() * k.element_size() + v.numel() * v.element_size()
        for store, new in ((layer.k, k), (layer.v, v)):
            if whole and every:
                store[0, :, : self.total] = new
            else:
                where = torch.from_numpy(at).to(store.device)
                for row, head in enumerate(heads):
                    store[0, head].index_copy_(0, where, new[row])

    def _relocated(self, k: torch.Tensor, at: np.ndarray, layer: int) -> torch.Tensor:
        """Keys ``[heads, n, dim]`` of the rows ``at``, rotated to their places."""
        if not self.moves:
            return k
        group = self.relocator.groups[layer]
        source = torch.from_numpy(self.source)
        delta = torch.arange(self.total) - source
        if layer in self.relocator.nope_layers:
            return k
        if group < 0 or layer in self.relocator._own:
            index = torch.from_numpy(at)
            return self.relocator.relocate(k[None], delta[index], layer, source=source[index])[0]
        if group not in self._tables:
            self._tables[group] = self.relocator.tables(delta, layer, source=source, device=k.device)
        tables = self._tables[group]
        assert tables is not None
        cos, sin = tables
        if len(at) < self.total:
            index = torch.from_numpy(at).to(k.device)
            cos, sin = cos.index_select(0, index), sin.index_select(0, index)
        rope = self.relocator.rope(layer)
        assert rope is not None
        return rotate(k, cos, sin, rope.layout)
