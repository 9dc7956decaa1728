"""Entries in a Mooncake Store: the pooled memory of a cluster behind one master.

The client library is C++ and blocks: connecting is preceded by a plain TCP connection to the master, and every call
runs under a deadline. The master evicts by its own policy (least recently used above its high watermark, leases
respected), which is why `max_bytes` is enforced only as far as the master's admin port can list the keys. An entry that
is replaced while it is read comes out mixed; the checksum tells, and it is read again.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from redknot_hf.errors import MissingExtraError, RedKnotError
from redknot_hf.segments.codec import CorruptEntry
from redknot_hf.segments.stores.base import BytesStore
from redknot_hf.segments.stores.deadline import within
from redknot_hf.segments.stores.types import StoreFull, StoreRecord, StoreUnavailable

__all__ = ["MooncakeStore"]

T = TypeVar("T")

# ErrorCode of mooncake-store (docs: "Mooncake Store error codes"), those that mean something here.
_NO_ROOM, _NOT_READY, _NOT_FOUND, _EXISTS, _LEASED, _LEASE_EXPIRED = -200, -703, -704, -705, -706, -707
# How often a call that met another client's write of the same entry is repeated, and the pause between.
_ATTEMPTS, _PAUSE = 40, 0.01


class MooncakeStore(BytesStore):
    """`mooncake://master:port`, with `mooncake-transfer-engine` (or its `-non-cuda` build) and Debian's libibverbs1.

    Args:
        url: the master.
        metadata: metadata server of the transfer engine; `P2PHANDSHAKE` needs none.
        hostname: this machine as the others reach it; by default the address it reaches the master from.
        protocol: `"tcp"` or `"rdma"`; `device` names the RDMA devices.
        segment_bytes: host memory this process adds to the pool. 0: use the pool only.
        buffer_bytes: host memory for transfers; no entry may be larger.
        admin_port: the master's metrics port, through which keys can be listed; None if it is closed.
        prefix: first part of every name in the pool.
        client: a `MooncakeDistributedStore` that is set up already, to share it; it is not closed with this store.
        timeout: seconds for a whole call; 30 by default.
        **options: see `SegmentStore`.
    """

    tier = "mooncake"
    rereads = 5
    default_timeout = 30.0

    def __init__(
        self,
        url: Any,
        *,
        metadata: str = "P2PHANDSHAKE",
        hostname: str | None = None,
        protocol: str = "tcp",
        device: str = "",
        segment_bytes: int = 1 << 30,
        buffer_bytes: int = 1 << 30,
        admin_port: int | None = 9003,
        prefix: str = "redknot-segment-",
        client: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(url, **options)
        # The pool may hand out memory that is being overwritten or was freed meanwhile, so nothing is taken unchecked.
        self.verify_mode = "full"
        try:
            parts = urllib.parse.urlsplit(str(url))
            host, port = parts.hostname, parts.port or 50051
        except ValueError:
            host = None
        if not host or parts.path.strip("/") or parts.query:
            raise RedKnotError(f"url: a Mooncake store is mooncake://master-host:port, got {self.url}")
        # The library logs every connection to stderr. It reads this once, when it is loaded; a value of the user's
        # stays.
        os.environ.setdefault("GLOG_minloglevel", "2")
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as e:
            if getattr(e, "name", None) in ("mooncake", "mooncake.store"):
                raise MissingExtraError(f"a store at {self.url}", "mooncake", "mooncake") from e
            raise RedKnotError(
                f"url: the mooncake package is installed but does not load ({e}); it needs libibverbs1, and CUDA "
                "unless it is mooncake-transfer-engine-non-cuda"
            ) from e
        self._host, self._port, self._admin_port, self._prefix = host, port, admin_port, prefix
        self._setup = (metadata, segment_bytes, buffer_bytes, protocol, device)
        self._hostname = hostname
        self._buffer_bytes = buffer_bytes
        self._make = MooncakeDistributedStore
        self._client, self._own_client = client, client is None

    # -- calls -----------------------------------------------------------------------------------------------------

    def _call(self, what: str, action: Callable[[Any], T]) -> T:
        client = self._connected()
        return within(self.timeout, what, lambda: action(client))

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        """The library retries a dead master for minutes; a plain connection tells in no time."""
        try:
            with socket.create_connection((self._host, self._port), timeout=self.timeout) as probe:
                hostname = self._hostname or probe.getsockname()[0]
        except OSError as e:
            raise StoreUnavailable(f"master {self._host}:{self._port}: {e}") from e
        client = self._make()
        metadata, segment, buffer, protocol, device = self._setup
        code = within(
            self.timeout,
            "setup",
            lambda: client.setup(hostname, metadata, segment, buffer, protocol, device, f"{self._host}:{self._port}"),
        )
        if code != 0:
            raise StoreUnavailable(f"setup failed with code {code}")
        return client

    def _name(self, name: str) -> str:
        return self._prefix + name

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> Any:
        return self._call("read", lambda client: self._fetch(client, self._name(name)))

    def _fetch(self, client: Any, name: str) -> Any:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            # Asked first because `get_size` and `get_into` also say "not found" when the master is gone.
            if _presence(client, name) == 0:
                return None
            size = client.get_size(name)
            if size in (_NOT_READY, _NOT_FOUND):
                continue
            if not 0 < size <= self._buffer_bytes:
                raise CorruptEntry(f"impossible size {size}")
            buffer = bytearray(size)
            pinned = (ctypes.c_char * size).from_buffer(buffer)
            address = ctypes.addressof(pinned)
            if client.register_buffer(address, size) != 0:
                raise StoreUnavailable(f"cannot register a buffer of {size} bytes")
            try:
                count = client.get_into(name, address, size)
            finally:
                client.unregister_buffer(address)
            del pinned
            if count == size:
                return buffer
            if count not in (_NOT_READY, _NOT_FOUND, _LEASE_EXPIRED):
                raise StoreUnavailable(f"read failed with code {count}")
        return None  # still being written: as good as not there

    def _write(self, name: str, parts: Sequence[memoryview], nbytes: int) -> None:
        if nbytes > self._buffer_bytes:
            raise StoreFull(f"an entry of {nbytes} bytes is larger than buffer_bytes={self._buffer_bytes}")
        if self.max_bytes is not None:
            for victim in self._victims(self._records(), nbytes, name):
                self._remove(victim.key)
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            code = self._call("write", lambda client: client.upsert_parts(self._name(name), *parts))
            if code not in (_NOT_READY, _EXISTS, _LEASED, _LEASE_EXPIRED, _NOT_FOUND):
                break
        if code == _NO_ROOM:
            raise StoreFull(f"the pool has no room for {nbytes} bytes")
        if code != 0:
            raise StoreUnavailable(f"write failed with code {code}")

    def _has(self, name: str) -> bool:
        return self._call("look-up", lambda client: _presence(client, self._name(name))) == 1

    def _remove(self, name: str) -> bool:
        code = self._call("delete", lambda client: client.remove(self._name(name), True))
        if code not in (0, _NOT_FOUND):
            raise StoreUnavailable(f"delete failed with code {code}")
        return code == 0

    def _records(self) -> Iterable[StoreRecord]:
        if self._admin_port is None:
            raise StoreUnavailable("a Mooncake pool is listed through the master's admin port, and admin_port is None")
        names = [
            line.removeprefix(self._prefix)
            for line in self._ask("/get_all_keys").decode().splitlines()
            if line.startswith(self._prefix) and len(line) == len(self._prefix) + 64
        ]
        sizes = self._call("list", lambda client: [client.get_size(self._name(name)) for name in names])
        return [StoreRecord(name, size) for name, size in zip(names, sizes, strict=True) if size > 0]

    def _ask(self, path: str) -> bytes:
        # A proxy from the environment has no business between us and the master.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self._host}:{self._admin_port}{path}", timeout=self.timeout) as answer:
                return answer.read()
        except (OSError, urllib.error.URLError) as e:
            raise StoreUnavailable(f"admin port {self._admin_port}: {e}") from e

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._own_client:
            within(self.timeout, "close", client.close)


def _presence(client: Any, name: str) -> int:
    """1 or 0. Raises StoreUnavailable on anything else, e.g. -900 when the master does not answer."""
    code = client.is_exist(name)
    if code not in (0, 1):
        raise StoreUnavailable(f"look-up failed with code {code}")
    return code
