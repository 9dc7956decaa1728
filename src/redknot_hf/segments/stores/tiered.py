"""A chain of stores, fastest first: reads go down until one has the entry and bring it up, writes go to all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from redknot_hf.errors import RedKnotError
from redknot_hf.segments.stores.base import Batch, Entries, Flags, Key, Records, SegmentStore
from redknot_hf.segments.stores.types import GcReport, StoreRecord, StoreStat

__all__ = ["TieredStore"]


class TieredStore(SegmentStore):
    """`SegmentStore(["memory://", "file:///dir", "valkey://host:port"])`, or of stores that are already open.

    A tier that is down or loses an entry costs nothing but speed: the next one is asked. The entry's `tier` says where
    it was found. Evicting is each tier's own affair.

    Args:
        tiers: urls or stores, fastest first.
        promote: copy an entry that was found further down into all tiers above.
        **options: given to the tiers that are opened here (`verify`, `secret`, ...).
    """

    tier = "tiered"

    def __init__(self, tiers: Sequence[Any], *, promote: bool = True, **options: Any) -> None:
        if not tiers:
            raise RedKnotError("url: a tier chain needs at least one store, got an empty list")
        if "max_bytes" in options:
            raise RedKnotError(
                "max_bytes: every tier has its own; open the tiers first: "
                "SegmentStore([SegmentStore('memory://', max_bytes=...), 'file:///dir'])"
            )
        self.tiers = [t if isinstance(t, SegmentStore) else SegmentStore(t, **options) for t in tiers]
        super().__init__(" > ".join(tier.url for tier in self.tiers), **options)
        self._promote = promote

    def get_many(self, keys: Sequence[Key], *, defer: bool = False) -> Entries:
        found: Entries = [None] * len(keys)
        for level, tier in enumerate(self.tiers):
            missing = [i for i, entry in enumerate(found) if entry is None]
            if not missing:
                break
            wanted = [keys[i] for i in missing]
            later = defer and not (self._promote and level)  # only what has been hashed is copied into other tiers
            fresh = [
                (i, entry)
                for i, entry in zip(missing, tier.get_many(wanted, defer=later), strict=True)
                if entry is not None
            ]
            for i, entry in fresh:
                found[i] = entry
            if fresh and self._promote:
                for upper in self.tiers[:level]:
                    upper.put_many([(keys[i], entry) for i, entry in fresh])
        with self._lock:
            self._stat.hits += sum(entry is not None for entry in found)
            self._stat.misses += sum(entry is None for entry in found)
        return found

    def put_many(self, items: Batch) -> Flags:
        """Write through; True if at least one tier has the entry now."""
        batch = list(items)
        stored = [False] * len(batch)
        for tier in self.tiers:
            stored = [a or b for a, b in zip(stored, tier.put_many(batch), strict=True)]
        with self._lock:
            self._stat.puts += sum(stored)
        return stored

    def discard(self, key: Key, error: Exception, tier: str = "") -> None:
        for store in self.tiers:
            if tier in ("", store.tier):
                store.discard(key, error, tier)

    def contains(self, key: Key) -> bool:
        return any(tier.contains(key) for tier in self.tiers)

    def delete(self, key: Key) -> bool:
        return any([tier.delete(key) for tier in self.tiers])  # a list: every tier must delete

    def list(self) -> Records:
        """Entries of any tier, each once, with its latest use."""
        merged: dict[str, StoreRecord] = {}
        for tier in self.tiers:
            for record in tier.list():
                known = merged.get(record.key)
                if known is None or record.last_used > known.last_used:
                    merged[record.key] = record
        return sorted(merged.values(), key=lambda record: (record.last_used, record.key))

    def stats(self) -> Sequence[StoreStat]:
        """One `StoreStat` per tier."""
        return [tier.stat() for tier in self.tiers]

    def gc(self, *, max_bytes: int | None = None, older_than: float | None = None) -> GcReport:
        """`gc` of every tier, summed. `max_bytes` holds for each tier."""
        reports = [tier.gc(max_bytes=max_bytes, older_than=older_than) for tier in self.tiers]
        return GcReport(**{f.name: sum(getattr(r, f.name) for r in reports) for f in dataclasses.fields(GcReport)})

    def verify(self, *, delete: bool = False) -> Iterator[tuple[StoreRecord, str | None]]:
        for tier in self.tiers:
            yield from tier.verify(delete=delete)

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()
