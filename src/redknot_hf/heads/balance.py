"""Spread the KV heads of every layer over ranks so that all ranks hold the same KV bytes.

Under tensor parallelism each rank holds the same number of KV heads of every layer, so a layer whose heads differ
cannot be balanced alone; over all layers it can. Two sums are balanced: stored tokens per rank over the whole model
(memory), and, because ranks wait for each other after every layer, the sum over layers of the busiest rank's tokens
(decode time).

Plain numpy over a cost array; knows nothing of profiles, models or weights. Deterministic.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

__all__ = ["balance_heads", "lower_bound"]

_MAX_STEPS = 2000


def balance_heads(costs: np.ndarray, ranks: int, slack: float = 0.01) -> np.ndarray:
    """Assign heads to ranks.

    Heads of a layer are first grouped so that its busiest rank is as light as possible, then groups are exchanged
    between ranks (which leaves every layer's busiest rank as it is) until no exchange lowers the sum of squared rank
    loads. Single heads are exchanged only as far as the balance over the model needs it.

    Args:
        costs: `[layers, heads, contexts]` stored tokens; every context is balanced at the same time.
        ranks: divides heads.
        slack: heads are exchanged at the price of a busier layer only while some context's largest rank load is more
            than this share above the lower bound.

    Returns:
        `[layers, heads]` int rank of every head; each rank appears heads / ranks times in each row.
    """
    layers, heads, _ = costs.shape
    if ranks == 1:
        return np.zeros((layers, heads), dtype=np.int64)
    mean = costs.sum(axis=(0, 1)) / ranks
    weights = costs / np.where(mean > 0, mean, 1.0)  # a rank's fair share is 1 in every context
    weights = weights[:, :, mean > 0]
    scalar = weights.sum(axis=2)
    assignment = np.stack([_group(scalar[l], ranks) for l in range(layers)])
    assignment = _order_groups(weights, assignment, ranks)

    bounds = np.array([lower_bound(costs[:, :, c], ranks) for c in range(costs.shape[2]) if mean[c] > 0])
    for keep_busiest in (True, False):
        if not keep_busiest and (_loads(weights, assignment, ranks).max(axis=0) <= bounds * (1 + slack)).all():
            break
        _exchange_groups(weights, assignment, ranks)
        _exchange_heads(weights, assignment, ranks, keep_busiest, bounds * (1 + slack))
        _exchange_groups(weights, assignment, ranks)
    return assignment


def lower_bound(costs: np.ndarray, ranks: int) -> float:
    """What max / mean of the rank loads cannot go below, whatever the assignment.

    A layer whose heads all cost the same gives every rank the same load. Among the other layers, for every cost t, some
    rank holds at least ceil(n / ranks) of the n heads that cost t or more, beside the cheapest other heads. The bound
    is above 1 when few heads hold most tokens: 5 global heads do not divide by 8 ranks.

    Args:
        costs: `[layers, heads]` of one context.
        ranks: divides heads.
    """
    mean = costs.sum() / ranks
    if mean == 0:
        return 1.0
    alike = (costs == costs[:, :1]).all(axis=1)
    base = costs[alike].sum() / ranks
    flat = np.sort(costs[~alike].ravel())
    slots = flat.size // ranks
    prefix = np.concatenate([[0.0], np.cumsum(flat)])
    best = mean - base
    for t in np.unique(flat):
        first = int(np.searchsorted(flat, t))
        forced = math.ceil((flat.size - first) / ranks)
        # The other slots are filled with the cheapest heads left, which may again cost t or more.
        cheap = min(slots - forced, first)
        best = max(best, prefix[cheap] + prefix[first + slots - cheap] - prefix[first])
    return float((base + best) / mean)


def _group(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Split one layer's heads into equally large groups whose largest sum is small: heaviest first, then exchanges."""
    size = costs.size // ranks
    groups = np.full(costs.size, -1)
    loads, counts = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
    for head in np.argsort(-costs, kind="stable"):
        open_ranks = np.flatnonzero(counts < size)
        rank = open_ranks[np.argmin(loads[open_ranks])]
        groups[head] = rank
        loads[rank] += costs[head]
        counts[rank] += 1
    if size == 1:
        return groups
    for _ in range(_MAX_STEPS):
        best, pair = -1e-12, None
        for i, j in combinations(range(costs.size), 2):
            a, b = groups[i], groups[j]
            if a != b:
                d = costs[i] - costs[j]
                change = 2 * d * (d - (loads[a] - loads[b]))
                if change < best:
                    best, pair = change, (i, j, d)
        if pair is None:
            break
        i, j, d = pair
        loads[groups[i]] -= d
        loads[groups[j]] += d
        groups[i], groups[j] = groups[j], groups[i]
    return groups


def _order_groups(weights: np.ndarray, assignment: np.ndarray, ranks: int) -> np.ndarray:
    """Give each layer's heaviest group to the lightest rank so far, layers with the largest differences first."""
    layers = assignment.shape[0]
    sums = np.stack([_loads(weights[l : l + 1], assignment[l : l + 1], ranks) for l in range(layers)])
    spread = (sums.max(axis=1) - sums.min(axis=1)).sum(axis=1)
    loads = np.zeros(ranks)
    ordered = assignment.copy()
    for layer in np.argsort(-spread, kind="stable"):
        groups = np.argsort(-sums[layer].sum(axis=1), kind="stable")
        targets = np.argsort(loads, kind="stable")
        renamed = np.empty(ranks, dtype=np.int64)
        renamed[groups] = targets
        ordered[layer] = renamed[assignment[layer]]
        loads[targets] += sums[layer].sum(axis=1)[groups]
    return ordered


def _exchange_groups(weights: np.ndarray, assignment: np.ndarray, ranks: int) -> None:
    """Exchange two ranks' groups within a layer, or within two, while that lowers the sum of squared loads. In place."""
    layers = assignment.shape[0]
    sums = np.stack([_loads(weights[l : l + 1], assignment[l : l + 1], ranks) for l in range(layers)])
    first, second = np.triu_indices(ranks, 1)
    for _ in range(_MAX_STEPS):
        loads = sums.sum(axis=0)
        difference = sums[:, first] - sums[:, second]
        apart = loads[first] - loads[second]
        change = (2 * difference * (difference - apart)).sum(axis=2)
        at = int(np.argmin(change))
        if change.flat[at] < -1e-12:
            layer, pair = divmod(at, first.size)
            moves = [(layer, pair)]
        else:
            moves = _two_exchanges(difference, apart)
        if not moves:
            return
        for layer, pair in moves:
            a, b = first[pair], second[pair]
            row = assignment[layer]
            on_a, on_b = row == a, row == b
            row[on_a], row[on_b] = b, a
            sums[layer, [a, b]] = sums[layer, [b, a]]


def _two_exchanges(difference: np.ndarray, apart: np.ndarray) -> list[tuple[int, int]]:
    """Two layers whose groups, exchanged between the same two ranks, lower the sum of squares together; or nothing.

    Args:
        difference: `[layers, rank pairs, contexts]` by how much the first rank's group is heavier; apart: the same of
            the ranks' loads.
    """
    best, found = -1e-12, []
    for pair in range(difference.shape[1]):
        moved = difference[:, None, pair] + difference[None, :, pair]  # [layers, layers, contexts]
        change = (2 * moved * (moved - apart[pair])).sum(axis=2)
        np.fill_diagonal(change, 0.0)
        at = int(np.argmin(change))
        if change.flat[at] < best:
            best = change.flat[at]
            found = [(layer, pair) for layer in divmod(at, len(change))]
    return found


def _exchange_heads(
    weights: np.ndarray, assignment: np.ndarray, ranks: int, keep_busiest: bool, enough: np.ndarray
) -> None:
    """Exchange two heads of a layer between ranks while that lowers the sum of squared loads. In place.

    With `keep_busiest` no layer's busiest rank gets busier; without, it stops once every context is `enough` balanced.
    """
    layers, heads, _ = weights.shape
    scalar = weights.sum(axis=2)
    first, second = np.triu_indices(heads, 1)
    difference = weights[:, first] - weights[:, second]
    scalar_difference = scalar[:, first] - scalar[:, second]
    for _ in range(_MAX_STEPS):
        loads = _loads(weights, assignment, ranks)
        if not keep_busiest and (loads.max(axis=0) <= enough).all():
            return
        a, b = assignment[:, first], assignment[:, second]
        change = (2 * difference * (difference - (loads[a] - loads[b]))).sum(axis=2)
        change[a == b] = 0.0
        if keep_busiest:
            sums = np.zeros((layers, ranks))
            np.add.at(sums, (np.arange(layers)[:, None], assignment), scalar)
            busiest = sums.max(axis=1, keepdims=True) + 1e-12
            rows = np.arange(layers)[:, None]
            worse = (sums[rows, a] - scalar_difference > busiest) | (sums[rows, b] + scalar_difference > busiest)
            change[worse] = 0.0
        at = int(np.argmin(change))
        if change.flat[at] >= -1e-12:
            return
        layer, pair = divmod(at, first.size)
        i, j = first[pair], second[pair]
        assignment[layer, [i, j]] = assignment[layer, [j, i]]


def _loads(weights: np.ndarray, assignment: np.ndarray, ranks: int) -> np.ndarray:
    """`[ranks, contexts]` sums."""
    loads = np.zeros((ranks, weights.shape[2]))
    np.add.at(loads, assignment.ravel(), weights.reshape(-1, weights.shape[2]))
    return loads
