"""Moves between head maps that keep the bytes, priced by a `LocalModel`: swaps of a global and a local head, and growths
of one head's window that others pay for with smaller ones. No model is run.

The matrices are small, so these functions use one thread: on a machine with many cores, waking threads for a
thousand tiny operations costs twenty times what it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .local_model import LocalModel

__all__ = ["exchanges", "one_thread", "single_moves", "swaps", "walk"]

P = ParamSpec("P")
R = TypeVar("R")


def one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """The function with torch's thread count at one, and as it was afterwards."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return wrapped


@one_thread
def walk(local: LocalModel, choice: Tensor, windows: Sequence[int], limit: int, most: int) -> list[Tensor]:
    """Maps along a greedy walk on the predicted objective, each better than the one before.

    Args:
        local: predictions around `choice`.
        choice: int64 `[heads]`.
        windows: sizes in tokens, increasing.
        limit: window tokens in all that must not be exceeded.
        most: steps.
    """
    path: list[Tensor] = []
    here, value = choice, local.predict(choice)
    for _ in range(most):
        options = swaps(local, here, 1) + exchanges(local, here, windows, limit, 8)[:1]
        if not options:
            break
        change, step = min(options, key=lambda option: option[0])
        if change >= -1e-7 * max(1.0, abs(value)):
            break
        here, value = step, value + change
        path.append(here)
    return path


@one_thread
def single_moves(local: LocalModel, choice: Tensor, windows: Sequence[int], limit: int, count: int) -> list[Tensor]:
    """The `count` moves with the best predictions, half of them swaps; also ones that are predicted to hurt a little."""
    found = swaps(local, choice, count - count // 2) + exchanges(local, choice, windows, limit, count // 2)
    return [step for _, step in sorted(found, key=lambda option: option[0])]


def swaps(local: LocalModel, choice: Tensor, count: int) -> list[tuple[float, Tensor]]:
    """The best exchanges of a global and a local head: (predicted change, new choice)."""
    one, two, change = local.swap_gains(choice)
    if not change.numel() or not count:
        return []
    found = []
    for i in change.flatten().topk(min(count, change.numel()), largest=False).indices.tolist():
        g, l = int(one[i // len(two)]), int(two[i % len(two)])
        new = choice.clone()
        new[g], new[l] = choice[l], choice[g]
        found.append((float(change.flatten()[i]), new))
    return found


def exchanges(
    local: LocalModel, choice: Tensor, windows: Sequence[int], limit: int, count: int
) -> list[tuple[float, Tensor]]:
    """Growths of one head's window, others paying where the prediction loses least per token: (predicted change,
    new choice), the best first."""
    last = len(windows)
    size = torch.tensor([*windows, 0], dtype=torch.float64)
    before = local.total(choice)
    price = local.field(choice, before)
    gain = price - price.gather(1, choice[:, None])
    options = torch.arange(last + 1)[None]
    gain[(choice[:, None] >= last) | (options >= last) | (options <= choice[:, None])] = torch.inf
    heads = torch.arange(len(choice))
    spent, here = int(size[choice].sum()), local.predict(choice)
    found = []
    for i in gain.flatten().topk(min(count, gain.numel()), largest=False).indices.tolist():
        head, target = divmod(i, last + 1)
        if not torch.isfinite(gain[head, target]):
            break
        new = choice.clone()
        new[head] = target
        total = local.moved(before, head, int(choice[head]), target)
        tokens = spent + int(size[target] - size[choice[head]])
        while tokens > limit:
            now = local.field(new, total)
            smaller = (new - 1).clamp_min(0)
            freed = size[new] - size[smaller]
            loss = (now[heads, smaller] - now[heads, new]) / freed.clamp_min(1)
            loss[(new == 0) | (new >= last) | (heads == head)] = torch.inf
            if not bool(torch.isfinite(loss).any()):
                break
            payer = int(loss.argmin())
            old = int(new[payer])
            new[payer] = old - 1
            total = local.moved(total, payer, old, old - 1)
            tokens -= int(freed[payer])
        else:
            found.append((local.predict(new) - here, new))
    return sorted(found, key=lambda option: option[0])
