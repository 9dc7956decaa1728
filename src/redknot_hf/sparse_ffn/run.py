"""What one forward of a model under a schedule knows: its rows, which of them always pass, and their importance.

A `Run` lives from the decoder's entry to its exit, in one thread. The hooks of `context` feed it; the wrapped FFNs ask
it which rows to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import compat
from ..masks import RedKnotMask
from ..paging.pool import upload
from ..segments.rows import RowSet
from ..segments.splice import Observer, SpliceCache, SpliceLayer
from .importance import Geometry, attention_call_mass, splice_call_mass
from .schedule import Band, SparseFFNSchedule
from .selection import select_rows
from .structure import first_of, gathered_rows

__all__ = ["LayerView", "Run", "rows_of"]


@dataclass(frozen=True)
class LayerView:
    """What a callable importance may look at, in one layer of one forward.

    Attributes:
        layer: index.
        ffn_input: ``[batch, rows, dim]``, what the FFN gets: the normed hidden states.
        ffn: the FFN itself; running it over all rows is dense work, for experiments.
        attention_output: ``[batch, rows, dim]``, what attention adds to the residual, or None before it ran.
        layer_input: ``[batch, rows, dim]``.
        previous_input: the layer before's, or None.
        real: bool ``[batch, rows]``, or None without padding.
    """

    layer: int
    ffn_input: torch.Tensor
    ffn: Callable[..., Any]
    attention_output: torch.Tensor | None
    layer_input: torch.Tensor | None
    previous_input: torch.Tensor | None
    real: torch.Tensor | None


@dataclass(frozen=True)
class Rows:
    """The rows of one forward.

    Attributes:
        batch, count: sequences, and rows of each (padding counted).
        past: tokens (padding counted) that the cache held before.
        real: bool ``[batch, count]``, or None without padding.
        past_real: int64 ``[batch]``, real tokens in the past; None where all are.
        splice: the cache of a splice, or None.
    """

    batch: int
    count: int
    device: torch.device
    past: int = 0
    real: torch.Tensor | None = None
    past_real: torch.Tensor | None = None
    splice: SpliceCache | None = None


def rows_of(arguments: dict[str, Any], least: int) -> Rows | None:
    """Rows of a forward from the decoder's arguments; None if each sequence has fewer than ``least``."""
    given = arguments.get("inputs_embeds")
    if given is None:
        given = arguments.get("input_ids")
    if not isinstance(given, torch.Tensor) or given.dim() < 2:
        return None
    batch, count = given.shape[:2]
    if count < least:
        return None  # told before anything that waits for the device: decode steps come here
    cache = compat.passed_cache(arguments)
    if isinstance(cache, SpliceCache):
        return Rows(batch, count, given.device, splice=cache)
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if isinstance(mask, RedKnotMask):
        mask = mask.padding
    real = past_real = None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= count:
        mask = mask.bool()
        here = mask[:, past : past + count] if mask.shape[1] >= past + count else mask[:, -count:]
        if not bool(here.all()):
            real = here.to(given.device)
        if past and mask.shape[1] >= past + count and not bool(mask[:, :past].all()):
            past_real = mask[:, :past].sum(1).to(given.device)
    return Rows(batch, count, given.device, past, real, past_real)


class Run:
    """One forward.

    Args:
        schedule: what to do.
        rules: the band of every layer, None for dense ones.
        observed: layers whose attention is measured.
        rows: of the forward.
        query_tokens: trailing real tokens that are the query.
        boundaries: request positions at which segments begin.
        count: called with (layer, rows, rows run) for the statistics.
    """

    def __init__(
        self,
        schedule: SparseFFNSchedule,
        rules: list[Band | None],
        observed: frozenset[int],
        rows: Rows,
        query_tokens: int,
        boundaries: tuple[int, ...],
        count: Callable[[int, int, int], None],
    ):
        self.schedule, self.rules, self.rows = schedule, rules, rows
        self.observed = observed
        self.query_tokens, self.boundaries, self.count = query_tokens, boundaries, count
        self.received: torch.Tensor | None = None
        self._geometry = Geometry()
        self.attention_output: torch.Tensor | None = None
        self.input: torch.Tensor | None = None
        self.previous_input: torch.Tensor | None = None
        self._always: tuple[Any, torch.Tensor, int | None] | None = None
        self._chosen: tuple[int, torch.Tensor | None] | None = None
        self._gathered: tuple[int, torch.Size, torch.Tensor] | None = None  # what `norm` gave to the FFN
        self._recency: torch.Tensor | None = None
        self._known: dict[tuple[float | None, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        if rows.splice is not None and observed:
            rows.splice.observer = _Chained(self, rows.splice.observer)

    # ------------------------------------------------------------------------------------------------- what hooks see
    def enter_layer(self, hidden: torch.Tensor) -> None:
        self.previous_input, self.input = self.input, hidden
        self.attention_output = None

    def see_attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: Any,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> None:
        """A call of the attention function of a layer, before it runs."""
        if layer not in self.observed or self.rows.splice is not None or query.shape[2] != self.rows.count:
            return
        rows = self.rows
        real = None if rows.real is None else rows.real.to(query.device)  # layers may lie on several devices
        with torch.no_grad():
            self._receive(
                attention_call_mass(
                    query,
                    key,
                    mask,
                    scale,
                    softcap,
                    s_aux,
                    sliding_window,
                    real,
                    self._queries(),
                    rows.past,
                    self._geometry,
                )
            )

    def see_splice(self, layer: SpliceLayer, rows: RowSet, query: torch.Tensor, spec: Any) -> None:
        """The rows of a splice, their keys in place."""
        if layer.index not in self.observed:
            return
        cache = self.rows.splice
        assert cache is not None and cache.layout is not None
        asking = np.flatnonzero(rows.host >= cache.layout.query)
        if len(asking) < self.schedule.query_block:
            asking = np.arange(max(0, len(rows) - self.schedule.query_block), len(rows))
        self._receive(splice_call_mass(query, rows, layer, spec, asking, cache.length))

    def _receive(self, mass: torch.Tensor | None) -> None:
        before, memory = self.received, self.schedule.memory
        if memory and mass is not None and before is not None and before.shape == mass.shape:
            mass = mass + memory * before.to(mass.device)
        self.received = mass

    def _queries(self) -> int:
        return max(self.schedule.query_block, self.query_tokens)

    # ------------------------------------------------------------------------------------------------------- the FFN
    def ffn(
        self, layer: int, original: Callable[..., Any], x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The FFN of ``x [batch, rows, dim]`` with the fill in rows that are left out; after `norm` left them out,
        ``x [1, n, dim]`` is those that pass."""
        gathered, self._gathered = self._gathered, None
        if gathered is not None and gathered[0] == layer:
            shape, index, few = gathered[1], gathered[2], x
        else:
            chosen = self._choose(layer, original, x)
            shape = x.shape[:2]
            if chosen is None:
                self.count(layer, shape.numel(), shape.numel())
                return original(x, *args, **kwargs)
            index, few = chosen, x.flatten(0, 1).index_select(0, chosen)[None]
        self.count(layer, shape.numel(), len(index))
        output = original(few, *gathered_rows(args, index, shape), **gathered_rows(kwargs, index, shape))
        result = first_of(output)
        whole = self._background(result[0], index, shape).index_copy_(0, index, result[0]).unflatten(0, shape)
        return whole if output is result else type(output)([whole, *output[1:]])

    def _background(self, few: torch.Tensor, index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """``[batch * rows, dim]``: what rows get that are left out, from what those got that passed, ``few [n, dim]``."""
        batch, rows = shape
        if self.schedule.fill == "nothing":
            return few.new_zeros(shape.numel(), few.shape[-1])
        counts = self._beyond_sinks(batch, rows, few.device).flatten()[index].float()
        # each sequence by itself: zero times another's infinity would be NaN
        sizes = [len(index)] if batch == 1 else torch.bincount(index // rows, minlength=batch).tolist()
        means = [
            (count / count.sum().clamp_min(1)).to(few.dtype) @ part
            for count, part in zip(counts.split(sizes), few.split(sizes), strict=True)
        ]
        return torch.stack(means)[:, None].expand(-1, rows, -1).flatten(0, 1).contiguous()

    def _beyond_sinks(self, batch: int, count: int, device: torch.device) -> torch.Tensor:
        """bool ``[batch, count]``: rows that are no sinks. What an FFN gives to a sink says nothing of other rows."""
        rows, sink = self.rows, self.schedule.sink
        if rows.splice is not None:
            assert rows.splice.rows is not None
            return upload(rows.splice.rows.host >= sink, device).expand(batch, -1)
        order = torch.arange(count, device=device).expand(batch, -1)
        if rows.real is not None:
            order = rows.real.to(device).cumsum(1) - 1
        past: Any = rows.past if rows.past_real is None else rows.past_real.to(device)[:, None]
        return order + past >= sink

    def norm(
        self, layer: int, original: Callable[..., Any], x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The norm before a layer's FFN: of the rows of ``x [batch, rows, dim]`` that pass, ``[1, n, dim]``, or of all."""
        self._gathered = None
        if self.rules[layer] is None or callable(self.schedule.importance):  # a callable looks at what the FFN gets
            return original(x, *args, **kwargs)
        index = self._choose(layer, original, x)
        if index is None:
            return original(x, *args, **kwargs)
        self._gathered = (layer, x.shape[:2], index)
        return original(x.flatten(0, 1).index_select(0, index)[None], *args, **kwargs)

    def _choose(self, layer: int, original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor | None:
        """Flat indices of the rows to run, or None for all."""
        if self._chosen is not None and self._chosen[0] == layer:  # an FFN of several modules
            return self._chosen[1]
        rule, index = self.rules[layer], None
        if rule is not None:
            with torch.no_grad():
                index = self._select(rule, layer, original, x)
        self._chosen = (layer, index)
        return index

    def _select(self, rule: Band, layer: int, original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor | None:
        batch, count = x.shape[:2]
        real = self.rows.real
        if real is not None and real.shape != (batch, count):
            return None
        importance = self._importance(layer, original, x) if rule.ranks else self._last_first(x)
        if importance is None or importance.shape != (batch, count):
            return None
        always, fixed = self._always_rows(batch, count, x.device)
        key = (rule.keep, rule.mass, rule.above_mean)
        known = self._known.get(key)
        if known is not None and known[0] is importance and known[1].device == x.device:
            return known[1]
        always = always.to(x.device)
        real = None if real is None else real.to(x.device)
        index = select_rows(importance.to(x.device), always, real, rule, self.schedule.bucket, fixed)
        if len(index) == batch * count:
            return None
        self._known[key] = (importance, index)
        return index

    def _last_first(self, x: torch.Tensor) -> torch.Tensor:
        """What ranks rows where importance has no say: recency."""
        if self._recency is None or self._recency.shape != x.shape[:2]:
            self._recency = torch.arange(x.shape[1], device=x.device, dtype=torch.float32).expand(x.shape[:2])
        return self._recency

    def _importance(self, layer: int, original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor | None:
        kind = self.schedule.importance
        if callable(kind):
            view = LayerView(layer, x, original, self.attention_output, self.input, self.previous_input, self.rows.real)
            return kind(view)
        if kind == "received_attention":
            return self.received
        if kind == "attention_norm":
            return None if self.attention_output is None else _norm(self.attention_output)
        before, now = self.previous_input, self.input
        if before is None or now is None or before.shape != now.shape:
            return None
        before = before.to(now.device)
        return _norm(now - before) / _norm(before).clamp_min(1e-12)

    def _always_rows(self, batch: int, count: int, device: torch.device) -> tuple[torch.Tensor, int | None]:
        """bool ``[batch, count]`` of the rows that always pass, and how many each sequence has if all have as many."""
        splice = self.rows.splice
        key = splice.rows if splice is not None else count
        if self._always is None or (self._always[0] is not key and self._always[0] != key):
            if splice is not None:
                always = self._always_in_splice(splice)
                mask = torch.from_numpy(always).to(device).expand(batch, -1)
                self._always = (key, mask, int(always.sum()))
            else:
                self._always = (key, *self._always_in_prompt(device))
        return self._always[1], self._always[2]

    def _always_in_prompt(self, device: torch.device) -> tuple[torch.Tensor, int | None]:
        rows = self.rows
        if rows.real is None and rows.past_real is None:  # one line for all sequences, counted without the device
            numbers = np.arange(rows.count)
            line = self._passes(numbers + rows.past, numbers, rows.count)
            return upload(line, device).expand(rows.batch, -1), int(line.sum())
        if rows.real is None:
            order = torch.arange(rows.count, device=device).expand(rows.batch, -1)
            total: Any = rows.count
        else:
            order = rows.real.to(device).cumsum(1) - 1
            total = order[:, -1:] + 1
        past = rows.past if rows.past_real is None else rows.past_real.to(device)[:, None]
        return self._passes(order + past, order, total), None

    def _passes(self, position: Any, order: Any, total: Any) -> Any:
        """Which rows always pass: ``position`` in the request, ``order`` among ``total`` real rows of the forward."""
        schedule = self.schedule
        always = (position < schedule.sink) | (order >= total - max(schedule.recent, self.query_tokens))
        for start in self.boundaries:
            always |= (position >= start) & (position < start + schedule.boundary)
        return always

    def _always_in_splice(self, cache: SpliceCache) -> np.ndarray:
        assert cache.rows is not None and cache.layout is not None
        position, schedule = cache.rows.host, self.schedule
        always = (position < schedule.sink) | (position >= min(cache.layout.query, cache.length - schedule.recent))
        for start in cache.layout.starts:
            always |= (position >= start) & (position < start + schedule.boundary)
        return always


class _Chained(Observer):
    """Passes a splice's calls on to whoever looked before, and then to the run."""

    def __init__(self, run: Run, other: Observer | None):
        self.run, self.other = run, other
        self.compares = other is not None and other.compares

    def rows(self, layer: SpliceLayer, rows: RowSet, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.other is not None:
            self.other.rows(layer, rows, k, v)

    def queries(self, layer: SpliceLayer, rows: RowSet, q: torch.Tensor, spec: Any) -> None:
        if self.other is not None:
            self.other.queries(layer, rows, q, spec)
        self.run.see_splice(layer, rows, q, spec)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
