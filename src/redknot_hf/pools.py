"""What the layers of a cache keep, and where their pages come from.

Every layer has a pool of its own; the pools of all layers grow before a forward stores anything.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import CacheError, PoolExhausted
from .heads import HeadProfile
from .paging.pages import KEEP_ALL, LayerPages
from .paging.pool import SPARE_TOKENS, PagePool, PoolCeiling
from .paging.tiers import ColdTier
from .windows import effective_window

if TYPE_CHECKING:
    from .layer import RedKnotLayer
    from .step import Step


PoolKey = tuple[int, torch.device, torch.dtype, int, int]  # layer or -1 for all, device, dtype, key and value dim


def check_max_bytes(max_bytes: Any) -> None:
    """Raise unless it is a number of bytes, or None."""
    if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
        raise CacheError(
            f"max_bytes={max_bytes!r}: expected a number of bytes, 1 or more, or None for all that the device has"
        )


class Pools:
    """The part of a `RedKnotCache` that hands out memory."""

    page_size: int
    tp_rank: int
    tp_size: int
    tier: ColdTier | None
    profile: HeadProfile | None
    ceiling: PoolCeiling
    _pools: dict[PoolKey, PagePool]

    @property
    def paged_layers(self) -> list[RedKnotLayer]:
        raise NotImplementedError

    @property
    def max_bytes(self) -> int | None:
        """The most bytes of page pools that this cache and its forks may take together; None: what the device has."""
        return self.ceiling.max_bytes

    @max_bytes.setter
    def max_bytes(self, max_bytes: int | None) -> None:
        check_max_bytes(max_bytes)
        self.ceiling.max_bytes = max_bytes

    def geometry(self, index: int, heads: int, model_window: int | None) -> tuple[np.ndarray, np.ndarray, int]:
        """Sinks and windows (int ``[heads]``) of a layer's KV heads, and the model window left for attention.

        Raises:
            CacheError: the layer has another number of heads than the profile says.
        """
        if self.profile is None:
            sink, window = np.zeros(heads, np.int64), np.full(heads, KEEP_ALL, np.int64)
        else:
            of_rank = self.profile.num_kv_heads // self.tp_size
            if heads != of_rank or self.profile.num_kv_heads % self.tp_size:
                raise CacheError(
                    f"layer {index} feeds {heads} KV heads but the profile has {self.profile.num_kv_heads} "
                    f"(tp_size={self.tp_size}). For a tensor-parallel model build the cache with "
                    "RedKnotCache.for_model(model, profile); a model with latent attention or with another number of "
                    "heads in some layers is not served: use DynamicCache"
                )
            mine = slice(self.tp_rank * heads, (self.tp_rank + 1) * heads)
            rows = (self.profile.head_class[index], self.profile.sink[index], self.profile.window[index])
            sink, window = _rule(*(tuple(row[mine]) for row in rows))
        return effective_window(sink.copy(), window.copy(), model_window)

    def new_pages(self, layer: RedKnotLayer) -> LayerPages:
        """Empty page tables for an initialised layer."""
        pool = self.pool(layer)
        runs = layer.device.type == "cpu"
        geometry = (layer.sink, layer.window, layer.batch_size, layer.rollback)
        if self.tier is None:
            return LayerPages(pool, *geometry, contiguous=runs)
        first, count = self.tp_rank * layer.num_heads, layer.num_heads
        classes = [] if self.profile is None else self.profile.head_class[layer.index][first : first + count]
        far = [head for head, kind in enumerate(classes) if kind == "retrieval" and layer.window[head] >= KEEP_ALL]
        return self.tier.pages(pool, *geometry, np.array(far, np.int64), runs)

    def pool(self, layer: RedKnotLayer) -> PagePool:
        """Where an initialised layer's pages come from."""
        return self._pool_for(layer.index, layer)

    def _pool_for(self, index: int, alike: RedKnotLayer) -> PagePool:
        """The pool of layer ``index`` if its keys and values are like those of ``alike``.

        Every layer has its own, so that growing holds one layer twice and not the whole cache. Layers in front of a cold
        tier share one, as they share the pool behind it.
        """
        key = self._key(index, alike)
        return self._pools[key] if key in self._pools else self._new_pool(key, 0)

    def _key(self, index: int, alike: RedKnotLayer) -> PoolKey:
        return (index if self.tier is None else -1, alike.device, alike.dtype, alike.key_dim, alike.value_dim)

    def _new_pool(self, key: PoolKey, room: int) -> PagePool:
        """A pool of ``room`` pages to begin with."""
        index, device, dtype, key_dim, value_dim = key
        if self.tier is None:  # one may have been made ahead by `reserve` for a layer that turned out different
            self._pools = {other: pool for other, pool in self._pools.items() if other[0] != index}
        self._pools[key] = PagePool(self.page_size, key_dim, value_dim, dtype, device, ceiling=self.ceiling, room=room)
        return self._pools[key]

    def reserve(self, layer: RedKnotLayer, step: Step) -> None:
        """Grow the pools of all layers before the first of a forward stores anything, so that none fails half way.

        Not for a decode step, where layers take pages one by one (unless there is a ceiling), and not for layers that are
        new and may be on another GPU than this one.

        Raises:
            PoolExhausted: nothing of this forward has been stored then.
        """
        assert layer.pages is not None and step.new is not None
        if id(layer.pages.pool) in step.reserved:
            return
        if step.length == 1 and step.start and self.ceiling.max_bytes is None:
            step.reserved.add(id(layer.pages.pool))
            return
        one_device = layer.device.type != "cuda" or self.tp_size > 1 or torch.cuda.device_count() == 1
        wanted: dict[int, tuple[PagePool, int]] = {}
        new: dict[PoolKey, int] = {}  # pools that are not there yet
        counts: dict[tuple[bytes, bytes], int] = {}  # most layers have the rule of another one
        for other in self.paged_layers:
            if other.pages is not None:
                pool = other.pages.pool
                count = max(0, other.pages.pages_wanted(step.new) - int((other.pages.table > 0).sum()))
            elif other.is_sliding == layer.is_sliding and not step.start and one_device:
                sink, window, _ = self.geometry(other.index, layer.num_heads, other.model_window)
                rule = (sink.tobytes(), window.tobytes())
                if rule not in counts:
                    alike = (sink, window, layer.batch_size, layer.rollback, layer.pages.contiguous)
                    counts[rule] = LayerPages(layer.pages.pool, *alike).pages_wanted(step.new)
                key, count = self._key(other.index, layer), counts[rule]
                if key not in self._pools:
                    new[key] = new.get(key, 0) + count
                    continue
                pool = self._pools[key]
            else:
                continue
            wanted[id(pool)] = (pool, wanted.get(id(pool), (pool, 0))[1] + count)
        if self.ceiling.max_bytes is not None:
            missing = [max(0, count - pool.num_free) * pool.page_bytes for pool, count in wanted.values()]
            page = layer.pages.pool.page_bytes  # of all that are new: they are like this layer's
            self.ceiling.check(sum(missing) + sum(1 + count for count in new.values()) * page)
        for pool, count in wanted.values():
            pool.reserve(count, spare=count * SPARE_TOKENS // step.length)
        before = dict(self._pools)
        try:
            made = [id(self._new_pool(key, count)) for key, count in new.items()]
        except PoolExhausted:
            self._pools = before  # what was made for nothing goes back at once
            raise
        step.reserved.update(wanted, made)

    def _drop_pools(self) -> None:
        """Let go of pools in which no layer has a page; what a fork uses, the fork holds on to."""
        used = {id(layer.pages.pool) for layer in self.paged_layers if isinstance(layer.pages, LayerPages)}
        self._pools = {
            key: pool for key, pool in self._pools.items() if id(pool) in used and pool.num_free < pool.num_pages - 1
        }
        if self.tier is not None:
            self.tier.drop_pools()


@functools.lru_cache(maxsize=4096)
def _rule(classes: tuple[str, ...], sinks: tuple[int, ...], windows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Sink and window that each head obeys; remembered by what the profile says now, which may be edited in place."""
    local = np.array([kind == "local" for kind in classes])
    window = np.where(local, np.array(windows), KEEP_ALL)
    return np.where(window >= KEEP_ALL, 0, np.array(sinks)), window
