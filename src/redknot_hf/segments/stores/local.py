"""Entries as safetensors files in a local directory, shared by any number of processes.

    root/ab/abcdef....safetensors           an entry; appears by rename, so it is whole or absent
    root/ab/.abcdef....<random>.tmp         a write under way, or the remains of a killed one (`gc` removes those)

Loading maps the file and copies nothing; pages come in while the checksum is computed. Who sends the tensors to a GPU
reads the file instead, which is kept open for it: a page fault for every few pages costs more. Removing or replacing a mapped
file is safe, since the pages belong to the old inode; only a program that shortens a file in place, which this one
never does, can break a reader. The file's mtime is its time of last use.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from redknot_hf.errors import RedKnotError
from redknot_hf.segments.codec import CorruptEntry, UnreadableEntry
from redknot_hf.segments.stores.base import BytesStore
from redknot_hf.segments.stores.types import GcReport, StoreFull, StoreRecord

__all__ = ["LocalFileStore"]

_NAME = re.compile(r"([0-9a-f]{64})\.safetensors", re.ASCII)
_TEMP = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]+\.tmp", re.ASCII)
# Never follow a planted link, never hang on a planted pipe.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A write that is not finished after an hour belongs to a process that died.
_STALE_SECONDS = 3600.0


class _OpenFile:
    """A descriptor that is closed when nobody refers to it any more, as a mapping is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def __del__(self) -> None:
        os.close(self._fd)


class _Mapped(mmap.mmap):
    """A mapped file and, unless descriptors are short, the file itself."""

    file: _OpenFile | None = None


class LocalFileStore(BytesStore):
    """`file:///directory` or a path object.

    Args:
        url: the directory.
        create: make it if it does not exist, instead of refusing.
        mmap_load: map files instead of reading them. Turn it off on network file systems where another machine may
            remove a file that is mapped here.
        fsync: have each entry on the disk before it gets its name. Without it a power cut may leave a damaged entry,
            which costs a miss.
        **options: see `SegmentStore`.
    """

    tier = "file"

    def __init__(
        self, url: Any, *, create: bool = True, mmap_load: bool = True, fsync: bool = True, **options: Any
    ) -> None:
        super().__init__(url, **options)
        self.root = _directory(url)
        self._mmap = mmap_load
        self._fsync = fsync
        if not create and not self.root.is_dir():
            raise RedKnotError(f"url: {self.root} is not a directory")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RedKnotError(f"url: cannot use {self.root} as a store: {e.strerror or e}") from e

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> Any:
        path = self._path(name)
        try:
            fd = os.open(path, _OPEN_FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.EACCES, errno.EPERM):
                raise CorruptEntry(f"it cannot be opened: {e.strerror}") from e
            if e.errno in (errno.EMFILE, errno.ENFILE):  # this process's trouble: nothing is wrong with store or entry
                raise UnreadableEntry(f"it cannot be opened: {e.strerror}") from e
            raise
        try:
            info = os.fstat(fd)
            size = info.st_size
            if not stat.S_ISREG(info.st_mode) or size == 0:
                raise CorruptEntry("it is empty or no regular file")
            if self._mmap:
                # Private and writable: a stray write of a reader stays in its process and does not reach the file.
                buffer: Any = _Mapped(fd, size, access=mmap.ACCESS_COPY)
                if fd < _most_files():
                    with contextlib.suppress(OSError):  # no descriptor left: the mapping serves
                        buffer.file = _OpenFile(os.dup(fd))
                if hasattr(os, "posix_fadvise"):  # unlike mmap.madvise it lets other threads run
                    os.posix_fadvise(fd, 0, size, os.POSIX_FADV_WILLNEED)
            else:
                buffer = _read_all(fd, size)
        finally:
            os.close(fd)
        return buffer

    def _load_many(self, names: Sequence[str]) -> Sequence[Any]:
        if len(names) < 4:
            return super()._load_many(names)
        with ThreadPoolExecutor(min(8, len(names))) as pool:
            return list(pool.map(self._read_or_say, names))

    def _touch(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # a read-only store has no order of use, and that is fine
                os.utime(self._path(name))

    def _write(self, name: str, parts: Sequence[memoryview], nbytes: int) -> None:
        for victim in self._victims(self._records() if self.max_bytes is not None else (), nbytes, name):
            self._remove(victim.key)
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.parent / f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(temp, "xb", buffering=0) as file:
                for part in parts:
                    _write_all(file, part)
                if self._fsync:
                    os.fsync(file.fileno())
            os.replace(temp, path)
        except OSError as e:
            if e.errno in _FULL:
                raise StoreFull(f"no space left in {self.root} for {nbytes} bytes: {e.strerror}") from e
            raise
        finally:
            # Gone after the rename; still there after any failure, KeyboardInterrupt included.
            with contextlib.suppress(OSError):
                temp.unlink()
        if self._fsync:
            _sync_directory(path.parent)

    def _has(self, name: str) -> bool:
        return self._path(name).is_file()

    def _remove(self, name: str) -> bool:
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _records(self) -> Iterable[StoreRecord]:
        for entry in self._scan():
            match = _NAME.fullmatch(entry.name)
            if match:
                with contextlib.suppress(FileNotFoundError):  # removed by another process while we look
                    info = entry.stat(follow_symlinks=False)
                    yield StoreRecord(match[1], info.st_size, info.st_mtime)

    def _scan(self) -> Iterator[os.DirEntry[str]]:
        """Everything in the 256 subdirectories. One that is gone is empty; one that cannot be read is an error."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as top:
            for folder in top:
                if re.fullmatch("[0-9a-f]{2}", folder.name) and folder.is_dir(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError), os.scandir(folder.path) as entries:
                        yield from entries

    def _sweep(self, report: GcReport) -> None:
        for entry in self._scan():
            if _TEMP.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat(follow_symlinks=False)
                    if time.time() - info.st_mtime > _STALE_SECONDS:
                        os.unlink(entry.path)
                        report.leftovers += 1
                        report.freed_bytes += info.st_size


@functools.lru_cache(1)
def _most_files() -> int:
    """Below which descriptor a file is kept open besides its mapping, which has one, too: half of what there may be."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit // 2


def _directory(url: Any) -> Path:
    if isinstance(url, os.PathLike):
        return Path(url)
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise RedKnotError(f"url: a file store is file:///absolute/directory (three slashes), got {url}")
    return Path(unquote(parts.path))


def _write_all(file: Any, part: memoryview) -> None:
    """An unbuffered write may take only a part (Linux takes at most 2 GiB at a time)."""
    while part.nbytes:
        part = part[file.write(part) :]


def _read_all(fd: int, size: int) -> bytearray:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    with open(fd, "rb", buffering=0, closefd=False) as file:
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise CorruptEntry(f"truncated while it was read: {done} of {size} bytes")
            done += count
    return buffer


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can sync a directory
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
