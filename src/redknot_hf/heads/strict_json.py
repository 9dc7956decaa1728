"""Reading JSON from strangers: bounded size and depth, no duplicate keys, no NaN, and one kind of error.

Files come from the Hub and from other projects. Whatever is in them, the caller gets plain data or a `ProfileError`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import ProfileError, shorten

__all__ = ["MAX_BYTES", "MAX_DEPTH", "parse_json", "read_bytes", "read_json"]

MAX_BYTES = 4 * 2**20
"""Largest profile file read. Realistic profiles are below 50 kB, the largest foreign map known is 3 MB unpacked."""

MAX_DEPTH = 32


def read_bytes(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a small file; a .gz file is unpacked, and the limit holds for what comes out.

    Raises:
        ProfileError: no such file, a directory, unreadable, damaged, or larger than `max_bytes`.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise ProfileError(f"no such file: {shorten(str(path), 200)}") from None
    except (OSError, EOFError, ValueError) as error:
        raise ProfileError(f"cannot read {shorten(str(path), 200)}: {error}") from None
    except Exception as error:  # zlib.error has no public base class but Exception
        raise ProfileError(f"cannot unpack {shorten(str(path), 200)}: {error}") from None
    if len(data) > max_bytes:
        raise ProfileError(f"{shorten(str(path), 200)} is larger than {max_bytes} bytes: not a head profile")
    return data


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Any:
    """`parse_json` of a file."""
    return parse_json(read_bytes(path, max_bytes), str(path))


def parse_json(data: bytes | str, source: str) -> Any:
    """Parse JSON strictly.

    Args:
        data: UTF-8 text.
        source: named in error messages.

    Raises:
        ProfileError: not UTF-8, not JSON, a duplicate key, NaN or an infinity, nested deeper than `MAX_DEPTH`, a number
            of thousands of digits, or text that cannot be encoded again (lone surrogates).
    """
    where = shorten(source, 200)
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise ProfileError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ProfileError(f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ProfileError(f"{where} is nested deeper than {MAX_DEPTH} levels") from None
    except ProfileError as error:
        raise ProfileError(f"{where}: {error}") from None
    except ValueError as error:  # integers of more than 4300 digits
        raise ProfileError(f"{where}: {error}") from None
    _check_tree(value, where)
    return value


def _check_tree(value: Any, where: str) -> None:
    # Iterative: what parsed may still be too deep for recursive code of ours.
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.keys())
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
            elif isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise ProfileError(f"{where} contains text that is not valid Unicode: {shorten(item)}") from None
        if not deeper:
            return
        level = deeper
    raise ProfileError(f"{where} is nested deeper than {MAX_DEPTH} levels")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ProfileError(f"the key {shorten(key)} appears twice in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> None:
    raise ProfileError(f"{name} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ProfileError(f"the number {shorten(text)} is too large")
    return value
