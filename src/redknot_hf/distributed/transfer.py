"""Hand a cache over to other processes through a segment store: prefill here, decode there, with any number of readers.

    publish(cache, "valkey://host:6379", "request-17", tokens=out.sequences)      # every rank of the writer
    found = fetch("valkey://host:6379", "request-17", model)                      # every rank of a reader
    model.generate(**found.inputs, past_key_values=found.cache)

What lies in the store is one entry per (layer, KV head), the cells, and one that describes them, the root. The root is
written last, when every rank of the writer has stored its cells: a reader finds all of a publication or none of it. A
reader fetches the cells of its own heads, so writer and readers may have different numbers of ranks, and different
orders of heads (`place_heads`): cells are numbered in the model's original order.

Only tokens that a later query can see are stored: no padding, no page rounding, nothing that a local head has evicted
or will evict before it is asked again. No pickle: entries are safetensors with a checksum (see `segments.codec`).

Whatever is missing, damaged or unreachable ends in `CacheMissing`, never in a cache that says something else: prefill
the prompt then.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CacheError, RedKnotError, UnsupportedModel, shorten
from ..heads.order import config_order
from ..layer import RedKnotLayer
from ..segments.codec import SegmentEntry
from ..segments.stores import SegmentStore
from .cells import read_layer
from .fetching import Fetched, Fetcher
from .ranks import Ranks
from .root import CacheMissing, NotPublished, Root, cell_name, root_name
from .weights import weights_digest

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["CacheMissing", "Fetched", "NotPublished", "Publication", "fetch", "publish", "unpublish"]

Store = SegmentStore | str | os.PathLike[str]


@dataclass(frozen=True)
class Publication:
    """What was written.

    Attributes:
        key: what readers ask for.
        cells: entries of single heads, of all ranks.
        nbytes: keys and values in them.
        nbytes_per_rank: what each rank of the writer stored.
        dense_nbytes: what the same tokens take in a `DynamicCache`, padding included.
    """

    key: str
    cells: int
    nbytes: int
    nbytes_per_rank: list[int]
    dense_nbytes: int

    def __str__(self) -> str:
        share = f", {self.nbytes / self.dense_nbytes:.1%} of dense" if self.dense_nbytes else ""
        return f"{self.cells} heads, {self.nbytes:,} bytes{share}"


def publish(
    cache: RedKnotCache,
    store: Store,
    key: str,
    *,
    tokens: torch.Tensor | None = None,
    model: torch.nn.Module | None = None,
    group: Any = None,
) -> Publication:
    """Store what a cache holds under a key, for any process to fetch. Every rank of a tensor-parallel model calls it.

    What was published under the key before stays readable until the new publication is complete, and is removed then.

    Args:
        cache: stays as it is.
        store: a `SegmentStore` or the URL of one.
        key: 1 to 512 characters, the same on all ranks.
        tokens: int64 ``[batch, n]``, the ids so far, such as `generate` returned them (the last one need not be in the
            cache): readers get them back.
        model: adds a digest of its weights that readers compare (one pass over the weights).
        group: process group of the ranks, where it is not the default one.

    Raises:
        NotPublished: the store did not take everything, on any rank.
        CacheError: the last forward was interrupted, or a layer keeps a state that is not keys and values per head.
        RedKnotError: bad arguments, or ranks that do not hold the same tokens.
    """
    name = root_name(key)
    ranks = Ranks.of(cache.tp_rank, cache.tp_size, group)
    ranks.require("publish a cache")
    opened = store if isinstance(store, SegmentStore) else SegmentStore(store)
    try:
        return _publish(cache, opened, key, name, tokens, model, ranks)
    finally:
        if opened is not store:
            opened.close()


def _publish(
    cache: RedKnotCache,
    store: SegmentStore,
    key: str,
    name: str,
    tokens: torch.Tensor | None,
    model: torch.nn.Module | None,
    ranks: Ranks,
) -> Publication:
    problem, root = "", None
    weights = None if model is None else weights_digest(model, ranks)
    try:
        root = _describe(cache, tokens, weights)
    except RedKnotError as error:
        problem = str(error)
        if ranks.size == 1:
            raise
    # All ranks learn of a problem before any of them writes, and take rank 0's word for what has to be one number.
    said = ranks.exchange(
        {"problem": problem, "edition": secrets.token_hex(16), "state": None if root is None else root.agreement()}
    )
    failed = [f"rank {i}: {each['problem']}" for i, each in enumerate(said) if each["problem"]]
    if failed:
        raise CacheError(f"not published: {failed[0]}")
    assert root is not None
    if any(each["state"] != said[0]["state"] for each in said):
        raise CacheError("the ranks of the writer do not hold the same tokens: feed all of them the same inputs")
    root.edition = said[0]["edition"]
    nbytes, cells, problem, other = 0, 0, "", None
    try:
        for items in _cells(cache, root, name, ranks):
            for entry in (entry for _, entry in items):
                nbytes += entry.nbytes
            cells += len(items)
            if not all(store.put_many(items)):
                problem = "the store did not take a cell (its warning says why)"
                break
    except Exception as error:  # whatever stops this rank must not leave the others waiting
        problem, other = f"{type(error).__name__}: {error}", error
    said = ranks.exchange({"problem": problem, "nbytes": nbytes, "cells": cells})
    failed = [f"rank {i}: {each['problem']}" for i, each in enumerate(said) if each["problem"]]
    old = None
    root.nbytes = sum(each["nbytes"] for each in said)
    if not failed and ranks.rank == 0:
        old = Root.read(store, name)
        if not store.put(name, root.entry()):
            failed = ["rank 0: the store did not take the description (its warning says why)"]
    # the last word is rank 0's: it wrote the root
    failed = ranks.exchange(failed)[0]
    if failed:
        _remove_cells(store, root, name, cache, ranks)
        if other is not None:
            raise other
        raise NotPublished(f"nothing was published under {shorten(key)}: {failed[0]}")
    if old is not None:
        for each in old.cell_names(name):
            store.delete(each)
    return Publication(key, sum(e["cells"] for e in said), root.nbytes, [e["nbytes"] for e in said], root.dense_nbytes)


def _describe(cache: RedKnotCache, tokens: torch.Tensor | None, weights: str | None) -> Root:
    cache.prefetch()
    cache._settle()
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, RedKnotLayer) and getattr(layer, "is_initialized", False):
            raise UnsupportedModel(
                f"layer {index} is a {type(layer).__name__}, whose state is not keys and values per head: save the cache "
                "to a file instead (cache.save)"
            )
        if isinstance(layer, RedKnotLayer) and layer.pages is not None and layer.seen != cache.seen:
            raise CacheError(
                f"layer {index} holds {layer.seen} of {cache.seen} tokens: an earlier forward was interrupted. Call "
                "cache.reset() and feed the prompt again"
            )
    return Root.of(cache, tokens, weights)


def _cells(cache: RedKnotCache, root: Root, name: str, ranks: Ranks) -> Iterator[list[tuple[str, SegmentEntry]]]:
    """The cells of this rank, a layer at a time."""
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, RedKnotLayer) or layer.pages is None:
            continue
        heads = root.heads_of_rank(index, ranks.rank, ranks.size, config_order(cache.config))
        items = []
        for head, (k, v) in zip(heads, read_layer(layer, root.kept_rows()), strict=True):
            entry = SegmentEntry({"k": k, "v": v}, cache.seen, extra={"layer": index, "head": head})
            items.append((cell_name(name, root.edition, index, head), entry))
        yield items


def _remove_cells(store: SegmentStore, root: Root, name: str, cache: RedKnotCache, ranks: Ranks) -> None:
    """What this rank wrote of a publication that did not come about; best effort, the store may be gone."""
    for index in range(len(cache.layers)):
        for head in root.heads_of_rank(index, ranks.rank, ranks.size, config_order(cache.config)):
            if not store.delete(cell_name(name, root.edition, index, head)):
                return


def fetch(
    store: Store,
    key: str,
    config: Any,
    *,
    device: torch.device | str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    group: Any = None,
    **options: Any,
) -> Fetched:
    """The cache published under a key, with the heads of this process. Every rank of a tensor-parallel model calls it.

    Args:
        store: a `SegmentStore` or the URL of one.
        key: what it was published under.
        config: the model, or its config (``model.config`` itself). With the model, dtype, device and, if the writer
            gave its model, weights are compared, too.
        device: where the pages go; None: the model's device, or the CPU.
        rank, world_size: which share of the heads; None: as the model is sharded. If given, this process does not talk
            to others.
        group: process group of the ranks, where it is not the default one.
        **options: page_size and rollback of the new cache, as for `RedKnotCache`; None or left out: as published.

    Raises:
        CacheMissing: there is no such publication, or something of it is missing, damaged or cannot be reached: on all
            ranks if it is so on one. Feed the prompt instead.
        CacheError: it was made with another model.
        RedKnotError: bad arguments.
    """
    name = root_name(key)
    opened = store if isinstance(store, SegmentStore) else SegmentStore(store)
    try:
        return Fetcher(opened, key, name, config, device, rank, world_size, group, options).fetch()
    finally:
        if opened is not store:
            opened.close()


def unpublish(store: Store, key: str) -> bool:
    """Remove what is published under a key; False if there is nothing (or the store cannot be reached)."""
    name = root_name(key)
    opened = store if isinstance(store, SegmentStore) else SegmentStore(store)
    try:
        root = Root.read(opened, name)
        if root is None:
            return False
        opened.delete(name)
        for each in root.cell_names(name):
            opened.delete(each)
        return True
    finally:
        if opened is not store:
            opened.close()
