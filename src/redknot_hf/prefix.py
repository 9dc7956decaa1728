"""A shared prefix, computed once with full attention and stored per head class.

A system prompt, long instructions or a code base stand in front of many requests. `compress_prefix` runs it once with
every head seeing everything, then keeps what each head needs: sinks and window for local heads, all tokens for the
others. `RedKnotCache.fork` gives every request its own cache over the same pages; a fork costs the pages it writes to.

What is kept is frozen: local heads take exactly the rows of their sinks and windows, and with ``kv_dtype`` everything is
quantised once, with one scale per page for keys and one for values (`paging.frozen`).

The prefix itself is exact. What comes after it sees it through the profile and the ``kv_dtype``, so whatever a local head
no longer shows, and what quantising rounds, is a difference from the uncompressed prefix: `measure_prefix` reports it
on tokens of your choice.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .cache import RedKnotCache
from .errors import CacheError, PoolExhausted, RedKnotError
from .heads import HeadProfile
from .layer import RedKnotLayer
from .paging.freezing import freeze
from .paging.frozen import kv_dtype_of
from .paging.pages import LayerPages
from .paging.pool import PagePool
from .sessions.sleep import install, prefetch_cache

__all__ = ["PrefixReport", "compress_prefix", "freeze_cache", "measure_prefix"]


@dataclass(frozen=True)
class PrefixReport:
    """What a compressed prefix costs and what it changes.

    Attributes:
        tokens: of the prefix, per row.
        live: bytes of its pages and tables; ideal: of the tokens it keeps, without page rounding; dense: of all tokens
            of all heads, as `DynamicCache` holds them.
        kl: mean over the probe's positions of KL(uncompressed || compressed) of the next-token distributions, in nats;
            None without a probe.
        same_top1: share of these positions with the same most likely token; None without a probe.
    """

    tokens: int
    live: int
    ideal: int
    dense: int
    kl: float | None = None
    same_top1: float | None = None

    def __str__(self) -> str:
        text = f"{self.tokens:,} tokens in {self.live:,} bytes ({self.live / max(1, self.dense):.1%} of dense)"
        if self.kl is not None:
            text += f", mean KL {self.kl:.2e}, same most likely token at {self.same_top1:.1%} of the probe"
        return text


@torch.no_grad()
def compress_prefix(
    model: Any,
    ids: torch.Tensor,
    profile: HeadProfile | str | None = None,
    *,
    chunk_size: int | None = None,
    probe: torch.Tensor | None = None,
    **options: Any,
) -> RedKnotCache:
    """Compute a prefix with full attention and keep of it what the profile says.

    Args:
        model: loaded with ``attn_implementation="redknot"``.
        ids: int64 ``[rows, tokens]`` (or ``[tokens]``), without padding.
        profile: of the cache that comes back; as for `RedKnotCache`.
        chunk_size: tokens per forward. None: the prefix in one piece, which needs no more memory for keys and values
            than the result. With a number, activations stay small but all tokens of all heads are held until the end.
        probe: int64 ``[n]`` or ``[rows, n]``, text that may follow; adds the fidelity to the report. All tokens of all
            heads are held until the end, as with ``chunk_size``.
        options: for `RedKnotCache`, e.g. ``kv_dtype``, ``page_size``, ``rollback``, ``cold``.

    Returns:
        The cache, with a `PrefixReport` in its attribute ``prefix_report``. Fork it for every request and pass the fork
        to ``generate`` with prefix and request together: ``model.generate(both, past_key_values=cache.fork())``. A
        child's ``reset()`` gives its pages back at once; without it they go with the object.

    Raises:
        RedKnotError: an empty prefix, or an option out of range.
        CacheError: the model does not run ``attn_implementation="redknot"``.
    """
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise RedKnotError(f"ids has shape {list(ids.shape)}; expected [rows, tokens] with at least one token")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise RedKnotError(f"chunk_size={chunk_size!r}: expected a number of tokens, or None")
    options = {"prefill": "full", **options}
    if options["prefill"] != "full":
        raise RedKnotError("prefill: a prefix is computed with full attention; leave prefill out")
    cache = RedKnotCache.for_model(model, profile, **options)
    if chunk_size is None and probe is None:
        _feed(model, cache, ids, ids.shape[1])
        cache.freeze()
        return _reported(cache, ids)
    kv_dtype = kv_dtype_of(options.pop("kv_dtype", None))
    full = RedKnotCache.for_model(model, HeadProfile.all_global(model.config), **options)
    _feed(model, full, ids, chunk_size or ids.shape[1])
    wanted = None if probe is None else _logits(model, full.fork(), probe)
    full.set_profile(cache.profile if cache.profile is not None else HeadProfile.all_global(model.config))
    full.profile, full.kv_dtype = cache.profile, kv_dtype
    full.freeze()
    kl = same = None
    if wanted is not None:
        kl, same = _difference(wanted, _logits(model, full.fork(), probe))  # type: ignore[arg-type]
        full.freeze()  # the fork had its pages from the same pool
    return _reported(full, ids, kl, same)


def freeze_cache(cache: RedKnotCache) -> None:
    """Freeze what ``cache`` holds, and give the memory of the pages to the allocator; see `RedKnotCache.freeze`."""
    if cache.limit is not None:
        raise CacheError("freeze: the memory of the static form is fixed; build the cache without max_cache_len")
    cache._settle()
    prefetch_cache(cache, cache.layers)
    layers = [layer for layer in cache.paged_layers if layer.pages is not None]
    for layer in layers:
        if layer.seen != cache.seen:
            raise CacheError(
                f"freeze: layer {layer.index} holds {layer.seen} of {cache.seen} tokens, an earlier forward was "
                "interrupted. Call cache.reset() and feed the prompt again"
            )
    cache.frozen_until = cache.seen
    if cache.tier is not None:  # what leaves a window is on the host already, and pages of both tiers stay pages
        return
    for layer in layers:
        assert layer.pages is not None
        install(layer, freeze(layer.pages, cache.kv_dtype, f"layer {layer.index}"))
    for key, pool in list(cache._pools.items()):
        with contextlib.suppress(PoolExhausted):  # no memory for both at once: then the pages stay where they are
            cache._pools[key] = _fit(pool, [layer for layer in layers if layer.pages.pool is pool])  # type: ignore[union-attr]


def _fit(pool: PagePool, layers: list[RedKnotLayer]) -> PagePool:
    """Move the pages of ``layers`` to a pool of exactly their number, unless others hold some of them, too."""
    tables: list[LayerPages] = [layer.pages for layer in layers if isinstance(layer.pages, LayerPages)]
    order: list[np.ndarray] = []
    for pages in tables:  # heads that keep everything first, so that their pages lie side by side again
        order += [pages.table[:, heads].ravel() for heads in (pages.full_heads, pages.ring_heads)]
    entries = np.concatenate([np.zeros(0, np.int32), *order])
    entries = entries[entries > 0]
    mine = np.bincount(entries, minlength=pool.num_pages)
    if (pool.refs[entries] > mine[entries]).any():
        return pool
    _, first = np.unique(entries, return_index=True)
    held = entries[np.sort(first)]
    fresh = PagePool(pool.page_size, pool.k.shape[2], pool.v.shape[2], pool.k.dtype, pool.k.device)
    number = np.zeros(pool.num_pages, np.int32)
    number[held] = fresh.alloc(len(held))
    index = torch.from_numpy(held.astype(np.int64)).to(pool.k.device)
    for target, source in ((fresh.k, pool.k), (fresh.v, pool.v)):
        torch.index_select(source, 0, index, out=target[1 : 1 + len(held)])
    if pool.ceiling is not None:  # only now: for a moment both are there
        fresh.ceiling = pool.ceiling
        fresh.ceiling.join(fresh)
    for pages in tables:
        old, pages.table, pages.pool = pages.table, number[pages.table], fresh
        fresh.share(pages.table)
        pool.release(old)
        pages._changed()
    fresh.release(number[held])
    return fresh


@torch.no_grad()
def measure_prefix(model: Any, cache: RedKnotCache, ids: torch.Tensor, probe: torch.Tensor) -> PrefixReport:
    """The report of a compressed prefix on another probe; computes the uncompressed prefix again.

    Args:
        cache: what `compress_prefix` returned for ``ids`` (or a fork that holds nothing more).
        ids, probe: as for `compress_prefix`.

    Raises:
        CacheError: the cache holds another number of tokens than ``ids``.
    """
    ids = ids[None] if ids.ndim == 1 else ids
    if cache.get_seq_length() != ids.shape[1]:
        raise CacheError(
            f"the cache holds {cache.get_seq_length()} tokens, ids has {ids.shape[1]}: pass what was compressed"
        )
    full = RedKnotCache.for_model(model, HeadProfile.all_global(model.config), page_size=cache.page_size)
    _feed(model, full, ids, ids.shape[1])
    kl, same = _difference(_logits(model, full, probe), _logits(model, cache.fork(), probe))
    return _report(cache, ids, kl, same)


def _feed(model: Any, cache: RedKnotCache, ids: torch.Tensor, chunk: int) -> None:
    for start in range(0, ids.shape[1], chunk):
        # one logit is enough: the others would take more memory than the prefix
        model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)


def _logits(model: Any, cache: RedKnotCache, probe: torch.Tensor) -> torch.Tensor:
    rows = next(layer.batch_size for layer in cache.paged_layers if layer.is_initialized)
    probe = probe[None].expand(rows, -1) if probe.ndim == 1 else probe
    return model(probe, past_key_values=cache, use_cache=True).logits.float()


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return max(0.0, float(kl)), float((wanted.argmax(-1) == found.argmax(-1)).float().mean())


def _reported(
    cache: RedKnotCache, ids: torch.Tensor, kl: float | None = None, same: float | None = None
) -> RedKnotCache:
    cache.prefix_report = _report(cache, ids, kl, same)
    return cache


def _report(cache: RedKnotCache, ids: torch.Tensor, kl: float | None, same: float | None) -> PrefixReport:
    memory = cache.memory_report()
    return PrefixReport(ids.shape[1], memory.live, memory.ideal, memory.dense, kl, same)
