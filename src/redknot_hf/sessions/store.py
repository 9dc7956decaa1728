"""`SessionStore`: more conversations than the device holds, none of them computed twice.

Idle sessions are kept in the order of their use. When those on the device exceed their budget, the one that was idle
longest moves to host memory; when the host exceeds its own, to a file; when the files exceed theirs, it is deleted, and
asking for it says so. A session that is in use (`get` without a `put` since) or pinned is never moved.

One lock guards everything, moves included: a `get` may wait for another session's move. The store does not know the
tokens of a session, only its keys and values: keep the text yourself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CacheError, PoolExhausted, RedKnotError, shorten
from ..layer import RedKnotLayer
from ..paging.cold_pools import HostPool
from ..paging.frozen import FrozenPages
from ..paging.pages import LayerPages
from ..paging.tiers import TieredPages
from ..static import StaticRedKnotLayer
from .container import TEMPORARY
from .files import describe, load_session, save_session
from .sleep import offload_cache, prefetch_cache, sleeping_layers

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["SessionMissing", "SessionStore", "StoreReport"]

SUFFIX = ".session.safetensors"
MAX_TOMBSTONES = 10_000  # names of deleted sessions that are remembered, to say why they are gone


class SessionMissing(RedKnotError):
    """The store has no such session: it was never put, was deleted, or had to give way. Feed its text again."""


@dataclass(frozen=True)
class StoreReport:
    """What a store holds.

    Attributes:
        device_bytes: slabs, frozen pages and resident far pages of all sessions on the device, in use or idle; what forks
            share counts once.
        host_bytes: keys and values in host memory, cold tokens of all sessions included.
        disk_bytes: sizes of the files.
        device, host, disk: keys in each tier, longest idle first; in_use: keys handed out and not yet put back.
        offloads, saves, restores, deletions: moves since the store was made.
    """

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    device: tuple[str, ...]
    host: tuple[str, ...]
    disk: tuple[str, ...]
    in_use: tuple[str, ...]
    offloads: int
    saves: int
    restores: int
    deletions: int


class _Session:
    """One entry; ``cache`` is None when the session is a file."""

    def __init__(self, key: str, cache: RedKnotCache | None, pinned: bool = False):
        self.key, self.cache, self.pinned = key, cache, pinned
        self.in_use = False
        self.file_bytes = 0

    @property
    def tier(self) -> str:
        if self.cache is None:
            return "disk"
        return "host" if sleeping_layers(self.cache) else "device"


class _Surrendered:
    """Stands for the pages of a cache whose session went to a file: using the old object would use an empty one."""

    asleep = True

    def __init__(self, key: str):
        self.key = key

    def free(self) -> None: ...

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheError(
            f"this cache was put into a SessionStore, and its session {shorten(self.key)} has left memory since: use "
            "the cache that store.get(key) returns"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.refuse()


def _archives(cache: RedKnotCache) -> list[HostPool]:
    """The pools of cold tokens that a cache has in host memory."""
    return [] if cache.tier is None else cache.tier.host_pools


class SessionStore:
    """Keeps sessions under string keys within byte budgets.

    Args:
        config: the model, or its config: sessions that come back from files are checked against it, as by
            `RedKnotCache.load`.
        device_bytes: budget of the sessions on the device, those in use included. None: no limit.
        host_bytes: budget of what is in host memory: sessions, and cold tokens (``cold="cpu"``) of sessions wherever they
            are. None: no limit; 0: straight to files.
        disk_bytes: budget of the files. None: no limit.
        folder: where files go; created if needed. None: no files, and sessions that find no room on the host are
            deleted. A folder may be reopened: its sessions are there again. One store at a time.

    Raises:
        RedKnotError: a budget is negative, or the folder cannot be made.

    Example:
        >>> store = SessionStore(model, device_bytes=8 << 30, host_bytes=64 << 30, folder="sessions")
        >>> with store.use("alice") as cache:          # a new session, or the one she left
        ...     model.generate(ids, past_key_values=cache)
    """

    def __init__(
        self,
        config: Any,
        *,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        disk_bytes: int | None = None,
        folder: str | os.PathLike[str] | None = None,
    ):
        for name, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise RedKnotError(f"{name}={value!r}: expected a number of bytes, or None for no limit")
        self.config = config
        self.device_bytes, self.host_bytes, self.disk_bytes = device_bytes, host_bytes, disk_bytes
        self.folder = None if folder is None else Path(folder)
        self._lock = threading.RLock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # longest idle first
        self._gone: OrderedDict[str, str] = OrderedDict()
        self.offloads = self.saves = self.restores = self.deletions = 0
        if self.folder is not None:
            self._open_folder(self.folder)

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, key: str) -> bool:
        return key in self._sessions

    def keys(self) -> list[str]:
        """All keys, longest idle first."""
        with self._lock:
            return list(self._sessions)

    # --------------------------------------------------------------------------------------------------- in, out
    def put(self, key: str, cache: RedKnotCache, *, pin: bool | None = None) -> None:
        """Store a session that is idle now; replaces the one under the same key. The cache belongs to the store then.

        Args:
            key: 1 to 512 characters.
            pin: never move it; None keeps what was set before.

        Raises:
            RedKnotError: a bad key, or another session is in use under this one.
        """
        if not isinstance(key, str) or not 0 < len(key) <= 512:
            raise RedKnotError(f"key must have 1 to 512 characters, got {shorten(key)}")
        with self._lock:
            old = self._sessions.get(key)
            if old is not None and old.in_use and old.cache is not cache:
                raise CacheError(
                    f"session {shorten(key)} is in use: put back the cache that get() returned, or delete it"
                )
            session = _Session(key, cache, old.pinned if old is not None else False)
            if pin is not None:
                session.pinned = pin
            if old is not None:
                self._drop(old, keep_cache=old.cache is cache)
            if any(layer.is_initialized and layer.seen != cache.seen for layer in cache.paged_layers):
                self._sessions.pop(key, None)
                self._remember(key, "its last forward was interrupted")
                raise CacheError(
                    f"session {shorten(key)}: a forward over this cache was interrupted, so it cannot go on. It was "
                    "not stored; call cache.reset() and feed its text again"
                )
            self._sessions[key] = session
            self._sessions.move_to_end(key)
            self._gone.pop(key, None)
            self._balance()

    def get(self, key: str) -> RedKnotCache:
        """Take a session out for use, on its device; it is not moved until it is put back.

        Raises:
            SessionMissing: there is none, and why.
            CacheError: it is in use already.
            RedKnotError: its file is damaged or does not fit the model; the session stays in the store.
            PoolExhausted: the device has no memory even after everything idle has moved away.
        """
        with self._lock:
            session = self._sessions.get(key)
            if session is None:
                reason = self._gone.get(key, "it was never put")
                raise SessionMissing(f"no session {shorten(key)}: {reason}; feed its text again")
            if session.in_use:
                raise CacheError(
                    f"session {shorten(key)} is in use already: put it back first, or fork the cache in use"
                )
            session.in_use = True
            try:
                self._bring(session)
                self._balance()
            except BaseException:
                session.in_use = False
                raise
            assert session.cache is not None
            return session.cache

    @contextlib.contextmanager
    def use(self, key: str, make: Any = None) -> Iterator[RedKnotCache]:
        """`get` and `put` around a block.

        Args:
            make: called without arguments for the cache of a key that the store does not have; None raises instead.
        """
        cache = make() if make is not None and key not in self else self.get(key)
        try:
            yield cache
        except BaseException:
            with contextlib.suppress(RedKnotError):  # what went wrong in the block matters more
                self.put(key, cache)
            raise
        self.put(key, cache)

    def delete(self, key: str) -> bool:
        """Forget a session and free what it holds, even if it is in use or pinned; False if there was none."""
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is None:
                return False
            self.deletions += 1
            self._drop(session, keep_cache=session.in_use)
            self._remember(key, "it was deleted")
            return True

    def pin(self, key: str, pinned: bool = True) -> None:
        """Never move this session, or (``pinned=False``) move it like any other.

        Raises:
            SessionMissing: there is none.
        """
        with self._lock:
            if key not in self._sessions:
                raise SessionMissing(f"no session {shorten(key)} to pin")
            self._sessions[key].pinned = pinned
            self._balance()

    def flush(self) -> int:
        """Write every idle session that is not a file yet to the folder, so that another process can open it.

        Returns:
            How many were written.
        """
        with self._lock:
            idle = [s for s in self._sessions.values() if not s.in_use and s.cache is not None]
            for session in idle:
                self._to_disk(session)
            return len(idle)

    def report(self) -> StoreReport:
        """What is where now; see `StoreReport`."""
        with self._lock:
            sessions = list(self._sessions.values())
            tiers = {name: tuple(s.key for s in sessions if s.tier == name) for name in ("device", "host", "disk")}
            return StoreReport(
                self._on_device(),
                self._on_host(),
                self._on_disk(),
                tiers["device"],
                tiers["host"],
                tiers["disk"],
                tuple(s.key for s in sessions if s.in_use),
                self.offloads,
                self.saves,
                self.restores,
                self.deletions,
            )

    # ------------------------------------------------------------------------------------------------------ bytes
    def _caches(self) -> Iterator[RedKnotCache]:
        return (session.cache for session in self._sessions.values() if session.cache is not None)

    def _on_device(self) -> int:
        held: dict[int, int] = {}  # what forks share counts once
        for cache in self._caches():
            held.update((id(pool), pool.allocated_bytes) for pool in cache._pools.values())
            for pages in (layer.pages for layer in cache.paged_layers):
                if isinstance(pages, LayerPages):  # the static form has pools of its own
                    held[id(pages.pool)] = pages.pool.allocated_bytes
                if isinstance(pages, FrozenPages):
                    held[id(pages.store)] = pages.store.nbytes
                if isinstance(pages, TieredPages) and pages.far is not None:
                    held[id(pages.far)] = pages.far.resident_bytes
        return sum(held.values())

    def _on_host(self) -> int:
        sleeping = sum(pages.host_bytes for cache in self._caches() for pages in sleeping_layers(cache))
        archives = {id(pool): pool.live_bytes for cache in self._caches() for pool in _archives(cache)}
        return sleeping + sum(archives.values())

    def _on_disk(self) -> int:
        return sum(session.file_bytes for session in self._sessions.values())

    # ------------------------------------------------------------------------------------------------------ moves
    def _idle(self, tier: str, or_archive_of: str | None = None) -> _Session | None:
        """The session of a tier that may move and was idle longest; those of another tier, too, that have cold tokens on
        the host."""
        for session in self._sessions.values():
            if session.in_use or session.pinned:
                continue
            where = session.tier
            if where == tier or (where == or_archive_of and session.cache is not None and _archives(session.cache)):
                return session
        return None

    def _balance(self) -> None:
        while self.device_bytes is not None and self._on_device() > self.device_bytes:
            session = self._idle("device")
            if session is None:
                break  # what is left is in use or pinned
            self._off_device(session)
        while self.host_bytes is not None and self._on_host() > self.host_bytes:
            session = self._idle("host", "device")
            if session is None:
                break
            self._off_host(session)
        while self.disk_bytes is not None and self._on_disk() > self.disk_bytes:
            session = self._idle("disk")
            if session is None:
                break
            self._give_up(session, f"it had to give way: disk_bytes={self.disk_bytes:,} is full")

    def _off_device(self, session: _Session) -> None:
        assert session.cache is not None
        try:
            offload_cache(session.cache, session.cache.layers)
            self.offloads += 1
        except CacheError:  # no host memory, or a cache of fixed memory
            if self.folder is None:
                raise
            self._to_disk(session)

    def _off_host(self, session: _Session) -> None:
        if self.folder is not None:
            self._to_disk(session)
        else:
            self._give_up(session, f"it had to give way: host_bytes={self.host_bytes:,} is full, no folder is set")

    def _to_disk(self, session: _Session) -> None:
        """Write the file first, let go of the memory afterwards: a full disk loses nothing."""
        if self.folder is None:
            raise RedKnotError("the store has no folder: pass folder= to keep sessions as files")
        assert session.cache is not None
        session.file_bytes = save_session(session.cache, self._path(session.key), label=session.key)
        self.saves += 1
        self._surrender(session)

    def _surrender(self, session: _Session) -> None:
        cache, session.cache = session.cache, None
        assert cache is not None
        cache.reset()
        for layer in cache.layers:
            if isinstance(layer, RedKnotLayer):
                gone = _Surrendered(session.key)
                layer.pages, layer.update, layer.kernel = gone, gone.refuse, None  # type: ignore[assignment]
                if isinstance(layer, StaticRedKnotLayer):
                    layer.let_go()

    def _bring(self, session: _Session) -> None:
        """Onto the device; a full device is retried after everything idle has left it."""
        self._make_room(session)
        while True:
            try:
                if session.cache is None:
                    session.cache = self._load(session.key)
                    self._unlink(session)
                    self.restores += 1
                elif sleeping_layers(session.cache):
                    prefetch_cache(session.cache, session.cache.layers)
                    self.restores += 1
                return
            except PoolExhausted:
                other = self._idle("device")
                if other is None:
                    raise
                self._off_device(other)

    def _make_room(self, session: _Session) -> None:
        coming = session.file_bytes
        if session.cache is not None:
            coming = sum(pages.host_bytes for pages in sleeping_layers(session.cache))
        while self.device_bytes is not None and coming and self._on_device() + coming > self.device_bytes:
            other = self._idle("device")
            if other is None:
                return
            self._off_device(other)

    def _load(self, key: str) -> RedKnotCache:
        from ..cache import RedKnotCache

        return load_session(RedKnotCache, self._path(key), self.config)

    def _give_up(self, session: _Session, reason: str) -> None:
        self._sessions.pop(session.key)
        self.deletions += 1
        self._drop(session, keep_cache=False)
        self._remember(session.key, reason)

    def _drop(self, session: _Session, keep_cache: bool) -> None:
        if session.cache is not None and not keep_cache:
            self._surrender(session)
        self._unlink(session)

    def _remember(self, key: str, reason: str) -> None:
        self._gone[key] = reason
        while len(self._gone) > MAX_TOMBSTONES:
            self._gone.popitem(last=False)

    # ------------------------------------------------------------------------------------------------------ files
    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / (hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40] + SUFFIX)

    def _unlink(self, session: _Session) -> None:
        if self.folder is not None and session.file_bytes:
            with contextlib.suppress(FileNotFoundError):
                self._path(session.key).unlink()
            session.file_bytes = 0

    def _open_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob("*" + SUFFIX), key=lambda path: path.stat().st_mtime)
            for leftover in folder.glob(f".*{SUFFIX}.*{TEMPORARY}"):  # of a process that was killed while it wrote
                leftover.unlink()
        except OSError as error:
            raise RedKnotError(f"folder={os.fspath(folder)!r}: {error.strerror or error}") from error
        for path in files:
            try:
                key = describe(path).get("label")
            except RedKnotError:
                continue  # not readable: left alone, and overwritten when a session of that name is written
            if isinstance(key, str) and key and self._path(key) == path:
                session = _Session(key, None)
                session.file_bytes = path.stat().st_size
                self._sessions[key] = session
        self._balance()
