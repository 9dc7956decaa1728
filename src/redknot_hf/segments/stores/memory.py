"""Entries in this process's memory, as tensors: the fastest tier. It knows nothing of other processes."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from redknot_hf.errors import RedKnotError, shorten
from redknot_hf.segments.codec import CorruptEntry, SegmentEntry, Verify
from redknot_hf.segments.stores.base import Flags, SegmentStore
from redknot_hf.segments.stores.types import StoreFull, StoreRecord

__all__ = ["MemoryStore"]


@dataclasses.dataclass
class _Held:
    entry: SegmentEntry
    versions: dict[str, int]
    last_used: float


class MemoryStore(SegmentStore):
    """`memory://`: keeps copies of the tensors, least recently used out first.

    Nothing is hashed here, so a hit costs no pass over the bytes. Instead the store remembers the tensors' version
    counters: an entry that its reader has written to is noticed and dropped.

    Args:
        url: `memory://`; two stores are always separate.
        device: where the tensors are kept; a GPU makes the warmest tier.
        pin_memory: keep them in page-locked host memory, from which copies to a GPU are fast and asynchronous.
        **options: see `SegmentStore`.
    """

    tier = "memory"

    def __init__(
        self, url: Any = "memory://", *, device: str | torch.device = "cpu", pin_memory: bool = False, **options: Any
    ) -> None:
        super().__init__(url, **options)
        if str(url).lower() != "memory://":
            raise RedKnotError(f"url: a memory store has no name or options in its URL, got {shorten(self.url)}")
        self._device = torch.device(device)
        self._pin = pin_memory and self._device.type == "cpu"
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._bytes = 0

    def _load_many(self, names: Sequence[str]) -> Sequence[Any]:
        with self._lock:
            return [self._held.get(name) for name in names]

    def _touch(self, names: Sequence[str]) -> None:
        with self._lock:
            for name in names:
                if name in self._held:  # it may have been evicted meanwhile
                    self._held[name].last_used = time.time()
                    self._held.move_to_end(name)

    def _open(self, name: str, item: _Held, verify: Verify) -> SegmentEntry:
        if item.entry.key != name:
            raise CorruptEntry(f"the entry belongs to another key, {shorten(item.entry.key)}")
        for tensor_name, tensor in item.entry.tensors.items():
            if tensor._version != item.versions[tensor_name]:
                raise CorruptEntry(f"a reader has written to its tensor {tensor_name!r}")
        return dataclasses.replace(item.entry, tensors=dict(item.entry.tensors), extra=dict(item.entry.extra))

    def _save_many(self, items: Sequence[tuple[str, SegmentEntry]]) -> Flags:
        return [self._save(name, entry) for name, entry in items]

    def _save(self, name: str, entry: SegmentEntry) -> bool:
        nbytes = entry.nbytes
        if self.max_bytes is not None and nbytes > self.max_bytes:
            self._warn_full(StoreFull(f"an entry of {nbytes} bytes is larger than max_bytes={self.max_bytes}"))
            return False
        # Copies made inside inference mode would have no version counter.
        with torch.inference_mode(False):
            tensors = {n: self._copy(t) for n, t in entry.tensors.items()}
        held = _Held(
            dataclasses.replace(entry, tensors=tensors, extra=dict(entry.extra)),
            {n: t._version for n, t in tensors.items()},
            time.time(),
        )
        with self._lock:
            self._drop(name)
            while self.max_bytes is not None and self._bytes + nbytes > self.max_bytes:
                self._drop(next(iter(self._held)))
                self._stat.evictions += 1
            self._held[name] = held
            self._bytes += nbytes
        return True

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device, pin_memory=self._pin)
        return copy.copy_(tensor.detach())

    def _drop(self, name: str) -> bool:
        held = self._held.pop(name, None)
        if held is not None:
            self._bytes -= held.entry.nbytes
        return held is not None

    def _has(self, name: str) -> bool:
        with self._lock:
            return name in self._held

    def _remove(self, name: str) -> bool:
        with self._lock:
            return self._drop(name)

    def _records(self) -> Iterable[StoreRecord]:
        with self._lock:
            return [StoreRecord(name, held.entry.nbytes, held.last_used) for name, held in self._held.items()]

    def close(self) -> None:
        with self._lock:
            self._held.clear()
            self._bytes = 0
