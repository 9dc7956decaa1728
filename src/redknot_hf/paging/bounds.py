"""Which far pages a query could care about: the smallest and largest key of every page, channel by channel.

For a query q, no key of a page with channel bounds [low, high] can score more than  sum_d max(q_d low_d, q_d high_d)
(Quest, arXiv 2406.10774, section 3.2). Pages are picked by that bound alone, so keys of pages that lose are never
read. Picking is approximate unless every page is picked.

The bounds lie on the compute device and are indexed by the page's number in its pool: rows and forks that share a page
share its bounds. This module does not know where the pages are.
"""

from __future__ import annotations

import numpy as np
import torch

from .pages import LayerPages
from .pool import upload

__all__ = ["PICKED", "RUNNER_UP", "PageBounds", "pick_pages", "rank_pages", "upper_bounds"]

RUNNER_UP, PICKED = 1, 2  # what `rank_pages` says of a page


class PageBounds:
    """Channel bounds of the pages of one pool.

    Args:
        device: where queries are.

    Attributes:
        low, high: ``[num_pages, key_dim]`` in the dtype of the keys: bounds are exact.
    """

    @torch.inference_mode(False)  # here and where it grows: forwards of any mode write into it
    def __init__(self, key_dim: int, dtype: torch.dtype, device: torch.device):
        self.low = torch.zeros(0, key_dim, dtype=dtype, device=device)
        self.high = torch.zeros(0, key_dim, dtype=dtype, device=device)

    def update(self, pages: LayerPages, before: np.ndarray) -> None:
        """Take in the pages of ``pages`` that have become full since lengths ``before`` (int64 ``[batch]``).

        Call after `advance`. A page that is not full has no bounds yet, and none of an earlier content that count.
        """
        pool, size = pages.pool, pages.pool.page_size
        first, last = before // size, pages.lens // size
        if (first >= last).all():
            return
        if len(self.low) < pool.num_pages:
            with torch.inference_mode(False):
                grown = torch.zeros(pool.num_pages - len(self.low), self.low.shape[1], dtype=self.low.dtype)
                self.low, self.high = (torch.cat([half, grown.to(half.device)]) for half in (self.low, self.high))
        column = np.arange(pages.table.shape[2])
        touched = (column >= first[:, None]) & (column < last[:, None])
        touched = np.broadcast_to(touched[:, None], pages.table.shape)
        held = pages.table[touched].astype(np.int64)
        keys = pool.k.index_select(0, upload(held, pool.k.device))
        where = upload(held, self.low.device)
        self.low.index_copy_(0, where, keys.amin(1).to(self.low.device))
        self.high.index_copy_(0, where, keys.amax(1).to(self.high.device))


def upper_bounds(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The most that any key within the bounds can score, before scaling.

    Args:
        q: ``[..., group, dim]``; low, high: ``[..., pages, dim]``.

    Returns:
        fp32 ``[..., group, pages]``.
    """
    q = q.float()
    # max(q low, q high) = q+ high + q- low: two small matrix products
    return q.clamp(min=0) @ high.float().transpose(-1, -2) + q.clamp(max=0) @ low.float().transpose(-1, -2)


def pick_pages(bounds: torch.Tensor, scale: float, how_many: int | float | None) -> torch.Tensor:
    """Choose pages for the query heads of one KV head.

    Args:
        bounds: fp32 ``[heads, group, pages]`` from `upper_bounds`.
        scale: factor of the scores.
        how_many: None: all pages. An int: that many pages with the highest bound of any query head of the group. A
            float in (0, 1]: the fewest pages that hold this share of the softmax over the bounds (mean of the group).

    Returns:
        bool ``[heads, pages]``.
    """
    return rank_pages(bounds, scale, how_many, 0) == PICKED


def rank_pages(bounds: torch.Tensor, scale: float, how_many: int | float | None, runners_up: int) -> torch.Tensor:
    """`pick_pages`, and which pages come next.

    Args:
        bounds, scale, how_many: as for `pick_pages`.
        runners_up: how many pages behind those that are picked.

    Returns:
        uint8 ``[heads, pages]``: `PICKED`, `RUNNER_UP` or 0.
    """
    heads, _, pages = bounds.shape
    whole = how_many is None or how_many >= (pages if isinstance(how_many, int) else 1.0)
    if whole:
        return torch.full((heads, pages), PICKED, dtype=torch.uint8, device=bounds.device)
    assert how_many is not None
    found = torch.zeros(heads, pages, dtype=torch.uint8, device=bounds.device)
    if isinstance(how_many, int):
        best = bounds.amax(1)
        if runners_up:
            found.scatter_(1, best.topk(min(how_many + runners_up, pages), dim=1).indices, RUNNER_UP)
        return found.scatter_(1, best.topk(how_many, dim=1).indices, PICKED)
    share = torch.softmax(bounds * scale, -1).mean(1)
    ordered, index = share.sort(1, descending=True)
    needed = ordered.cumsum(1) - ordered < how_many  # the share before a page is not yet enough
    ranks = needed * PICKED
    if runners_up:
        next_ones = torch.arange(pages, device=bounds.device) < needed.sum(1, keepdim=True) + runners_up
        ranks = torch.where(next_ones & ~needed, RUNNER_UP, ranks)
    return found.scatter_(1, index, ranks.to(torch.uint8))
