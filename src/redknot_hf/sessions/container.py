"""One file that holds named tensors and a JSON description: written whole or not at all, read without trust.

The file is a safetensors file whose ``__metadata__`` carries the description and its seal, so any safetensors reader
opens it:

    [8 bytes: header length][JSON header, padded with spaces][tensor bytes, back to back]

Writing streams: tensors come as pieces, are hashed on the way, and go to a temporary file beside the target, which is
synced and then renamed over it. Until that rename the old file is untouched, after it the new one is complete.

Reading maps the file and compares every length, shape and offset with the bytes that are really there before anything
is made of them; tensors are views of the (private) mapping. The checksum is SHA-256 over 4 MiB pieces and then over
their digests. It guards against damage, not against somebody who can write the file. There is no pickle.

This module does not know what the tensors mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RedKnotError, shorten

__all__ = ["Contents", "DamagedFile", "Source", "read_container", "write_container"]

MAX_HEADER_BYTES = 64 << 20
PIECE = 4 << 20  # bytes hashed as one leaf
ALIGN = 64
MAX_DEPTH = 40  # nested lists and objects of the description
TEMPORARY = ".tmp"
_META = "redknot_session"
_BLANK = "0" * 64

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedFile(RedKnotError):
    """The file is truncated, damaged, or not one of ours; nothing was loaded from it."""


@dataclass(frozen=True)
class Source:
    """A tensor to be written, produced piece by piece.

    Attributes:
        name: key of the tensor in the file.
        dtype, shape: of the whole tensor.
        pieces: called once; yields consecutive parts (any shapes, same dtype, on any device) that together hold exactly
            the elements of ``shape`` in order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Source:
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """A file that passed every check.

    Attributes:
        description: the JSON object that was written.
        tensors: views of a private mapping of the file: clone what should outlive it cheaply, never rely on writes.
        nbytes: size of the file.
    """

    description: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    nbytes: int


# --------------------------------------------------------------------------------------------------------- writing
def write_container(path: str | os.PathLike[str], description: dict[str, Any], sources: Iterable[Source]) -> int:
    """Write a file atomically and return its size in bytes.

    Args:
        path: the target; an existing file is replaced once the new one is complete and on the disk.
        description: anything JSON can hold, without NaN.
        sources: the tensors.

    Raises:
        RedKnotError: the folder does not exist, the disk is full, or anything else the system refuses. The old file is
            then as it was, and nothing is left behind.
    """
    target = Path(path)
    # Largest elements first: each tensor then starts at a multiple of its element size, as safetensors readers want.
    ordered = sorted(sources, key=lambda source: -source.dtype.itemsize)
    table: dict[str, Any] = {}
    offset = 0
    for source in ordered:
        if source.dtype not in NAMES:
            raise RedKnotError(f"cannot store {source.name} of dtype {source.dtype}: one of {sorted(DTYPES)} can be")
        table[source.name] = {
            "dtype": NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, offset + source.nbytes],
        }
        offset += source.nbytes
    # digests have a fixed length, so a header with blank ones has the size of the final one
    blank = _header({**description, "data": _BLANK}, table, _BLANK)
    total = len(blank) + offset
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent)
    except OSError as error:
        raise _refused(target, total, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _claim(file.fileno(), total)
            file.write(blank)
            digest = _TreeHash()
            for source in ordered:
                _write_pieces(file, source, digest)
            complete = {**description, "data": digest.hexdigest()}
            file.seek(0)
            file.write(_header(complete, table, _seal(complete, table)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _refused(target, total, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(target.parent)
    return total


def _claim(descriptor: int, total: int) -> None:
    """Take the disk space first: a full disk is noticed before anything is computed."""
    if hasattr(os, "posix_fallocate") and total:
        try:
            os.posix_fallocate(descriptor, 0, total)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write_pieces(file: Any, source: Source, digest: _TreeHash) -> None:
    written = 0
    for piece in source.pieces():
        flat = piece.detach().cpu().contiguous().reshape(-1)
        if piece.dtype != source.dtype:
            raise AssertionError(f"{source.name}: a piece of {piece.dtype}, expected {source.dtype}")
        if flat.numel():
            raw = memoryview(flat.view(torch.uint8).numpy().data)
            digest.update(raw)
            file.write(raw)
            written += raw.nbytes
    if written != source.nbytes:
        raise AssertionError(f"{source.name}: {written} bytes came, {source.nbytes} were announced")


def _header(description: dict[str, Any], table: dict[str, Any], seal: str) -> bytes:
    text = _canonical({**description, "seal": seal})
    header = json.dumps({"__metadata__": {_META: text}, **table}, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % ALIGN)
    if len(header) > MAX_HEADER_BYTES:
        raise RedKnotError(f"the description takes {len(header):,} bytes, more than {MAX_HEADER_BYTES:,}")
    return struct.pack("<Q", len(header)) + header


def _refused(target: Path, total: int, error: OSError) -> RedKnotError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RedKnotError(
            f"cannot write {target}: the disk is full ({total:,} bytes are needed). Free some space or choose another "
            "folder; a file that was there before is unchanged"
        )
    return RedKnotError(f"cannot write {target}: {error.strerror or error}; a file that was there before is unchanged")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --------------------------------------------------------------------------------------------------------- reading
def read_container(path: str | os.PathLike[str], *, verify: bool = True, header_only: bool = False) -> Contents:
    """Map a file and check it.

    Args:
        path: what `write_container` wrote.
        verify: hash every tensor byte. False checks structure and description only.
        header_only: return the description without tensors (and without hashing them).

    Raises:
        DamagedFile: truncated, damaged in any byte that matters, or not such a file.
        RedKnotError: it cannot be opened.
    """
    source = Path(path)
    try:
        with open(source, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DamagedFile(f"{source} is not a regular file")
            if status.st_size < 8:
                raise DamagedFile(f"{source} is not a saved session: it has only {status.st_size} bytes")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise RedKnotError(f"cannot open {source}: {error.strerror or error}") from error
    try:
        return _check(memoryview(mapped), verify and not header_only, header_only)
    except DamagedFile as error:
        raise DamagedFile(f"{source}: {error}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open like `open` does; a named pipe is opened at once, to be refused, and not when somebody writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(view: memoryview, verify: bool, header_only: bool) -> Contents:
    length = struct.unpack("<Q", view[:8])[0]
    if length > min(view.nbytes - 8, MAX_HEADER_BYTES):
        raise DamagedFile(f"not a saved session, or damaged: the header claims {length:,} of {view.nbytes:,} bytes")
    table = _json_object(bytes(view[8 : 8 + length]), "the header")
    start = 8 + length
    metadata = table.pop("__metadata__", None)
    text = metadata.get(_META) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise DamagedFile("not a saved session (a safetensors file without our description)")
    description = _json_object(text.encode("utf-8", "surrogatepass"), "the description")
    rows = _check_table(table, view.nbytes - start)
    seal = description.pop("seal", None)
    if seal != _seal(description, table):
        raise DamagedFile("the header does not match its seal: the file is damaged")
    data = description.pop("data", None)
    if verify and data != _verify_hash(view[start:]):
        raise DamagedFile("the tensors do not match their checksum: the file is damaged")
    tensors: dict[str, torch.Tensor] = {}
    if not header_only:
        for name, dtype, shape, begin, end in rows:
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
            else:
                raw = torch.frombuffer(view, dtype=torch.uint8, count=end - begin, offset=start + begin)
                tensors[name] = raw.view(dtype).view(shape)
    return Contents(description, tensors, view.nbytes)


def _json_object(raw: bytes, what: str) -> dict[str, Any]:
    if not _shallow(raw):
        raise DamagedFile(f"{what} is nested too deeply")
    try:
        parsed = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{what} is not JSON: {shorten(str(error))}") from error
    if not isinstance(parsed, dict):
        raise DamagedFile(f"{what} is not a JSON object")
    return parsed


def _shallow(raw: bytes) -> bool:
    """Whether no more than `MAX_DEPTH` brackets are open anywhere; brackets inside strings are not counted."""
    depth = 0
    inside = escaped = False
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return True
    for byte in raw:
        if inside:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in (0x5B, 0x7B):
            depth += 1
            if depth > MAX_DEPTH:
                return False
        elif byte in (0x5D, 0x7D):
            depth -= 1
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


_Row = tuple[str, torch.dtype, list[int], int, int]


def _check_table(table: dict[str, Any], data_bytes: int) -> list[_Row]:
    """The tensors in file order, if they tile exactly the ``data_bytes`` that are there."""
    rows: list[_Row] = []
    for name, row in table.items():
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise DamagedFile(f"tensor {shorten(name)} has a malformed description")
        dtype = DTYPES.get(row["dtype"]) if isinstance(row["dtype"], str) else None
        shape, offsets = row["shape"], row["data_offsets"]
        if dtype is None:
            raise DamagedFile(f"tensor {shorten(name)} has an unknown dtype {shorten(row['dtype'])}")
        if not (isinstance(shape, list) and len(shape) <= 8 and all(_is_size(n, 2**40) for n in shape)):
            raise DamagedFile(f"tensor {shorten(name)} has an impossible shape {shorten(shape)}")
        if math.prod(n for n in shape if n) > 2**62:  # torch counts elements in 64 bits, of empty tensors as well
            raise DamagedFile(f"tensor {shorten(name)} has an impossible shape {shorten(shape)}")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_size(n, data_bytes) for n in offsets)):
            raise DamagedFile(f"tensor {shorten(name)} lies outside the {data_bytes:,} bytes of the file")
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0] or offsets[0] % dtype.itemsize:
            raise DamagedFile(f"tensor {shorten(name)}: shape {shorten(shape)} does not fit its bytes {offsets}")
        rows.append((name, dtype, shape, offsets[0], offsets[1]))
    rows.sort(key=lambda row: (row[3], row[4]))
    position = 0
    for name, _, _, begin, end in rows:
        if begin != position:
            raise DamagedFile(f"tensor {shorten(name)} starts at byte {begin}, expected {position}")
        position = end
    if position != data_bytes:
        raise DamagedFile(f"truncated or padded: {data_bytes:,} bytes of tensors, the header describes {position:,}")
    return rows


def _is_size(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


# --------------------------------------------------------------------------------------------------------- hashing
def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _seal(description: dict[str, Any], table: dict[str, Any]) -> str:
    digest = hashlib.sha256(b"redknot-session-header-1")
    for part in (description, table):
        try:
            raw = _canonical(part).encode()
        except (ValueError, RecursionError) as error:  # NaN, or an integer of thousands of digits
            raise DamagedFile(f"the header holds what it may not: {shorten(str(error))}") from error
        digest.update(struct.pack("<Q", len(raw)) + raw)
    return digest.hexdigest()


class _TreeHash:
    """SHA-256 over the SHA-256 of every `PIECE` bytes of a stream, however the stream is cut."""

    def __init__(self) -> None:
        self._root = hashlib.sha256(b"redknot-session-data-1")
        self._leaf, self._filled = hashlib.sha256(), 0

    def update(self, raw: memoryview) -> None:
        position = 0
        while position < raw.nbytes:
            part = raw[position : position + PIECE - self._filled]
            self._leaf.update(part)
            self._filled += part.nbytes
            position += part.nbytes
            if self._filled == PIECE:
                self._root.update(self._leaf.digest())
                self._leaf, self._filled = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        if self._filled:
            self._root.update(self._leaf.digest())
            self._leaf, self._filled = hashlib.sha256(), 0
        return self._root.hexdigest()


def _verify_hash(view: memoryview) -> str:
    """The same digest as `_TreeHash`, on several threads (hashlib releases the GIL)."""
    root = hashlib.sha256(b"redknot-session-data-1")
    pieces = (view[i : i + PIECE] for i in range(0, view.nbytes, PIECE))
    for leaf in _map(lambda piece: hashlib.sha256(piece).digest(), pieces, view.nbytes):
        root.update(leaf)
    return root.hexdigest()


def _map(function: Callable[[memoryview], bytes], pieces: Iterator[memoryview], nbytes: int) -> Iterable[bytes]:
    workers = min(16, os.cpu_count() or 1)
    if workers < 2 or nbytes < 4 * PIECE:
        return map(function, pieces)
    with ThreadPoolExecutor(workers) as pool:  # one for each call: a module-wide one would be dead in a forked child
        return list(pool.map(function, pieces))
