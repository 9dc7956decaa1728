"""What every segment store does, whatever it is made of: the protocol, and what happens when something goes wrong.

A store may lose entries at any time; it may never return a wrong one. So everything that can go wrong on the way to a
prompt (a store that is down, a damaged or foreign entry, a full disk) ends in a miss or in `put` returning False, with
one warning, and the prompt is computed. Administration (`list`, `stat`, `gc`, `verify`) is for people and raises
instead.

A store that does not answer within its `timeout` is left alone for `retry_after` seconds: until then every call is a
miss at once, so a dead server costs a prompt one timeout and not one per segment.

This module does not know how any store keeps its bytes, nor what an entry means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from redknot_hf.errors import RedKnotError, shorten
from redknot_hf.segments.codec import CorruptEntry, SegmentEntry, UnreadableEntry, Verify, decode, encode
from redknot_hf.segments.keys import SegmentKey, key_hex
from redknot_hf.segments.stores.types import (
    GcReport,
    StoreFull,
    StoreRecord,
    StoreStat,
    StoreUnavailable,
    private_parts,
    redact,
)

__all__ = ["Batch", "BytesStore", "Entries", "Flags", "Key", "Records", "SegmentStore"]

logger = logging.getLogger("redknot_hf.segments.stores")

T = TypeVar("T")
Key = SegmentKey | str
Batch = Iterable[tuple[Key, SegmentEntry]]
# The class has a method called `list`, which hides the type in its annotations.
Flags = list[bool]
Entries = list[SegmentEntry | None]
Records = list[StoreRecord]


class SegmentStore:
    """`SegmentStore(url)` opens a store; several urls or stores in a list make a tier chain.

    Args:
        url: `memory://`, `file:///directory`, any fsspec URL such as `s3://bucket/prefix`, `valkey://host:port`,
            `mooncake://host:port`, a path object, or a list of those, fastest first.
        max_bytes: ceiling; the least recently used entries go first. None: no ceiling of ours. Not for a list: give
            each tier its own.
        timeout: seconds a call may wait without an answer before it counts as a miss; None for the kind's default.
        verify: `"full"` checks the checksum of every byte that is read, `"header"` only structure and description.
        secret: entries are sealed and checked with it; None reads the environment variable REDKNOT_STORE_SECRET.
            Give one where somebody else can write to the store.
        retry_after: seconds to leave an unavailable store alone.
        **options: what the kind takes besides; see its class.

    Raises:
        RedKnotError: for a URL that no store serves or an option that makes no sense.
        MissingExtraError: if the kind's client package is not installed.
    """

    tier: str = ""
    default_timeout = 30.0
    rereads = 0
    """How often a damaged read is repeated before the entry counts as damaged: for stores without snapshots."""

    def __new__(cls, url: Any = None, *args: Any, **kwargs: Any) -> SegmentStore:
        if cls is SegmentStore:
            from redknot_hf.segments.stores.factory import store_class

            cls = store_class(url)
        return super().__new__(cls)

    def __init__(
        self,
        url: Any,
        *,
        max_bytes: int | None = None,
        timeout: float | None = None,
        verify: Verify = "full",
        secret: bytes | str | None = None,
        retry_after: float = 30.0,
    ) -> None:
        if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes <= 0):
            raise RedKnotError(f"max_bytes must be a positive number of bytes or None, got {shorten(max_bytes)}")
        if timeout is not None and timeout <= 0:
            raise RedKnotError(f"timeout must be a positive number of seconds or None, got {shorten(timeout)}")
        if verify not in ("full", "header"):
            raise RedKnotError(f"verify must be 'full' or 'header', got {shorten(verify)}")
        secret = secret if secret is not None else os.environ.get("REDKNOT_STORE_SECRET") or None
        self.url = redact(str(url))
        self.max_bytes = max_bytes
        self.timeout = timeout if timeout is not None else self.default_timeout
        self.verify_mode: Verify = verify
        self.retry_after = retry_after
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._private = private_parts(str(url))
        self._lock = threading.RLock()
        self._stat = StoreStat(self.url, self.tier, 0, 0, max_bytes)
        self._down_until = 0.0
        self._warned_down = False
        self._warned_full = False
        self._warned_refused = False
        self._bad: set[str] = set()

    # -- what callers use ------------------------------------------------------------------------------------------

    def get(self, key: Key) -> SegmentEntry | None:
        """The entry, or None. Its tensors are on the host and belong to the store: never write to them."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[Key], *, defer: bool = False) -> Entries:
        """One result per key, in order; fewer round trips than as many `get`s.

        Args:
            defer: the caller hashes the bytes while it does something else: entries may come with a `check` that must
                be called before anything that depends on them is used. Report one that fails to `discard`.
        """
        names = [key_hex(key) for key in keys]
        nothing: Sequence[Any] = [None] * len(names)
        raw = self._guard("get", lambda: self._load_many(names), nothing)
        verify: Verify = "later" if defer and self.verify_mode == "full" else self.verify_mode
        found = [self._checked(key, name, item, verify) for key, name, item in zip(keys, names, raw, strict=True)]
        hits = [name for name, entry in zip(names, found, strict=True) if entry is not None]
        if hits:
            self._guard("get", lambda: self._touch(hits), None)
        with self._lock:
            self._stat.hits += sum(entry is not None for entry in found)
            self._stat.misses += sum(entry is None for entry in found)
        return found

    def put(self, key: Key, entry: SegmentEntry) -> bool:
        """Store an entry under a key, replacing what is there. False if it could not be stored (one warning says why).

        Raises:
            RedKnotError: if the entry itself cannot be stored anywhere: a dtype or an `extra` that has no byte form.
        """
        return self.put_many([(key, entry)])[0]

    def put_many(self, items: Batch) -> Flags:
        """Store several entries; one result each."""
        named = [(key_hex(key), _stamped(key, entry)) for key, entry in items]
        for _, entry in named:
            if entry.check is not None:  # nothing unhashed is passed on
                entry.check()
        if not named:
            return []
        results = self._guard("put", lambda: self._save_many(named), [False] * len(named))
        with self._lock:
            self._stat.puts += sum(results)
            self._bad.difference_update(name for (name, _), ok in zip(named, results, strict=True) if ok)
        return results

    def contains(self, key: Key) -> bool:
        """Whether there is an entry; `get` may still miss, if it turns out damaged or is evicted meanwhile."""
        name = key_hex(key)
        return self._guard("contains", lambda: self._has(name), False)

    def delete(self, key: Key) -> bool:
        """Remove an entry; False if there was none (or the store is unavailable)."""
        name = key_hex(key)
        return self._guard("delete", lambda: self._remove(name), False)

    def list(self) -> Records:
        """All entries, least recently used first. Raises StoreUnavailable."""
        return sorted(self._admin(self._records), key=lambda record: (record.last_used, record.key))

    def stat(self) -> StoreStat:
        """Entries and bytes in the store, and this object's counters. Raises StoreUnavailable."""
        records = self.list()
        with self._lock:
            return dataclasses.replace(self._stat, entries=len(records), nbytes=sum(r.nbytes for r in records))

    def gc(self, *, max_bytes: int | None = None, older_than: float | None = None) -> GcReport:
        """Remove leftovers of interrupted writes, entries unused for `older_than` seconds, then the least recently used
        ones until `max_bytes` (default: the store's own ceiling) is kept. Raises StoreUnavailable."""
        report = GcReport()
        self._admin(lambda: self._sweep(report))
        ceiling = max_bytes if max_bytes is not None else self.max_bytes
        records = self.list()
        total = sum(r.nbytes for r in records)
        now = time.time()
        for record in records:
            too_old = older_than is not None and now - record.last_used > older_than
            if too_old or (ceiling is not None and total > ceiling):
                self._admin(functools.partial(self._remove, record.key))
                total -= record.nbytes
                report.removed += 1
                report.freed_bytes += record.nbytes
        report.kept, report.kept_bytes = len(records) - report.removed, total
        return report

    def verify(self, *, delete: bool = False) -> Iterator[tuple[StoreRecord, str | None]]:
        """Read every entry in full; yields (record, what is wrong or None). It does not count as a use of the entries.
        Raises StoreUnavailable.

        Args:
            delete: remove the entries that are damaged (never those that are only unreadable here).
        """
        for record in self.list():
            try:
                item = self._admin(functools.partial(self._load_many, [record.key]))[0]
                if item is not None:
                    self._open(record.key, item, "full")
                yield record, None if item is not None else "vanished"
            except UnreadableEntry as e:
                yield record, str(e)
            except CorruptEntry as e:
                if delete:
                    self._admin(functools.partial(self._remove, record.key))
                yield record, str(e)

    def close(self) -> None:
        """Give connections and memory back. Entries that were handed out stay valid."""

    def __enter__(self) -> SegmentStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, max_bytes={self.max_bytes})"

    # -- what a kind of store implements ---------------------------------------------------------------------------
    # Any of these may raise StoreUnavailable, StoreFull or OSError.

    def _load_many(self, names: Sequence[str]) -> Sequence[Any]:
        """For each key what `_open` takes, an exception to report for it (CorruptEntry), or None."""
        raise NotImplementedError

    def _open(self, name: str, item: Any, verify: Verify) -> SegmentEntry:
        """The entry of a loaded item. Raises CorruptEntry or UnreadableEntry."""
        raise NotImplementedError

    def _save_many(self, items: Sequence[tuple[str, SegmentEntry]]) -> Flags:
        raise NotImplementedError

    def _has(self, name: str) -> bool:
        raise NotImplementedError

    def _remove(self, name: str) -> bool:
        raise NotImplementedError

    def _records(self) -> Iterable[StoreRecord]:
        raise NotImplementedError

    def _touch(self, names: Sequence[str]) -> None:
        """Note that these entries were used just now, if this kind of store has a place for it."""

    def _sweep(self, report: GcReport) -> None:
        """Remove what interrupted writes have left behind."""

    # -- faults ----------------------------------------------------------------------------------------------------

    def discard(self, key: Key, error: Exception, tier: str = "") -> None:
        """An entry that came from ``tier`` is damaged: delete it, with one warning."""
        name = key_hex(key)
        with self._lock:
            self._stat.corrupt += 1
        self._report_bad(name, f"is damaged: {error}; deleted and treated as missing")
        with contextlib.suppress(StoreUnavailable, OSError):  # a read-only store keeps it; it will not warn again
            self._remove(name)

    def _checked(self, key: Key, name: str, item: Any, verify: Verify) -> SegmentEntry | None:
        if item is None:
            return None
        try:
            if isinstance(item, Exception):
                raise item
            entry = self._open_again(name, item, verify)
            _check_identity(key, entry)
        except UnreadableEntry as e:
            self._report_bad(name, f"cannot be used here: {e}; treated as missing")
            return None
        except (CorruptEntry, OSError) as e:
            self.discard(key, e)
            return None
        entry.tier = entry.tier or self.tier
        return entry

    def _open_again(self, name: str, item: Any, verify: Verify) -> SegmentEntry:
        if self.rereads and verify == "later":
            verify = "full"  # only what has been hashed tells whether to read again
        for _ in range(self.rereads):
            try:
                return self._open(name, item, verify)
            except CorruptEntry:
                time.sleep(0.02)
                nothing: Sequence[Any] = [None]
                again = self._guard("get", lambda: self._load_many([name]), nothing)[0]
                item = item if again is None else again
        return self._open(name, item, verify)

    def _report_bad(self, name: str, text: str) -> None:
        # Once per entry: one that cannot be deleted would otherwise warn on every prompt.
        with self._lock:
            known = name in self._bad
            self._bad.add(name)
        logger.log(
            logging.DEBUG if known else logging.WARNING, "%s: entry %s %s", self.url, name[:12], self._scrub(text)
        )

    def _guard(self, what: str, action: Callable[[], T], otherwise: T) -> T:
        """Run `action`; if the store fails, warn once and give `otherwise`."""
        if time.monotonic() < self._down_until:
            return otherwise
        try:
            result = action()
        except StoreFull as e:
            self._warn_full(e)
            return otherwise
        except (StoreUnavailable, OSError) as e:
            if isinstance(e, PermissionError) or getattr(e, "errno", None) == errno.EROFS:
                self._warn_refused(what, e)  # it is there, and can be read: no outage
            else:
                self._note_failure(what, e)
            return otherwise
        self._warned_down = False
        return result

    def _note_failure(self, what: str, error: Exception) -> None:
        with self._lock:
            self._stat.failures += 1
            self._down_until = time.monotonic() + self.retry_after
            level, self._warned_down = (logging.DEBUG if self._warned_down else logging.WARNING), True
        logger.log(
            level,
            "%s: %s failed (%s); segments are computed instead, next attempt in %g s",
            self.url,
            what,
            self._scrub(f"{type(error).__name__}: {error}"),
            self.retry_after,
        )

    def _warn_refused(self, what: str, error: Exception) -> None:
        with self._lock:
            level, self._warned_refused = (logging.DEBUG if self._warned_refused else logging.WARNING), True
            self._stat.failures += 1
        text = self._scrub(f"{type(error).__name__}: {error}")
        logger.log(level, "%s: %s refused (%s); what is there is still read", self.url, what, text)

    def _warn_full(self, error: Exception) -> None:
        with self._lock:
            level, self._warned_full = (logging.DEBUG if self._warned_full else logging.WARNING), True
            self._stat.failures += 1
        logger.log(level, "%s: not stored: %s", self.url, self._scrub(str(error)))

    def _admin(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except StoreUnavailable as e:
            raise StoreUnavailable(f"store {self.url}: {self._scrub(str(e))}") from None
        except OSError as e:
            raise StoreUnavailable(f"store {self.url}: {self._scrub(f'{type(e).__name__}: {e}')}") from None

    def _scrub(self, text: str) -> str:
        """Error texts of client libraries may quote the URL: take user names, passwords and tokens out."""
        for part in self._private:
            text = text.replace(part, "***")
        return text

    def _victims(self, records: Iterable[StoreRecord], incoming: int, name: str = "") -> Records:
        """Which entries must go so that `incoming` more bytes fit under the ceiling; `name` is replaced."""
        if self.max_bytes is None:
            return []
        if incoming > self.max_bytes:
            raise StoreFull(f"an entry of {incoming} bytes is larger than max_bytes={self.max_bytes}")
        others = sorted((r for r in records if r.key != name), key=lambda r: (r.last_used, r.key))
        excess = sum(r.nbytes for r in others) + incoming - self.max_bytes
        victims = []
        for record in others:
            if excess <= 0:
                break
            victims.append(record)
            excess -= record.nbytes
        with self._lock:
            self._stat.evictions += len(victims)
        return victims


class BytesStore(SegmentStore):
    """A store that keeps each entry as one string of bytes: `_read`, `_write`, `_has`, `_remove`, `_records`."""

    def _read(self, name: str) -> Any:
        """A buffer (best: a private writable one), or None if there is no such entry. May raise CorruptEntry."""
        raise NotImplementedError

    def _write(self, name: str, parts: Sequence[memoryview], nbytes: int) -> None:
        """Store the concatenation of `parts`; afterwards a reader sees all of it or the former entry, never a part."""
        raise NotImplementedError

    def _load_many(self, names: Sequence[str]) -> Sequence[Any]:
        return [self._read_or_say(name) for name in names]

    def _read_or_say(self, name: str) -> Any:
        try:
            return self._read(name)
        except (CorruptEntry, UnreadableEntry) as e:
            return e

    def _open(self, name: str, item: Any, verify: Verify) -> SegmentEntry:
        return decode(item, key=name, secret=self._secret, verify=verify)

    def _save_many(self, items: Sequence[tuple[str, SegmentEntry]]) -> Flags:
        return [self._save(name, entry) for name, entry in items]

    def _save(self, name: str, entry: SegmentEntry) -> bool:
        parts = encode(entry, secret=self._secret)
        try:
            self._write(name, parts, sum(part.nbytes for part in parts))
        except StoreFull as e:
            self._warn_full(e)
            return False
        self._warned_full = False
        return True


def _stamped(key: Key, entry: SegmentEntry) -> SegmentEntry:
    """A shallow copy that carries the key's identity."""
    if isinstance(key, SegmentKey):
        return dataclasses.replace(
            entry,
            key=key.hex,
            model=key.model,
            rope=key.rope,
            dtype=key.dtype,
            profile=key.profile,
            tier="",
            source=None,
        )
    return dataclasses.replace(entry, key=key_hex(key), tier="", source=None)


def _check_identity(key: Key, entry: SegmentEntry) -> None:
    """Compare what the entry says of itself with what was asked for: a second look behind the hash."""
    if not isinstance(key, SegmentKey):
        return
    for field in ("model", "rope", "dtype", "profile"):
        if getattr(entry, field) != getattr(key, field):
            raise CorruptEntry(
                f"its {field} is {shorten(getattr(entry, field))}, asked for {shorten(getattr(key, field))}"
            )
