"""The keys and values of documents, computed once: the unchanged model's decoder over header and document.

A document is captured behind the header that it will be served behind. Without one, its first tokens would become
attention sinks, which they are not inside a prompt; that is most of the damage of naive reuse. The header's own keys
are computed once and dropped from the document's.

Documents run in batches, padded on the right: nothing that comes later changes a row of a causal model, so the padding
needs no mask. Heads obey the profile's windows here as they will in the prompt.

What this module does not know: stores and keys of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..cache import RedKnotCache
from .codec import SegmentEntry
from .entry import SegmentRows, pack
from .rows import RowSet
from .splice import SpliceCache, forward_rows

__all__ = ["batches", "capture"]

PADDING = 1.25  # a batch may compute this many times its real tokens


def capture(
    model: torch.nn.Module,
    make_target: Callable[[], RedKnotCache],
    header: SegmentRows | None,
    documents: Sequence[Sequence[int]],
    batch_tokens: int = 16384,
) -> Iterator[tuple[int, SegmentEntry]]:
    """Compute documents behind a header.

    Args:
        make_target: an empty cache with the profile in force.
        header: keys and values of the header from position 0, or None.
        documents: token ids; at least one each.
        batch_tokens: tokens of one forward, padding included. One document may be longer.

    Yields:
        (index of the document, its entry), shortest documents first; tensors on the model's device.
    """
    start = 0 if header is None else len(header)
    device = next(model.parameters()).device
    for batch in batches([len(document) for document in documents], batch_tokens):
        longest = max(len(documents[i]) for i in batch)
        cache = SpliceCache(make_target(), start + longest, batch=len(batch))
        if header is not None:
            for layer in cache.layers:
                k, v = header.key(layer.index), header.value(layer.index)
                layer.fill(k.expand(len(batch), *k.shape), v.expand(len(batch), *v.shape), slice(0, start))
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(documents[i])] = torch.tensor(documents[i])
        forward_rows(model, cache, ids.to(device), RowSet(np.arange(start, start + longest), device))
        for row, i in enumerate(batch):
            mine = slice(start, start + len(documents[i]))
            keys = [layer.k[row, :, mine] for layer in cache.layers]
            values = [layer.v[row, :, mine] for layer in cache.layers]
            yield i, pack(keys, values, start)


def batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of documents that run together: of similar length, and few enough."""
    batch: list[int] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = lengths[i] * (len(batch) + 1)
        if batch and (padded > batch_tokens or padded > PADDING * (real + lengths[i])):
            yield batch
            batch, real = [], 0
        batch.append(i)
        real += lengths[i]
    if batch:
        yield batch
