"""Which rows pass: from importance to row indices. Pure functions on tensors.

Rows that always pass are outside the ranking: a sink receives more attention than a thousand document rows, and a share
of a total that it dominates would say nothing about them.
"""

from __future__ import annotations

import math

import torch

from .schedule import Band

__all__ = ["select_rows"]


def select_rows(
    importance: torch.Tensor,
    always: torch.Tensor,
    real: torch.Tensor | None,
    rule: Band,
    bucket: int = 1,
    always_count: int | None = None,
) -> torch.Tensor:
    """Indices of the rows that pass.

    Args:
        importance: float ``[batch, rows]``; negative and NaN count as 0. Equal rows: the earlier one first.
        always: bool ``[batch, rows]``, rows that pass whatever their importance.
        real: bool ``[batch, rows]``, False for padding, which never passes; None without padding.
        rule: what to keep.
        bucket: each sequence's count is rounded up to a multiple of this (or to all its real rows).
        always_count: rows of `always` in every sequence, if the caller knows that they are as many in each; with
            ``rule.keep`` and without padding the call then does not wait for the device.

    Returns:
        int64 ``[n]``, ascending, into the flattened ``[batch * rows]``.
    """
    batch, rows = importance.shape
    if real is not None:
        always = always & real
    may_skip = ~always if real is None else real & ~always
    score = torch.nan_to_num(importance.float(), nan=0.0).clamp_min(0)
    if rule.keep is not None and real is None and always_count is not None:
        wanted = _round_up(max(math.ceil(rule.keep * rows - 1e-9), always_count), bucket, rows)
        order = score.masked_fill(always, math.inf).sort(dim=1, descending=True, stable=True).indices[:, :wanted]
        return (order + torch.arange(batch, device=order.device)[:, None] * rows).flatten().sort().values
    ranked, order = score.masked_fill(~may_skip, -1).sort(dim=1, descending=True, stable=True)
    total = torch.full((batch,), rows, device=score.device) if real is None else real.sum(1)
    fixed_count, free = always.sum(1), may_skip.sum(1)
    if rule.keep is not None:
        count = torch.ceil(total * rule.keep - 1e-9).long() - fixed_count
    elif rule.mass is not None:
        count = _covering(ranked.clamp_min(0).double(), rule.mass)
    else:
        assert rule.above_mean is not None
        whole = (score if real is None else score.masked_fill(~real, 0)).double()
        line = rule.above_mean * whole.sum(1) / total.clamp_min(1)
        count = (ranked.clamp_min(0) >= line[:, None]).logical_and(ranked >= 0).sum(1)
    count = count.clamp_min(0) + fixed_count
    count = torch.minimum((count + bucket - 1) // bucket * bucket, total) - fixed_count
    count = torch.minimum(count, free)
    rank = torch.arange(rows, device=score.device)
    passes = torch.zeros_like(always).scatter_(1, order, rank < count[:, None])
    return (passes | always).flatten().nonzero().flatten()


def _covering(ranked: torch.Tensor, mass: float) -> torch.Tensor:
    """How many of the largest (float64 ``[batch, rows]``, descending) sum to at least ``mass`` of all: int64 ``[batch]``."""
    target = mass * ranked.sum(1, keepdim=True)
    before = ranked.cumsum(1) - ranked  # what the rows ahead of each one sum to
    return ((before < target) & (ranked > 0)).sum(1)


def _round_up(count: int, bucket: int, most: int) -> int:
    return min(-(-count // bucket) * bucket, most)
