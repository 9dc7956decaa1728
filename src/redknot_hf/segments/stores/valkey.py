"""Entries in a Valkey (or Redis) server, shared by any number of machines.

    {prefix}:m:{key}            manifest, JSON: bytes, pieces, a random id
    {prefix}:c:{key}:{id}:{i}   piece i of the entry, at most `piece_bytes` (a server value ends at 512 MB)
    {prefix}:used               sorted set: key -> time of last use
    {prefix}:size               hash: key -> bytes

Pieces are written first, with a time to live, and made permanent in the same transaction that sets the manifest: a
reader sees the old entry or the new one, and what a killed writer leaves behind expires by itself. A server that evicts
by its own policy may drop pieces or manifests; both end in a miss.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from redknot_hf.errors import MissingExtraError, RedKnotError, shorten
from redknot_hf.segments.codec import CorruptEntry, SegmentEntry
from redknot_hf.segments.stores.base import BytesStore, Flags
from redknot_hf.segments.stores.types import GcReport, StoreFull, StoreRecord, StoreUnavailable
from redknot_hf.segments.stores.valkey_bulk import read_values

__all__ = ["ValkeyStore"]

T = TypeVar("T")

_UNFINISHED_TTL = 3600
_MAX_PIECE = 256 << 20


class ValkeyStore(BytesStore):
    """`valkey://[user:password@]host:port[/database]`; `valkeys://` for TLS. `redis://` and `rediss://` are the same.

    Args:
        url: the server.
        prefix: first part of every name this store uses on the server.
        piece_bytes: entries are cut into values of this size; 256 MiB at most. Clients and server copy whole values, so
            smaller ones take less memory and time.
        timeout: seconds to connect, and seconds without a byte of progress in a transfer; 5 by default.
        **options: see `SegmentStore`.
    """

    tier = "valkey"
    default_timeout = 5.0

    def __init__(
        self, url: Any, *, prefix: str = "redknot:segments", piece_bytes: int = 16 << 20, **options: Any
    ) -> None:
        super().__init__(url, **options)
        try:
            import valkey
            from valkey.backoff import NoBackoff
            from valkey.retry import Retry
        except ImportError as e:
            raise MissingExtraError(f"a store at {self.url}", "valkey", "stores") from e
        if not 0 < piece_bytes <= _MAX_PIECE:
            raise RedKnotError(f"piece_bytes must be 1 to {_MAX_PIECE}, got {shorten(piece_bytes)}")
        scheme, rest = str(url).split("://", 1)
        scheme = {"redis": "valkey", "rediss": "valkeys"}.get(scheme.lower(), scheme.lower())
        self._errors = valkey.exceptions
        self._prefix, self._piece = prefix, piece_bytes
        try:
            self._client = valkey.Valkey.from_url(
                f"{scheme}://{rest}",
                socket_timeout=self.timeout,
                socket_connect_timeout=self.timeout,
                retry=Retry(NoBackoff(), 0),
                decode_responses=False,
            )
        except ValueError as e:
            raise RedKnotError(f"url: {self.url} is not a Valkey address: {self._scrub(str(e))}") from None

    # -- names -----------------------------------------------------------------------------------------------------

    def _manifest(self, name: str) -> str:
        return f"{self._prefix}:m:{name}"

    def _pieces(self, name: str, manifest: dict[str, Any]) -> list[str]:
        return [f"{self._prefix}:c:{name}:{manifest['id']}:{i}" for i in range(manifest["pieces"])]

    @property
    def _used(self) -> str:
        return f"{self._prefix}:used"

    @property
    def _size(self) -> str:
        return f"{self._prefix}:size"

    def _call(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except self._errors.OutOfMemoryError as e:
            raise StoreFull(f"the server is out of memory: {e}") from e
        except (self._errors.ValkeyError, OSError) as e:
            raise StoreUnavailable(f"{type(e).__name__}: {e}") from e

    # -- reading ---------------------------------------------------------------------------------------------------

    def _load_many(self, names: Sequence[str]) -> Sequence[Any]:
        return self._call(lambda: self._fetch(names, attempts=4)) if names else []

    def _read(self, name: str) -> Any:
        return self._load_many([name])[0]

    def _fetch(self, names: Sequence[str], attempts: int) -> list[Any]:
        """All manifests in one round trip, the sizes of all pieces in a second, the pieces in a third."""
        raw = self._client.mget([self._manifest(name) for name in names])
        results: list[Any] = [None] * len(names)
        wanted: list[tuple[int, dict[str, Any]]] = []
        for i, text in enumerate(raw):
            if text is not None:
                manifest = _parse_manifest(text)
                if manifest is None:
                    results[i] = CorruptEntry("its manifest is malformed")
                else:
                    wanted.append((i, manifest))
        if not wanted:
            return results
        with self._client.pipeline(transaction=False) as pipe:
            for i, manifest in wanted:
                for piece in self._pieces(names[i], manifest):
                    pipe.strlen(piece)
            lengths = pipe.execute()
        torn, whole = [], []
        for i, manifest in wanted:  # memory is taken for what is there, not for what a manifest says
            sizes, lengths = lengths[: manifest["pieces"]], lengths[manifest["pieces"] :]
            if not all(sizes):
                torn.append(i)
                results[i] = CorruptEntry("some of its pieces are gone")
            elif sum(sizes) != manifest["bytes"]:
                results[i] = CorruptEntry(f"truncated: {sum(sizes)} of {manifest['bytes']} bytes")
            else:
                whole.append((i, manifest))
        pieces = [self._pieces(names[i], manifest) for i, manifest in whole]
        for (i, _), value in zip(
            whole, read_values(self._client, pieces, [manifest["bytes"] for _, manifest in whole]), strict=True
        ):
            results[i] = value
            if value is None:
                torn.append(i)
                results[i] = CorruptEntry("some of its pieces are gone")
        if torn and attempts > 1:
            # Most likely replaced between the two round trips; the new manifest tells.
            for i, item in zip(torn, self._fetch([names[i] for i in torn], attempts=attempts - 1), strict=True):
                results[i] = item
        return results

    def _touch(self, names: Sequence[str]) -> None:
        # XX: an entry that was deleted meanwhile must not come back into the index.
        now = time.time()
        self._call(lambda: self._client.zadd(self._used, dict.fromkeys(names, now), xx=True))

    # -- writing ---------------------------------------------------------------------------------------------------

    def _save_many(self, items: Sequence[tuple[str, SegmentEntry]]) -> Flags:
        return [self._save(name, entry) for name, entry in items]

    def _write(self, name: str, parts: Sequence[memoryview], nbytes: int) -> None:
        self._call(lambda: self._send(name, parts, nbytes))

    def _send(self, name: str, parts: Sequence[memoryview], nbytes: int) -> None:
        if self.max_bytes is not None:
            for victim in self._victims(self._indexed(), nbytes, name):
                self._discard(victim.key)
        old = _parse_manifest(self._client.get(self._manifest(name)))
        manifest = {"id": secrets.token_hex(8), "pieces": -(-nbytes // self._piece), "bytes": nbytes}
        pieces = self._pieces(name, manifest)
        for piece, value in zip(pieces, _cut(parts, self._piece), strict=True):
            self._client.set(piece, value, ex=_UNFINISHED_TTL)
        with self._client.pipeline(transaction=True) as pipe:
            for piece in pieces:
                pipe.persist(piece)
            pipe.set(self._manifest(name), json.dumps(manifest))
            pipe.zadd(self._used, {name: time.time()})
            pipe.hset(self._size, name, nbytes)
            if old is not None:
                pipe.unlink(*self._pieces(name, old))
            pipe.execute()

    def _has(self, name: str) -> bool:
        return bool(self._call(lambda: self._client.exists(self._manifest(name))))

    def _remove(self, name: str) -> bool:
        return self._call(lambda: self._discard(name))

    def _discard(self, name: str) -> bool:
        manifest = _parse_manifest(self._client.get(self._manifest(name)))
        with self._client.pipeline(transaction=True) as pipe:
            pipe.unlink(self._manifest(name), *(self._pieces(name, manifest) if manifest else ()))
            pipe.zrem(self._used, name)
            pipe.hdel(self._size, name)
            return bool(pipe.execute()[0])

    # -- administration --------------------------------------------------------------------------------------------

    def _records(self) -> Iterable[StoreRecord]:
        return self._call(self._indexed)

    def _indexed(self) -> list[StoreRecord]:
        """Entries of the index whose manifest is still there (the server may have evicted some)."""
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hgetall(self._size)
            pipe.zrange(self._used, 0, -1, withscores=True)
            sizes, used = pipe.execute()
        names = [name.decode() for name, _ in used]
        with self._client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.exists(self._manifest(name))
            present = pipe.execute()
        return [
            StoreRecord(name, int(sizes.get(name.encode(), 0)), score)
            for name, (_, score), there in zip(names, used, present, strict=True)
            if there
        ]

    def _sweep(self, report: GcReport) -> None:
        """Take evicted entries out of the index, and remove pieces that no manifest names any more."""

        def run() -> None:
            for raw, _ in self._client.zscan_iter(self._used):
                name = raw.decode()
                if not self._client.exists(self._manifest(name)):
                    self._discard(name)
                    report.leftovers += 1
            for raw in self._client.scan_iter(f"{self._prefix}:c:*", count=1000):
                name, piece_id = raw.decode().removeprefix(f"{self._prefix}:c:").split(":")[:2]
                manifest = _parse_manifest(self._client.get(self._manifest(name)))
                # A piece with a time to live belongs to a write under way.
                if (manifest is None or manifest["id"] != piece_id) and self._client.ttl(raw) == -1:
                    report.freed_bytes += self._client.strlen(raw)
                    report.leftovers += self._client.unlink(raw)

        self._call(run)

    def close(self) -> None:
        self._client.close()


def _parse_manifest(text: bytes | None) -> dict[str, Any] | None:
    """A manifest that says believable things, or None."""
    try:
        manifest = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict):
        return None
    piece_id, pieces, nbytes = manifest.get("id"), manifest.get("pieces"), manifest.get("bytes")
    if not (isinstance(piece_id, str) and type(pieces) is int and type(nbytes) is int):
        return None
    # 65,536 pieces of 256 MiB are 16 TiB: more is a lie that would only make us send as many requests.
    return manifest if 0 < pieces <= 65_536 and nbytes > 0 and len(piece_id) <= 64 else None


def _cut(parts: Sequence[memoryview], size: int) -> Iterable[bytes]:
    """The concatenation of `parts` in pieces of `size` bytes; only one piece is in memory at a time."""
    pending: list[memoryview] = []
    held = 0
    for part in parts:
        while part.nbytes:
            take = part[: size - held]
            pending.append(take)
            held += take.nbytes
            part = part[take.nbytes :]
            if held == size:
                yield b"".join(pending)
                pending, held = [], 0
    if held:
        yield b"".join(pending)
