"""Entries as objects behind fsspec: S3, GCS, Azure, HDFS, SFTP, ... whatever has an fsspec package installed.

Object stores make an object visible only when all of it has arrived. Other file systems get a temporary name and a
rename. There is no access time to order by, so `max_bytes` drops the entries that were written first.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import posixpath
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from redknot_hf.errors import MissingExtraError, RedKnotError
from redknot_hf.segments.codec import CorruptEntry
from redknot_hf.segments.stores.base import BytesStore
from redknot_hf.segments.stores.deadline import within
from redknot_hf.segments.stores.types import GcReport, StoreFull, StoreRecord, StoreUnavailable

__all__ = ["FsspecStore"]

T = TypeVar("T")

_NAME = re.compile(r"([0-9a-f]{64})\.safetensors", re.ASCII)
_TEMP = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]+\.tmp", re.ASCII)
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "hf", "memory"}
_STALE_SECONDS = 3600.0
_READERS = 8


class FsspecStore(BytesStore):
    """`s3://bucket/prefix` and every other URL that fsspec knows.

    `fsspec+PROTOCOL://...` reaches a protocol whose name is taken by a store of ours, e.g. `fsspec+memory://name` or
    `fsspec+file:///dir`.

    Args:
        url: where the entries go.
        storage_options: passed to the file system (credentials, endpoint); never printed.
        timeout: seconds for a whole call, transfers included; 60 by default.
        **options: see `SegmentStore`.
    """

    tier = "remote"
    default_timeout = 60.0

    def __init__(self, url: Any, *, storage_options: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(url, **options)
        try:
            import fsspec
        except ImportError as e:
            raise MissingExtraError(f"a store at {self.url}", "fsspec", "stores") from e
        target = str(url).removeprefix("fsspec+")
        try:
            self._fs, root = fsspec.core.url_to_fs(target, use_listings_cache=False, **(storage_options or {}))
        except ImportError as e:
            raise RedKnotError(f"url: {self.url} needs another fsspec package: {self._scrub(str(e))}") from None
        except ValueError as e:
            raise RedKnotError(f"url: no store serves {self.url}: {self._scrub(str(e))}") from None
        except Exception as e:  # file systems may connect when they are made, and fail in their own way
            raise StoreUnavailable(f"store {self.url}: {self._scrub(f'{type(e).__name__}: {e}')}") from None
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._atomic = bool(protocols & _OBJECT_STORES)
        self._root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name}.safetensors"

    def _call(self, what: str, action: Callable[[], T]) -> T:
        """Bound in time; a missing file stays FileNotFoundError, other errors of an SDK become StoreUnavailable."""
        try:
            return within(self.timeout, what, action)
        except (FileNotFoundError, StoreUnavailable, StoreFull):
            raise
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(f"no space left at {self.url}") from e
            raise StoreUnavailable(f"{type(e).__name__}: {e}") from e
        except Exception as e:
            raise StoreUnavailable(f"{type(e).__name__}: {e}") from e

    def _read(self, name: str) -> Any:
        try:
            data = self._call("read", lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        if not data:
            raise CorruptEntry("truncated: 0 bytes")
        return data

    def _load_many(self, names: Sequence[str]) -> Sequence[Any]:
        if len(names) < 2:
            return super()._load_many(names)
        with ThreadPoolExecutor(min(_READERS, len(names))) as pool:  # one request is far slower than the network
            return list(pool.map(self._read_or_say, names))

    def _write(self, name: str, parts: Sequence[memoryview], nbytes: int) -> None:
        if self.max_bytes is not None:
            for victim in self._victims(self._records(), nbytes, name):
                self._remove(victim.key)
        self._call("write", lambda: self._write_file(self._path(name), b"".join(parts)))

    def _write_file(self, path: str, data: bytes) -> None:
        if self._atomic:
            self._fs.pipe_file(path, data)
            return
        folder, base = posixpath.split(path)
        self._fs.makedirs(folder, exist_ok=True)
        temp = f"{folder}/.{base.removesuffix('.safetensors')}.{secrets.token_hex(8)}.tmp"
        try:
            self._fs.pipe_file(temp, data)
            self._fs.mv(temp, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(temp)
            raise

    def _has(self, name: str) -> bool:
        return self._call("look-up", lambda: self._fs.isfile(self._path(name)))

    def _remove(self, name: str) -> bool:
        if self._atomic and not self._has(name):  # deleting what is not there is no error to an object store
            return False
        try:
            self._call("delete", lambda: self._fs.rm_file(self._path(name)))
        except FileNotFoundError:
            return False
        return True

    def _files(self) -> list[dict[str, Any]]:
        try:
            found = self._call("list", lambda: self._fs.find(self._root, detail=True))
        except FileNotFoundError:
            return []
        return list(found.values())

    def _records(self) -> Iterable[StoreRecord]:
        for info in self._files():
            match = _NAME.fullmatch(posixpath.basename(info["name"]))
            if match:
                yield StoreRecord(match[1], int(info.get("size") or 0), _written_at(info))

    def _sweep(self, report: GcReport) -> None:
        for info in self._files():
            stale = time.time() - _written_at(info) > _STALE_SECONDS
            if stale and _TEMP.fullmatch(posixpath.basename(info["name"])):
                self._call("delete", functools.partial(self._fs.rm_file, info["name"]))
                report.leftovers += 1
                report.freed_bytes += int(info.get("size") or 0)


def _written_at(info: dict[str, Any]) -> float:
    """File systems disagree about the name and the type of the modification time."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = info.get(name)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0
