"""Prompts that were put together one by one, as the rows of one cache.

Prompts of a batch differ in length, in what is stored of them and in the rows that are computed, so each is spliced on
its own. Their keys and values then move into one cache layer by layer. To the model shorter rows are padded on the
left; the cache stores no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..cache import RedKnotCache
from .splice import SpliceCache

__all__ = ["hand_over_batch", "pad_left"]


def hand_over_batch(caches: Sequence[SpliceCache], target: RedKnotCache) -> np.ndarray:
    """Move all but the last token of each prompt into an empty cache; the caches are empty afterwards.

    Returns:
        int64 ``[batch]``: tokens of each row now.
    """
    counts = np.array([cache.length - 1 for cache in caches], np.int64)
    longest = int(counts.max())
    target.adopt(_rows(caches, target, counts, longest), longest, counts)
    return counts


def _rows(
    caches: Sequence[SpliceCache], target: RedKnotCache, counts: np.ndarray, longest: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        target.paged_layers[layers[0].index].model_window = layers[0].model_window
        like = next(layer for layer in layers if layer.k is not None)
        empty = like.k[:, :, :0], like.v[:, :, :0]  # of a prompt of one token nothing is stored
        given = [empty if layer.k is None else layer.release() for layer in layers]
        yield tuple(  # type: ignore[misc]
            torch.cat([_longer(pair[part][:, :, :count], longest) for pair, count in zip(given, counts, strict=True)])
            for part in (0, 1)
        )


def _longer(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[1, heads, n, dim]`` with zeros behind, up to so many tokens."""
    return torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[2]))


def pad_left(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Ids ``[1, n]`` of different lengths as ``[batch, longest]``."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows])
