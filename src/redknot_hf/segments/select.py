"""Which rows of reused segments a prompt computes anew.

A reused row is wrong because it was computed without the segments before it. Computing a row anew repairs it; a
selector decides which rows are worth it. It gives every position of the prompt a score, and the best ones that the
ratio pays for are taken.

* `Boundary`: the first tokens of each segment, which act as attention sinks where a segment was computed alone.
* `KVDeviation`: rows whose keys and values in an early layer differ most from the stored ones (CacheBlend, arXiv
  2405.16444). The early layers run over all rows for it.
* `QueryAttention`: rows that the query attends to most, by one pass of the query alone over the stored rows.
* `Blend`, the default: some boundary rows of each segment, then the rows that some head looks at most sharply; the
  deviation can be multiplied in.

Your own: any callable that takes a `PromptView` and returns scores, a mask, or positions.

What this module does not know: stores, relocation, and how rows are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import RedKnotError, shorten
from ..paging.torch_attention import AttentionSpec
from .rows import RowSet, packed_weights
from .splice import KeysComplete, Observer, SpliceCache, SpliceLayer, forward_rows, narrow_rows

__all__ = [
    "SELECTORS",
    "Blend",
    "Boundary",
    "Choice",
    "KVDeviation",
    "PromptView",
    "QueryAttention",
    "Selector",
    "choose",
    "selector_of",
]


@dataclass
class PromptView:
    """What a selector may look at.

    Attributes:
        ids: int64 ``[N]``, the prompt's tokens, on the host; row: the same ``[1, N]`` on the model's device.
        spans: ``(start, stop)`` of each segment.
        eligible: positions that are reused inexactly, ascending: the only ones that can be chosen.
        query: positions of the query, the last one included.
        budget: how many rows will be taken.
        exact_through: layers ``0 ... exact_through`` hold exact rows at every position, because a selector had them run
            over all of them; -1 for none.
    """

    model: torch.nn.Module
    cache: SpliceCache
    ids: torch.Tensor
    row: torch.Tensor
    spans: list[tuple[int, int]]
    eligible: np.ndarray
    query: np.ndarray
    budget: int
    exact_through: int = -1
    _found: dict[Any, np.ndarray] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.ids)

    def offsets(self) -> np.ndarray:
        """int64 ``[N]``: distance of each position from the first token of its segment; elsewhere a huge number."""
        result = np.full(self.length, np.iinfo(np.int64).max)
        for start, stop in self.spans:
            result[start:stop] = np.arange(stop - start)
        return result

    def run(self, positions: np.ndarray, observer: Observer | None = None) -> None:
        """Compute these rows in all layers."""
        rows = RowSet(positions, self.row.device)
        forward_rows(self.model, self.cache, self.row[:, rows.positions], rows, observer)

    def run_early_layers(self, last: int, observer: Observer | None = None) -> None:
        """Compute every row that is not exact in layers ``0 ... last`` and stop there.

        Those layers hold what a full prefill gives from then on. The remaining layers run over the prompt's last
        token alone, which is not kept.
        """
        layers = len(self.cache.layers)
        end = self.length - 1
        positions = np.unique(np.append(self.eligible, end))
        at = {last + 1: lambda rows: np.array([len(rows) - 1])} if last + 1 < layers else {}
        with narrow_rows(self.model, self.cache, at):
            self.run(positions, observer)
        self.exact_through = max(self.exact_through, last)

    def kv_deviation(self, layer: int = 1) -> np.ndarray:
        """fp32 ``[N]``: how far the stored keys and values of a layer are from right ones; 0 where nothing is reused.

        ``|k - k'|^2 / mean |k|^2 + |v - v'|^2 / mean |v|^2``, summed over the layer's heads. Runs layers ``0 ...
        layer`` over all rows once.
        """
        layer = min(layer, len(self.cache.layers) - 1)
        if ("deviation", layer) not in self._found:
            watch = _Deviation(layer, self.length)
            self.run_early_layers(layer, watch)
            self._found["deviation", layer] = watch.result
        return self._found["deviation", layer]

    def query_attention(self, share: float = 1.0, power: float = 1.0) -> np.ndarray:
        """fp32 ``[N]``: attention of the query on each position, over the stored rows.

        Args:
            share: of the layers, from the first on; the later ones are not run.
            power: the mean over these layers, their heads and the query's tokens is of the attention to this power.
                The larger, the more a row counts that one head looks at sharply against one that many glance at;
                ``inf``: the largest attention of all.
        """
        last = max(1, round(share * len(self.cache.layers))) - 1
        if ("attention", last, power) not in self._found:
            watch = _Attention(self.length, last, power)
            positions = np.unique(np.concatenate([self.query, [self.length - 1]]))
            with self.cache.borrowing():
                self.run(positions, watch)
            self._found["attention", last, power] = watch.result()
        return self._found["attention", last, power]


class _Deviation(Observer):
    compares = True

    def __init__(self, layer: int, length: int):
        self.layer, self.result = layer, np.zeros(length, np.float32)

    def rows(self, layer: SpliceLayer, rows: RowSet, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer.index != self.layer:
            return
        total = torch.zeros(len(rows), device=k.device)
        for store, new in ((layer.k, k), (layer.v, v)):
            assert store is not None
            new = new[0].float()
            apart = (store[0].index_select(1, rows.positions).float() - new).square().sum(-1)  # [kv_heads, n]
            size = new.square().sum(-1).mean(1, keepdim=True)
            total += (apart / size.clamp_min(1e-12)).sum(0)
        self.result[rows.host] = total.cpu().numpy()


class _Attention(Observer):
    def __init__(self, length: int, last: int, power: float):
        self.length, self.last, self.power = length, last, power
        self.total: torch.Tensor | None = None
        self.count = 0

    def queries(self, layer: SpliceLayer, rows: RowSet, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        assert layer.k is not None and layer.v is not None
        weights = packed_weights(q, rows, layer.k[:, :, : self.length], layer.sink, layer.window, spec)
        largest = math.isinf(self.power)
        if largest:
            mass = weights[0].amax((0, 1))
        else:
            mass = _to_power(weights[0], self.power).mean((0, 1))
        if self.total is None:
            self.total = mass
        else:
            self.total = torch.maximum(self.total, mass) if largest else self.total + mass
        self.count += 1
        if layer.index >= self.last < len(layer.cache.layers) - 1:
            raise KeysComplete
        values = layer.v[:, :, : self.length]
        out = weights.to(values.dtype) @ values  # [batch, kv_heads, group * n, dim]
        return out.view(len(q), -1, len(rows), out.shape[3]).transpose(1, 2).to(q.dtype).contiguous()

    def result(self) -> np.ndarray:
        assert self.total is not None
        return (self.total if math.isinf(self.power) else self.total / self.count).cpu().numpy()


def _to_power(x: torch.Tensor, power: float) -> torch.Tensor:
    """``x ** power``; a general power takes a CPU five times as long as a product."""
    if power in (2.0, 4.0):
        x = x.square()
        return x.square() if power == 4 else x
    return x if power == 1 else x**power


class Selector(Protocol):
    """Scores of the positions of a prompt, float ``[N]``; larger is taken earlier."""

    def __call__(self, view: PromptView) -> Any: ...


@dataclass(frozen=True)
class Boundary:
    """The first tokens of each segment, evenly over the segments: as many as the ratio pays for."""

    def __call__(self, view: PromptView) -> np.ndarray:
        return -view.offsets().astype(np.float64)


@dataclass(frozen=True)
class KVDeviation:
    """Rows whose stored keys and values are most wrong in one early layer.

    Attributes:
        layer: layer 0 sees the tokens alone and deviates nowhere; 1 is the first that can tell.
    """

    layer: int = 1

    def __call__(self, view: PromptView) -> np.ndarray:
        return view.kv_deviation(self.layer)


@dataclass(frozen=True)
class QueryAttention:
    """Rows that the query attends to most."""

    def __call__(self, view: PromptView) -> np.ndarray:
        return view.query_attention()


@dataclass(frozen=True)
class Blend:
    """Boundary rows first, then rows by a product of the query's attention and the deviation.

    Attributes:
        boundary: first tokens of each segment that are taken before anything else. 8 did better than 0, 4 and 16.
        layer: of the deviation.
        attention: exponent of the query's attention; 0 leaves it out and saves its pass.
        share: of the layers whose attention counts, from the first on. The query runs through these alone. 1 keeps more
            exact details and makes the pass longer by half; from files it waits for all bytes before rows are chosen.
        power: what is averaged is the attention to this power (see `PromptView.query_attention`): at 4 rows that few heads
            look at sharply come before rows that many glance at.
        deviation: exponent of the deviation; 0 leaves it out and saves the early layers. At equal rows the deviation in
            layer 1 added nothing to the attention; in layer 6 it did, for the price of seven layers over all rows.
    """

    boundary: int = 8
    layer: int = 1
    attention: float = 1.0
    deviation: float = 0.0
    share: float = 2 / 3
    power: float = 4.0

    def __call__(self, view: PromptView) -> np.ndarray:
        score = np.ones(view.length)
        if self.attention:
            score = score * view.query_attention(self.share, self.power).astype(np.float64) ** self.attention
        if self.deviation:
            score = score * view.kv_deviation(self.layer).astype(np.float64) ** self.deviation
        score = score / max(score[view.eligible].max(initial=0.0), 1e-300)
        first = view.offsets() < self.boundary
        return np.where(first, 2.0 + self.boundary - np.minimum(view.offsets(), self.boundary), score)


SELECTORS: dict[str, Callable[[], Selector]] = {
    "boundary": Boundary,
    "kv_deviation": KVDeviation,
    "query_attention": QueryAttention,
    "blend": Blend,
}


def selector_of(selector: str | Selector) -> Selector:
    """A selector by name, or the callable itself.

    Raises:
        RedKnotError: neither a known name nor callable.
    """
    if isinstance(selector, str) and selector in SELECTORS:
        return SELECTORS[selector]()
    if not callable(selector):
        raise RedKnotError(
            f"selector={shorten(selector)}: expected one of {', '.join(map(repr, SELECTORS))}, or a callable that "
            "takes a "
            "PromptView and returns a score for every position"
        )
    return selector


@dataclass(frozen=True)
class Choice:
    """What a selector's answer comes to.

    Attributes:
        ranked: the rows to compute, the best first, at most as many as the ratio pays for.
        partial: bool ``[N]``: of these rows only some heads take the new keys and values.
        heads: bool ``[layers][kv_heads]``: which; None for those that the profile does not call local.
    """

    ranked: np.ndarray
    partial: np.ndarray
    heads: np.ndarray | None = None


def choose(view: PromptView, answer: Any) -> Choice:
    """Read a selector's answer.

    Args:
        answer: float scores ``[N]``, a bool mask ``[N]``, or int positions, best first; or a tuple of one of these,
            a bool mask ``[N]`` of the rows that are partial, and optionally the heads that take these (see `Choice`).

    Raises:
        RedKnotError: the answer has another shape, or names positions that are not in the prompt.
    """
    partial = np.zeros(view.length, bool)
    heads = None
    if isinstance(answer, tuple):
        answer, mask, heads = answer if len(answer) == 3 else (*answer, None)
        partial = _array(mask)
        if partial.dtype != bool or partial.shape != (view.length,):
            raise RedKnotError(
                f"the selector returned {partial.dtype} of shape {list(partial.shape)} as the mask of partial rows: "
                "expected "
                f"bool of shape [{view.length}]"
            )
    return Choice(_ranked(view, _array(answer))[: view.budget], partial, heads)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _ranked(view: PromptView, values: np.ndarray) -> np.ndarray:
    """The eligible positions that ``values`` names, the best first: all of them, or at least as many as are taken."""
    if values.dtype == bool and values.shape == (view.length,):
        return view.eligible[values[view.eligible]]
    if np.issubdtype(values.dtype, np.floating) and values.shape == (view.length,):
        scores = np.nan_to_num(values[view.eligible], nan=-np.inf)
        return view.eligible[_smallest(-scores, view.budget)]
    if np.issubdtype(values.dtype, np.integer) and values.ndim == 1:
        if values.size and not 0 <= values.min() <= values.max() < view.length:
            raise RedKnotError(f"the selector named position {int(values.max())} of a prompt of {view.length} tokens")
        _, first = np.unique(values, return_index=True)
        ranked = values[np.sort(first)]
        return ranked[np.isin(ranked, view.eligible)]
    raise RedKnotError(
        f"the selector returned {values.dtype} of shape {list(values.shape)}: expected float scores or a bool mask "
        "of shape "
        f"[{view.length}], or integer positions"
    )


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` of ``np.argsort(values, kind="stable")``, without sorting the others; no value is NaN."""
    if count >= len(values):
        return np.argsort(values, kind="stable")
    if count <= 0:
        return np.zeros(0, np.int64)
    last = np.partition(values, count - 1)[count - 1]
    below = np.flatnonzero(values < last)
    equal = np.flatnonzero(values == last)[: count - len(below)]
    return np.concatenate([below[np.argsort(values[below], kind="stable")], equal])
