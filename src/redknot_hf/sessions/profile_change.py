"""`RedKnotCache.set_profile`: the tokens of a cache in use under other head classes, sinks and windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from ..layer import RedKnotLayer
from ..paging.frozen import FrozenPages
from ..paging.pages import LayerPages
from ..paging.tiers import regrown
from .sleep import install, prefetch_cache

if TYPE_CHECKING:
    from ..cache import RedKnotCache
    from ..heads import HeadProfile

__all__ = ["change_profile"]


def change_profile(cache: RedKnotCache, profile: HeadProfile | None) -> None:
    """Rebuild every layer's page table under ``profile``, or change nothing at all; see `RedKnotCache.set_profile`."""
    cache._settle()
    prefetch_cache(cache, cache.layers)
    layers = [layer for layer in cache.paged_layers if layer.is_initialized]
    for layer in layers:
        if type(layer) is not RedKnotLayer:
            raise CacheError(
                f"layer {layer.index} is a {type(layer).__name__}, whose page tables are fixed: build the cache "
                "without max_cache_len to change its profile"
            )
    before = cache.profile, [(layer.sink, layer.window, layer.extra_window) for layer in layers]
    made: list[tuple[RedKnotLayer, LayerPages]] = []
    cache.profile = profile
    try:
        for layer in layers:
            layer.sink, layer.window, layer.extra_window = cache.geometry(
                layer.index, layer.num_heads, layer.model_window
            )
            if layer.pages is not None:
                made.append((layer, _regrown(layer.pages, cache.new_pages(layer), f"layer {layer.index}")))
    except BaseException:
        cache.profile, geometry = before
        for layer, old in zip(layers, geometry, strict=True):
            layer.sink, layer.window, layer.extra_window = old
        for _, pages in made:
            pages.free()
        raise
    for layer, pages in made:
        old_pages: Any = layer.pages
        old_pages.free()
        install(layer, pages)
    cache.frozen_until = 0


def _regrown(old: LayerPages, fresh: LayerPages, name: str) -> LayerPages:
    """`regrown`, with frozen pages read through ordinary ones."""
    if not isinstance(old, FrozenPages):
        return regrown(old, fresh, name)
    plain = old.thawed()
    try:
        return regrown(plain, fresh, name)
    finally:
        plain.free()
