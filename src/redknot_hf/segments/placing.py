"""Stored rows brought into a prompt: copied to their places, keys rotated from where they were computed to where they
go.

Heads that keep everything get every row. A local head gets the rows that somebody will read: the sinks, the windows of
the rows that are computed, and the window that it keeps for decoding. A layer is loaded when a forward reaches it,
because which rows those are may be decided on the way. Where nearly all rows are wanted, all are brought, which is
cheaper than picking them; on a GPU always, by one launch per layer.

What this module does not know: how rows were chosen, and where entries come from.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import numpy as np
import torch

from ..paging.pages import KEEP_ALL
from . import place_kernel
from .entry import SegmentRows
from .rope import Layout, Relocator, rotate, rotate_into
from .rows import RowSet
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
        dtype: of the prompt; None: that of the first place, which is then not kept in int8.

    Attributes:
        bytes_moved: copied into the prompt so far, keys and values.
        seconds: spent doing so, on the host.
    """

    def __init__(
        self,
        cache: SpliceCache,
        places: list[Place],
        relocator: Relocator,
        relocate: bool = True,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype
        self._cache = weakref.ref(cache)  # which holds this loader
        self.places, self.relocator = places, relocator
        self.total = places[-1].stop if places else 0
        self.uploads = list({id(p.rows.upload): p.rows.upload for p in places if p.rows.upload is not None}.values())
        source = [place.rows.start + np.arange(len(place.rows)) for place in places]
        self.source = np.concatenate(source) if source else np.zeros(0, np.int64)
        self.moves = relocate and bool((self.source != np.arange(self.total)).any())
        self.bytes_moved, self.seconds = 0, 0.0
        self._there: dict[tuple[int, int, int], np.ndarray] = {}
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._placed: dict[int, list[place_kernel.PlacedSegments]] = {}
        self._started: set[int] = set()
        self._whole: dict[int, int] = {}  # layers that got every row -> bytes
        cache.loader = self

    @property
    def cache(self) -> SpliceCache:
        cache = self._cache()
        assert cache is not None
        return cache

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
            like = [x[None, :, :0].to(self.dtype) for x in (first.key(layer.index), first.value(layer.index))]
            layer.lazy_initialization(*like)
        assert layer.k is not None
        if layer.index in self._whole:
            return
        if layer.index not in self._started:
            for upload in self.uploads:
                upload.need(layer.index)
        on_gpu = place_kernel.available(layer.k.device)
        wanted, fresh = [], layer.index not in self._started
        self._started.add(layer.index)
        computed = rows.host if rows.partial is None else rows.host[~rows.partial]
        computed = computed[computed < self.total]
        if fresh and on_gpu and len(layer.kinds) == 1 and layer.kinds[0][1] >= KEEP_ALL and len(computed) < self.total:
            self._bring_all(layer, on_gpu)  # the usual case; what follows comes to the same
            return
        for sink, window, heads in layer.kinds:
            there = self._there.setdefault((layer.index, sink, window), np.zeros(self.total, bool))
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
        if not wanted:
            return
        share = sum(len(heads) * missing.mean() for heads, missing in wanted) / layer.k.shape[1]
        if fresh and (on_gpu or share > NEARLY_ALL):  # rows that the forward computes overwrite what is brought here
            self._bring_all(layer, on_gpu)
            return
        if all((missing == wanted[0][1]).all() for _, missing in wanted[1:]):
            heads = np.sort(np.concatenate([heads for heads, _ in wanted]))
            wanted = [(heads, wanted[0][1])]
        for heads, missing in wanted:
            self._bring(layer, heads, missing)

    def forget(self, index: int) -> None:
        """The layer ``index`` has lost what was brought: it is brought again when a forward reaches it."""
        self.bytes_moved -= self._whole.pop(index, 0)
        self._started.discard(index)
        for key in [key for key in self._there if key[0] == index]:
            del self._there[key]

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

    def _bring_all(self, layer: SpliceLayer, on_gpu: bool) -> None:
        """Every row of every head."""
        assert layer.k is not None and layer.v is not None
        k_out, v_out = layer.k[0, :, : self.total], layer.v[0, :, : self.total]
        self._whole[layer.index] = k_out.numel() * k_out.element_size() + v_out.numel() * v_out.element_size()
        self.bytes_moved += self._whole[layer.index]
        moved = self.moves and layer.index not in self.relocator.nope_layers
        own = moved and layer.index in self.relocator._own
        if on_gpu and not own:
            group, index = self.places[0].rows.where[layer.index]
            if group not in self._placed:
                self._placed[group] = self._segments_of(group)
            cos, sin, layout = self._tables_of(layer.index, k_out.device) if moved else (None, None, "half")
            for placed in self._placed[group]:
                placed.place(index, cos, sin, layout == "interleaved", k_out, v_out)
            return
        for place in self.places:
            here = slice(place.start, place.stop)
            v_out[:, here] = place.rows.value(layer.index)
            k, out = place.rows.key(layer.index), k_out[:, here]
            if not moved or place.start == place.rows.start:
                out.copy_(k)
            elif own:
                out.copy_(self._relocated(k, np.arange(place.start, place.stop), layer.index))
            else:
                cos, sin, layout = self._tables_of(layer.index, k.device)
                assert cos is not None and sin is not None
                rotate_into(out, k, cos[here], sin[here], layout)

    def _segments_of(self, group: int) -> list[place_kernel.PlacedSegments]:
        """What one launch takes: the segments in the model's dtype, and those in int8."""
        found = []
        for quantised in (False, True):
            places = [place for place in self.places if place.rows.quantised == quantised]
            if places:
                parts = "kvs" if quantised else "kv"
                keys, values, *scales = [
                    [place.rows.stacks[f"{part}.{group}"].contiguous() for place in places] for part in parts
                ]
                found.append(place_kernel.PlacedSegments(keys, values, [place.start for place in places], *scales))
        return found

    def _bring(self, layer: SpliceLayer, heads: np.ndarray, missing: np.ndarray) -> None:
        """The rows ``missing`` of some heads."""
        assert layer.k is not None and layer.v is not None
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        every = len(heads) == layer.k.shape[1]
        chosen = torch.from_numpy(heads).to(layer.k.device)
        for place in self.places:
            mine = missing[place.start : place.stop]
            if not mine.any():
                continue
            index = None if mine.all() else torch.from_numpy(np.flatnonzero(mine)).to(layer.k.device)
            for into, x in ((keys, place.rows.key(layer.index)), (values, place.rows.value(layer.index))):
                x = x if every else x.index_select(0, chosen)
                into.append(x if index is None else x.index_select(1, index))
        at = np.flatnonzero(missing)
        k = self._relocated(torch.cat(keys, 1) if len(keys) > 1 else keys[0], at, layer.index)
        v = torch.cat(values, 1) if len(values) > 1 else values[0]
        k, v = k.to(layer.k.dtype), v.to(layer.v.dtype)
        self.bytes_moved += k.numel() * k.element_size() + v.numel() * v.element_size()
        where = torch.from_numpy(at).to(layer.k.device)
        for store, new in ((layer.k, k), (layer.v, v)):
            for row, head in enumerate(heads):
                store[0, head].index_copy_(0, where, new[row])

    def _tables_of(self, layer: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Layout]:
        """cos and sin fp32 ``[total, R / 2]`` of the way of every row, and the layout; for layers that rotate."""
        group = self.relocator.groups[layer]
        if group not in self._tables:
            source = torch.from_numpy(self.source)
            found = self.relocator.tables(torch.arange(self.total) - source, layer, source=source, device=device)
            assert found is not None
            self._tables[group] = found
        rope = self.relocator.rope(layer)
        assert rope is not None
        return (*self._tables[group], rope.layout)

    def _relocated(self, k: torch.Tensor, at: np.ndarray, layer: int) -> torch.Tensor:
        """Keys ``[heads, n, dim]`` of the rows ``at``, rotated to their places."""
        if not self.moves or layer in self.relocator.nope_layers:
            return k
        if self.relocator.groups[layer] < 0 or layer in self.relocator._own:
            source = torch.from_numpy(self.source[at])
            return self.relocator.relocate(k[None], torch.from_numpy(at) - source, layer, source=source)[0]
        cos, sin, layout = self._tables_of(layer, k.device)
        if len(at) < self.total:
            index = torch.from_numpy(at).to(k.device)
            cos, sin = cos.index_select(0, index), sin.index_select(0, index)
        return rotate(k, cos, sin, layout)
