"""A paged layer next to what it should mean: plain lists of keys and values, and attention by definition.

`PagedLayer` drives `LayerPages` and the torch attention and repeats every operation on lists of tokens. It checks
outputs, page counts and reference counts after each step. It draws nothing itself: tests choose the operations.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redknot_hf.errors import RollbackExceeded
from redknot_hf.layer import effective_window
from redknot_hf.paging import torch_attention
from redknot_hf.paging.pages import KEEP_ALL, LayerPages
from redknot_hf.paging.pool import PagePool
from redknot_hf.paging.torch_attention import AttentionSpec

KEY_DIM, VALUE_DIM, GROUP = 4, 6, 2
SCALE = 0.7


def make_pool(page_size: int, dtype: torch.dtype = torch.float32) -> PagePool:
    return PagePool(page_size, KEY_DIM, VALUE_DIM, dtype, torch.device("cpu"))


class PagedLayer:
    """One layer's pages and its mirror.

    Args:
        pool: may serve several layers.
        sink, window: per head; a window of None keeps everything.
        model_window: the model's own sliding window, or None.
        softcap, sinks: score modifications; ``sinks`` gives every query head an attention sink.
    """

    def __init__(
        self, pool, sink, window, batch, rollback=0, contiguous=True, model_window=None, softcap=0.0, sinks=False
    ):
        self.rule = [(s if w else 0, w or KEEP_ALL) for s, w in zip(sink, window, strict=True)]
        self.model_window = model_window
        stored_sink, stored_window, extra = effective_window(
            np.array([s for s, _ in self.rule]), np.array([w for _, w in self.rule]), model_window
        )
        self.pages = LayerPages(pool, stored_sink, stored_window, batch, rollback, contiguous)
        aux = torch.linspace(-1, 1, GROUP * len(sink)) if sinks else None
        self.spec = AttentionSpec(SCALE, softcap, aux, extra)
        self.keys = [torch.zeros(len(sink), 0, KEY_DIM) for _ in range(batch)]
        self.values = [torch.zeros(len(sink), 0, VALUE_DIM) for _ in range(batch)]
        # first position that the rings still hold, per row and head: what `crop` may count on
        self.kept_from = np.zeros((batch, len(sink)), np.int64)

    @property
    def lens(self) -> list[int]:
        return [rows.shape[1] for rows in self.keys]

    def feed(self, new: list[int], generator: torch.Generator, commit: bool = True) -> None:
        """Attend and store ``new[b]`` tokens of row ``b``; compare every real query's output."""
        heads, batch, length = len(self.rule), len(new), max(new)
        q = torch.randn(batch, heads * GROUP, length, KEY_DIM, generator=generator)
        k = torch.randn(batch, heads, length, KEY_DIM, generator=generator)
        v = torch.randn(batch, heads, length, VALUE_DIM, generator=generator)
        counts = np.array(new, np.int64)
        before = self.lens
        for row, count in enumerate(new):
            self.keys[row] = torch.cat([self.keys[row], k[row, :, :count]], 1)
            self.values[row] = torch.cat([self.values[row], v[row, :, :count]], 1)
        self.pages.prepare(counts)
        if length == 1 and all(new):
            self.pages.write(k, v, counts)
            self.pages.advance(counts)
            out = torch_attention.decode(self.pages, q, self.spec)
        else:
            out = torch_attention.prefill(self.pages, q, k, v, counts, self.spec, commit=commit)
            if not commit:
                self.pages.write(k, v, counts)
                self.pages.advance(counts)
        ring = np.array([KEEP_ALL if w >= KEEP_ALL else w + self.pages.rollback for w in self.stored_window])
        self.kept_from = np.maximum(self.kept_from, np.array(self.lens)[:, None] - ring)
        for row, count in enumerate(new):
            for index in range(0, count, 1 + count // 40):  # of a long chunk every few
                want = self.expected(row, before[row] + index, q[row, :, index])
                torch.testing.assert_close(out[row, index], want, atol=2e-5, rtol=1e-4)
        self.check()

    @property
    def stored_window(self) -> list[int]:
        return [min(w, self.model_window or KEEP_ALL) for _, w in self.rule]

    @property
    def stored_sink(self) -> list[int]:
        return [s if w < (self.model_window or KEEP_ALL) else 0 for s, w in self.rule]

    def expected(self, row: int, position: int, query: torch.Tensor) -> torch.Tensor:
        """Output of one query, ``[q_heads, value_dim]``, from the definition."""
        outs = []
        at = torch.arange(self.lens[row])
        for head, (sink, window) in enumerate(self.rule):
            seen = (at <= position) & ((at < sink) | (at > position - window))
            if self.model_window:
                seen &= at > position - self.model_window
            for member in range(GROUP):
                index = head * GROUP + member
                scores = self.keys[row][head][seen].double() @ query[index].double() * SCALE
                if self.spec.softcap:
                    scores = self.spec.softcap * torch.tanh(scores / self.spec.softcap)
                if self.spec.s_aux is not None:
                    scores = torch.cat([scores, self.spec.s_aux[index].double()[None]])
                weights = scores.softmax(0)[: int(seen.sum())]
                outs.append(weights @ self.values[row][head][seen].double())
        return torch.stack(outs).float()

    def crop(self, removed: list[int]) -> bool:
        """Take tokens back; whether that is allowed must be exactly what the mirror says."""
        allowed = True
        for row, count in enumerate(removed):
            left = self.lens[row] - count
            for head, (sink, window) in enumerate(zip(self.stored_sink, self.stored_window, strict=True)):
                needed = max(sink, left - window + 1)  # the oldest token that the next query sees
                if window < KEEP_ALL and max(self.kept_from[row, head], sink) > needed:
                    allowed = False
        counts = np.array(removed, np.int64)
        if not allowed:
            table, lens = self.pages.table.copy(), self.pages.lens.copy()
            with pytest.raises(RollbackExceeded, match="rollback="):
                self.pages.check_crop(counts)
            assert (self.pages.table == table).all() and (self.pages.lens == lens).all()
            return False
        self.pages.check_crop(counts)
        self.pages.crop(counts)
        for row, count in enumerate(removed):
            self.keys[row] = self.keys[row][:, : self.lens[row] - count]
            self.values[row] = self.values[row][:, : self.keys[row].shape[1]]
        self.check()
        return True

    def select(self, rows: list[int]) -> None:
        self.pages.select(np.array(rows))
        self.keys = [self.keys[row] for row in rows]
        self.values = [self.values[row] for row in rows]
        self.kept_from = self.kept_from[rows]
        self.check()

    def set_rollback(self, rollback: int) -> None:
        if rollback < self.pages.rollback:
            ring = np.array([KEEP_ALL if w >= KEEP_ALL else w + rollback for w in self.stored_window])
            self.kept_from = np.maximum(self.kept_from, np.array(self.lens)[:, None] - ring)
        self.pages.set_rollback(rollback)
        self.check()

    def fork(self) -> PagedLayer:
        twin = object.__new__(PagedLayer)
        twin.__dict__.update(self.__dict__)
        twin.pages, twin.kept_from = self.pages.fork(), self.kept_from.copy()
        twin.keys, twin.values = list(self.keys), list(self.values)
        return twin

    def check(self) -> None:
        """Every head holds exactly the pages of its stored tokens: the ragged ideal, rounded up to pages."""
        size = self.pages.pool.page_size
        for row, length in enumerate(self.lens):
            for head, (sink, window) in enumerate(zip(self.stored_sink, self.stored_window, strict=True)):
                kept = length if window >= KEEP_ALL else min(length, sink + window + self.pages.rollback)
                assert int((self.pages.table[row, head] > 0).sum()) == -(-kept // size), (row, head, kept)
        assert self.pages.lens.tolist() == self.lens


def check_references(pool: PagePool, layers: list[PagedLayer]) -> None:
    """The pool's counts are the number of table entries of each page; nothing leaks, nothing is freed twice."""
    counted = np.zeros_like(pool.refs)
    for layer in layers:
        np.add.at(counted, layer.pages.table[layer.pages.table > 0], 1)
    counted[0] = 1
    assert (counted == pool.refs).all()
