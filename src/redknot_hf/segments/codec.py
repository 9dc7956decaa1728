"""A stored segment as bytes: a safetensors file whose `__metadata__` says what it is and seals its content.

    [8 bytes: header length][JSON header, padded][tensor bytes, back to back]

Any safetensors reader opens such a file. Ours trusts nothing in it: every length, shape and offset is compared with the
number of bytes that are really there before a tensor is made, tensors are views of the given buffer (so a header
cannot make the process allocate anything), and the content must match the checksum. There is no pickle.

The checksum is a tree (SHA-256 of 64 KiB pieces, hashed on several threads, or by a GPU) and guards against damage. It
does not stop somebody who can write to the store from sealing an entry of his own; `secret` does: the seal is then
keyed and cannot be made without it.

This module does not know what the tensors mean nor where the bytes are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import torch

from redknot_hf.errors import RedKnotError, shorten

__all__ = [
    "PIECE_BYTES",
    "CorruptEntry",
    "FileSource",
    "PendingCheck",
    "SegmentEntry",
    "UnreadableEntry",
    "decode",
    "encode",
]

VERSION = 2  # 1 had larger pieces
MAX_HEADER_BYTES = 16 << 20
PIECE_BYTES = 64 << 10  # of one leaf of the hash tree: small enough that a GPU has many to hash at a time
_RUN_BYTES = 4 << 20  # hashed by a thread in one go
_ALIGN = 64
_META = "redknot_segment"
_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Verify = Literal["full", "header", "later"]


class CorruptEntry(RedKnotError):
    """The bytes are not an entry, are damaged, or are another entry than the one asked for. Delete them."""


class UnreadableEntry(RedKnotError):
    """A well-formed entry that this reader must not use: a newer version, or sealed with another secret. Leave it."""


@dataclasses.dataclass
class PendingCheck:
    """The checksum of an entry's tensors that nobody has computed yet.

    Call it, or hash the leaves elsewhere and `compare` them.

    Attributes:
        expected: what the entry says.
        names, views: its tensors in their order, and their bytes.
    """

    expected: str
    names: Sequence[str]
    views: Sequence[memoryview]

    def __call__(self) -> None:
        """Hash everything on this thread.

        Raises:
            CorruptEntry: the bytes are damaged.
        """
        self.compare([leaf for view in self.views for leaf in self.leaves(view)])

    @staticmethod
    def leaves(run: Any) -> list[bytes]:
        """The hashes of the pieces of `PIECE_BYTES` in a run of bytes (the last one of a tensor is shorter)."""
        return [hashlib.sha256(run[i : i + PIECE_BYTES]).digest() for i in range(0, len(run), PIECE_BYTES)]

    def first_leaf(self, name: str) -> int:
        """The number of a tensor's first piece."""
        before = self.views[: list(self.names).index(name)]
        return sum(-(-view.nbytes // PIECE_BYTES) for view in before)

    def compare(self, leaves: Iterable[bytes]) -> None:
        """Raises `CorruptEntry` unless these are the hashes of all pieces in their order; one may hold several of them."""
        if self.expected != _root(leaves):
            raise CorruptEntry("the tensor bytes do not match their checksum")


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Where the bytes of an entry's tensors are in an open file: reading them is quicker than touching a mapped file.

    Attributes:
        file: open for reading; closes itself.
        offsets: by name of the tensor.
    """

    file: HasFileno
    offsets: dict[str, int]


@dataclasses.dataclass
class SegmentEntry:
    """What a store keeps for one segment: named tensors and a description.

    Attributes:
        tensors: name -> tensor, any shapes; heads may keep different numbers of tokens (see `ragged`).
        num_tokens: tokens of the segment, whether or not every head kept all of them.
        start: request position of the segment's first token when its keys were computed (the header's length).
        extra: anything else that JSON can hold.
        key, model, rope, dtype, profile: identity, filled in by the store from the `SegmentKey` on `put`.
        tier: name of the store the entry came from, e.g. `"memory"`; set by `get`, never stored.
        check: what has still to be called before the tensors may be trusted, because their bytes have not been hashed
            yet; it raises `CorruptEntry`. None: nothing is left to do.
        source: the file that the tensors are mapped from, for who would rather read it; None otherwise.

    An entry that came from a store shares memory with it: read the tensors, never write to them.
    """

    tensors: dict[str, torch.Tensor]
    num_tokens: int = 0
    start: int = 0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    key: str = ""
    model: str = ""
    rope: str = ""
    dtype: str = ""
    profile: str = ""
    tier: str = ""
    check: PendingCheck | None = dataclasses.field(default=None, repr=False, compare=False)
    source: FileSource | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def identity(self) -> dict[str, Any]:
        """The JSON fields of the header, without the seal."""
        return {
            "version": VERSION,
            "key": self.key,
            "model": self.model,
            "rope": self.rope,
            "dtype": self.dtype,
            "profile": self.profile,
            "num_tokens": self.num_tokens,
            "start": self.start,
            "extra": self.extra,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def encode(entry: SegmentEntry, *, secret: bytes | None = None) -> list[memoryview]:
    """An entry as the buffers that make up its bytes, to be written one after the other; tensors are not copied.

    Tensors on another device are brought to the host, strided ones are made contiguous.

    Raises:
        RedKnotError: for a dtype or a tensor name that cannot be stored, or an `extra` that is not JSON.
    """
    # Largest elements first: each tensor then starts at a multiple of its element size, as safetensors readers want.
    items = sorted(entry.tensors.items(), key=lambda item: -item[1].element_size())
    table: dict[str, Any] = {}
    views: list[memoryview] = []
    offset = 0
    for name, tensor in items:
        if not isinstance(name, str) or not 0 < len(name) <= 256 or name == "__metadata__":
            raise RedKnotError(f"entry.tensors: a name has 1 to 256 characters, got {shorten(name)}")
        if tensor.dtype not in _NAMES:
            raise RedKnotError(f"entry.tensors[{name!r}]: cannot store {tensor.dtype}; one of {sorted(_DTYPES)} can be")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        content: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
        view = memoryview(content).cast("B")
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + view.nbytes],
        }
        views.append(view)
        offset += view.nbytes

    fields = entry.identity()
    fields["data"] = _data_digest(views)
    try:
        # Through JSON and back, so that what is sealed is what a reader will see (tuples are lists, keys are strings).
        fields["extra"] = json.loads(json.dumps(entry.extra, allow_nan=False))
        fields["seal"] = _seal(fields, table, secret)
    except (TypeError, ValueError, RecursionError) as e:
        raise RedKnotError(f"entry.extra must be plain JSON (numbers, strings, lists, objects): {e}") from e
    fields["keyed"] = secret is not None
    header = json.dumps({"__metadata__": {_META: _canonical(fields)}, **table}, separators=(",", ":")).encode()
    if len(header) + _ALIGN > MAX_HEADER_BYTES:
        raise RedKnotError(f"entry: its description takes {len(header)} bytes, more than {MAX_HEADER_BYTES}")
    header += b" " * (-(len(header) + 8) % _ALIGN)
    return [memoryview(struct.pack("<Q", len(header)) + header), *views]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def decode(
    buffer: Any, *, key: str | None = None, secret: bytes | None = None, verify: Verify = "full"
) -> SegmentEntry:
    """The entry in `buffer`; its tensors are views of the buffer when that is writable (a private mmap, a bytearray).

    Args:
        buffer: bytes-like object holding exactly one entry. If it has an attribute ``file``, it is a mapping of it.
        key: the 64 hex digits that the entry must carry.
        secret: what the entry must be sealed with; `None` for an unkeyed seal.
        verify: `"full"` hashes every byte; `"header"` checks the structure and the seal of the description, not the
            tensor bytes; `"later"` leaves the hashing to the entry's `check`.

    Raises:
        CorruptEntry: truncated, damaged, malformed, or the entry of another key.
        UnreadableEntry: newer version, or a keyed seal and no secret (or the reverse).
        RedKnotError: an unknown `verify`.
    """
    if verify not in ("full", "header", "later"):
        raise RedKnotError(f"verify must be 'full', 'header' or 'later', got {shorten(verify)}")
    view = memoryview(buffer).cast("B")
    header, data_start = _parse_header(view)
    fields = _parse_fields(header)
    table = _check_table(header, view.nbytes - data_start)

    if bool(fields.pop("keyed", False)) != (secret is not None):
        state = "is sealed with a secret and none was given" if secret is None else "is not sealed with a secret"
        raise UnreadableEntry(f"entry {state} (secret= or REDKNOT_STORE_SECRET)")
    seal = fields.pop("seal", None)
    try:
        right = _seal(fields, header, secret)
    except (ValueError, RecursionError) as e:  # NaN, or nested more deeply than JSON can be written
        raise CorruptEntry(f"the description is not plain JSON: {shorten(str(e))}") from e
    if seal != right:
        raise CorruptEntry("the description does not match its seal")
    if key is not None and fields["key"] != key:
        raise CorruptEntry(f"the entry belongs to another key, {shorten(fields['key'])}")
    pieces = [view[data_start + begin : data_start + end] for _, _, _, begin, end in table]
    check = PendingCheck(fields["data"], [row[0] for row in table], pieces) if verify != "header" else None
    if verify == "full" and check is not None:
        check.compare(_leaves(pieces))
        check = None

    if view.readonly:
        # torch has no read-only tensors, and writing through one to a bytes object is undefined: copy once.
        view = memoryview(bytearray(view))
    tensors = {}
    for name, dtype, shape, begin, end in table:
        try:
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
            else:
                raw = torch.frombuffer(view, dtype=torch.uint8, count=end - begin, offset=data_start + begin)
                tensors[name] = raw.view(dtype).view(shape)
        except RuntimeError as e:  # shapes such as [0, 2**31, 2**31, 2**31] that no tensor can have
            raise CorruptEntry(f"tensor {shorten(name)}: {e}") from e
    del fields["data"], fields["version"]
    file = getattr(buffer, "file", None)
    source = FileSource(file, {row[0]: data_start + row[3] for row in table}) if file is not None else None
    return SegmentEntry(tensors=tensors, check=check, source=source, **fields)


def _parse_header(view: memoryview) -> tuple[dict[str, Any], int]:
    if view.nbytes < 8:
        raise CorruptEntry(f"truncated: {view.nbytes} bytes")
    length = struct.unpack("<Q", view[:8])[0]
    if length > min(view.nbytes - 8, MAX_HEADER_BYTES):
        raise CorruptEntry(f"the header claims {length} bytes of {view.nbytes}")
    try:
        header = json.loads(bytes(view[8 : 8 + length]), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CorruptEntry(f"the header is not JSON: {shorten(str(e))}") from e
    if not isinstance(header, dict):
        raise CorruptEntry("the header is not a JSON object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


_FIELD_TYPES: dict[str, type] = {
    "version": int, "key": str, "model": str, "rope": str, "dtype": str, "profile": str,
    "num_tokens": int, "start": int, "extra": dict, "data": str, "seal": str, "keyed": bool,
}  # fmt: skip


def _parse_fields(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.pop("__metadata__", None)
    text = metadata.get(_META) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise CorruptEntry("not a redknot-hf segment (no description in the header)")
    try:
        fields = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CorruptEntry(f"the description is not JSON: {shorten(str(e))}") from e
    if not isinstance(fields, dict) or not isinstance(fields.get("version"), int):
        raise CorruptEntry("the description has no version")
    if fields["version"] != VERSION:
        raise UnreadableEntry(f"entry has version {shorten(fields['version'])}, this reader knows {VERSION}")
    if set(fields) != set(_FIELD_TYPES) or any(type(fields[k]) is not t for k, t in _FIELD_TYPES.items()):
        raise CorruptEntry("the description lacks a field, has an unknown one or one of a wrong type")
    return fields


_Row = tuple[str, torch.dtype, list[int], int, int]


def _check_table(header: dict[str, Any], data_bytes: int) -> list[_Row]:
    """The tensor table in file order, if it tiles exactly the `data_bytes` that are there."""
    rows: list[_Row] = []
    for name, row in header.items():
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise CorruptEntry(f"tensor {shorten(name)}: malformed description")
        dtype = _DTYPES.get(row["dtype"]) if isinstance(row["dtype"], str) else None
        shape, offsets = row["shape"], row["data_offsets"]
        if dtype is None:
            raise CorruptEntry(f"tensor {shorten(name)}: unknown dtype {shorten(row['dtype'])}")
        if not (isinstance(shape, list) and len(shape) <= 8 and all(_is_size(n, 2**31 - 1) for n in shape)):
            raise CorruptEntry(f"tensor {shorten(name)}: impossible shape {shorten(shape)}")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_size(n, data_bytes) for n in offsets)):
            raise CorruptEntry(
                f"tensor {shorten(name)}: data_offsets {shorten(offsets)} lie outside {data_bytes} bytes"
            )
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0] or offsets[0] % dtype.itemsize:
            raise CorruptEntry(f"tensor {shorten(name)}: shape {shorten(shape)} does not fit {offsets}")
        rows.append((name, dtype, shape, offsets[0], offsets[1]))
    rows.sort(key=lambda row: (row[3], row[4]))
    position = 0
    for name, _, _, begin, end in rows:
        if begin != position:
            raise CorruptEntry(f"tensor {shorten(name)}: starts at {begin}, expected {position}")
        position = end
    if position != data_bytes:
        raise CorruptEntry(f"truncated or padded: {data_bytes} bytes of tensors, the header describes {position}")
    return rows


def _is_size(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


# ---------------------------------------------------------------------------------------------------------------------
# Hashing
# ---------------------------------------------------------------------------------------------------------------------


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _seal(fields: dict[str, Any], table: dict[str, Any], secret: bytes | None) -> str:
    """Hash of everything in the header (the data digest included), keyed when there is a secret."""
    key = hashlib.blake2b(secret, digest_size=32).digest() if secret is not None else b""
    digest = hashlib.blake2b(digest_size=32, key=key, person=b"redknot-seal-1")
    for part in (_canonical(fields), _canonical(table)):
        raw = part.encode()
        digest.update(struct.pack("<Q", len(raw)) + raw)
    return digest.hexdigest()


def _data_digest(views: Sequence[memoryview]) -> str:
    """Root of the hash tree over the tensors' bytes: SHA-256 of the SHA-256 of every 64 KiB piece of every tensor."""
    return _root(_leaves(views))


def _leaves(views: Sequence[memoryview]) -> Iterable[bytes]:
    runs = [view[i : i + _RUN_BYTES] for view in views for i in range(0, view.nbytes, _RUN_BYTES)]
    return itertools.chain.from_iterable(_map(PendingCheck.leaves, runs))


def _root(leaves: Iterable[bytes]) -> str:
    root = hashlib.sha256(b"redknot-data-1")
    for leaf in leaves:
        root.update(leaf)
    return root.hexdigest()


def _map(function: Callable[[memoryview], list[bytes]], runs: list[memoryview]) -> Iterable[list[bytes]]:
    """Map over runs, on threads when there is enough to do (hashlib releases the GIL)."""
    workers = min(16, os.cpu_count() or 1, len(runs))
    if workers < 2 or sum(run.nbytes for run in runs) < 2 * _RUN_BYTES:
        return map(function, runs)
    # A pool of its own for each call: a module-wide one would be dead in a forked child.
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, runs))
