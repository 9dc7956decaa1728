"""`SegmentedPrompt` on all ranks of a tensor-parallel model, with entries that any number of ranks can read.

A segment is stored as one entry per KV head. A rank stores and fetches its own heads, and a segment counts as there only
if every rank has all of its heads: otherwise one rank would compute while another one waits for it. Rows to recompute are
chosen by all ranks together, from the mean of what their heads say.

What is computed by one process is found by four, and the other way round, as long as both use this class.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import RedKnotError
from ..heads import HeadProfile
from ..heads.order import config_order
from ..segments.codec import SegmentEntry
from ..segments.keys import SegmentKey, hash_fields
from ..segments.prompt import DEFAULT_RATIO, DEFAULT_SELECTOR, SegmentedPrompt, SplicedBatch, SplicedPrompt, Tokens
from ..segments.select import PromptView, Selector, selector_of
from ..segments.stores import SegmentStore, StoreRecord
from .ranks import Ranks
from .weights import weights_digest

__all__ = ["HeadStore", "WorldPrompt"]


class HeadStore(SegmentStore):
    """A store in front of another one that keeps each KV head of a segment apart. All ranks make the same calls.

    Args:
        inner: where the heads go.
        ranks: who shares the heads.
        heads: KV heads of all ranks.
        model: what stands for the model in keys instead of a rank's own fingerprint: the same on all ranks.
    """

    def __init__(self, inner: SegmentStore, ranks: Ranks, heads: int, model: str):
        super().__init__(inner.url)
        self.inner, self.ranks, self.model = inner, ranks, model
        count = heads // ranks.size
        self.heads = range(ranks.rank * count, (ranks.rank + 1) * count)
        self.tier = inner.tier

    def _names(self, key: SegmentKey | str) -> list[str]:
        if not isinstance(key, SegmentKey):
            raise RedKnotError("a HeadStore finds segments by their SegmentKey")
        whole = dataclasses.replace(key, model=self.model).hex.encode()
        return [hash_fields("redknot-hf/segment-head/1", [whole, b"%d" % head]) for head in self.heads]

    def get_many(self, keys: Sequence[SegmentKey | str], *, defer: bool = False) -> list[SegmentEntry | None]:
        """Entries with this rank's heads; None unless all ranks have theirs. They are hashed at once: ``defer`` is not."""
        names = [self._names(key) for key in keys]
        parts = iter(self.inner.get_many([name for each in names for name in each]))
        found = [_joined([next(parts) for _ in each]) for each in names]
        everywhere = self.ranks.exchange([entry is not None for entry in found])
        return [entry if all(there) else None for entry, *there in zip(found, *everywhere, strict=True)]

    def put_many(self, items: Any) -> list[bool]:
        results = []
        for key, entry in items:
            parts = [(name, _one_head(entry, position)) for position, name in enumerate(self._names(key))]
            results.append(all(self.inner.put_many(parts)))
        return results

    def contains(self, key: SegmentKey | str) -> bool:
        """Whether all ranks have their heads."""
        return all(self.ranks.exchange(all(self.inner.contains(name) for name in self._names(key))))

    def delete(self, key: SegmentKey | str) -> bool:
        return all([self.inner.delete(name) for name in self._names(key)])

    def list(self) -> list[StoreRecord]:
        """Entries of the inner store, one per head."""
        return self.inner.list()

    def close(self) -> None:
        self.inner.close()


def _one_head(entry: SegmentEntry, position: int) -> SegmentEntry:
    tensors = {name: tensor[:, position : position + 1] for name, tensor in entry.tensors.items()}
    return SegmentEntry(tensors, entry.num_tokens, entry.start, entry.extra)


def _joined(parts: Sequence[SegmentEntry | None]) -> SegmentEntry | None:
    """One entry from single heads; None if one is missing or does not belong to the others."""
    first = parts[0]
    if first is None or any(part is None for part in parts):
        return None
    alike = [(p.num_tokens, p.start, p.extra, {n: (t.shape, t.dtype) for n, t in p.tensors.items()}) for p in parts]  # type: ignore[union-attr]
    if any(each != alike[0] for each in alike) or any(t.dim() != 4 or t.shape[1] != 1 for t in first.tensors.values()):
        return None
    tensors = {name: torch.cat([part.tensors[name] for part in parts], 1) for name in first.tensors}  # type: ignore[union-attr]
    return dataclasses.replace(first, tensors=tensors, source=None)  # no file holds them together


class WorldPrompt(SegmentedPrompt):
    """A `SegmentedPrompt` that all ranks of a model build together; every rank makes the same calls.

    Args:
        model, tokenizer, store, profile: as for `SegmentedPrompt`; the profile is that of the whole model.
        group: process group of the ranks, where it is not the default one.
        **options: as for `SegmentedPrompt`.

    Example:
        >>> prompt = WorldPrompt(model, tokenizer, "valkey://cache.example:6379", header="You answer questions.")
        >>> model.generate(**prompt.build([prompt.add(text)], "Who wrote it?"))          # on every rank
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: SegmentStore | str,
        profile: HeadProfile | str | None = None,
        *,
        group: Any = None,
        **options: Any,
    ):
        self._ranks = Ranks.of_model(model.config, model, group)
        self._ranks.require("build prompts")
        opened = store if isinstance(store, SegmentStore) else SegmentStore(store)
        order = json.dumps(config_order(model.config)).encode()
        digest = hash_fields("redknot-hf/whole-model/1", [weights_digest(model, self._ranks).encode(), order])
        heads = HeadProfile.all_global(model.config).num_kv_heads
        super().__init__(model, tokenizer, HeadStore(opened, self._ranks, heads, digest), profile, **options)

    def build(
        self,
        segments: Sequence[Tokens],
        query: Tokens = "",
        recompute: float | Sequence[float] = DEFAULT_RATIO,
        selector: str | Selector = DEFAULT_SELECTOR,
        *,
        relocate: bool = True,
    ) -> SplicedPrompt:
        """As `SegmentedPrompt.build`; the account is that of this rank's heads."""
        return super().build(segments, query, recompute, self._together(selector), relocate=relocate)

    def build_many(
        self,
        segments: Sequence[Sequence[Tokens]],
        queries: Sequence[Tokens],
        recompute: float | Sequence[float] = DEFAULT_RATIO,
        selector: str | Selector = DEFAULT_SELECTOR,
        *,
        relocate: bool = True,
    ) -> SplicedBatch:
        """As `SegmentedPrompt.build_many`; the accounts are those of this rank's heads."""
        return super().build_many(segments, queries, recompute, self._together(selector), relocate=relocate)

    def _together(self, selector: str | Selector) -> str | Selector:
        return selector if self._ranks.size == 1 else _Together(selector_of(selector), self._ranks)


class _Together:
    """A selector whose answer is the same on all ranks: the mean of scores, otherwise what rank 0 says."""

    def __init__(self, selector: Callable[[PromptView], Any], ranks: Ranks):
        self.selector, self.ranks = selector, ranks
        self.name = getattr(selector, "name", type(selector).__name__)

    def __call__(self, view: PromptView) -> Any:
        answer = self.selector(view)
        if isinstance(answer, tuple):
            rows, mask, *heads = answer
            return (self._agreed(rows), self._agreed(mask), *heads)
        return self._agreed(answer)

    def _agreed(self, values: Any) -> np.ndarray:
        mine = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        everyone = [np.array(said, mine.dtype) for said in self.ranks.exchange(mine.tolist())]
        if np.issubdtype(mine.dtype, np.floating) and all(each.shape == mine.shape for each in everyone):
            return np.mean(np.stack(everyone), axis=0, dtype=np.float64).astype(mine.dtype)
        return everyone[0]
