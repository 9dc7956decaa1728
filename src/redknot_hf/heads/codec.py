"""The JSON form of a head profile (version 1). docs/profile-format.md is the specification, this file its code.

    {
      "format": "redknot_hf.head_profile",
      "version": 1,
      "num_layers": 2,
      "num_kv_heads": 4,
      "head_class": ["GLLR", "LLLD"],        one letter per KV head: Global, Local, Retrieval, Dense
      "sink": 4,                             an int: every local head; or one entry per layer: an int or a row
      "window": [256, [256, 64, 1024, 0]],   same; heads that keep everything have 0
      "metadata": {...}
    }

Only this file knows the letters. It does not check ranges: `HeadProfile` does, so that a profile made in code and one
read from a file meet the same rules.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import ProfileError, shorten
from .profile import HEAD_CLASSES, HeadProfile
from .strict_json import MAX_BYTES, MAX_DEPTH

__all__ = ["FORMAT", "VERSION", "from_document", "to_document", "to_text"]

FORMAT = "redknot_hf.head_profile"
VERSION = 1

_LETTER = {name: name[0].upper() for name in HEAD_CLASSES}
_NAME = {letter: name for name, letter in _LETTER.items()}
_KEYS = ("format", "version", "num_layers", "num_kv_heads", "head_class", "sink", "window", "metadata")
_REQUIRED = _KEYS[:-1]


def to_document(profile: HeadProfile) -> dict[str, Any]:
    """The profile as JSON-ready data, in its compact form."""
    profile.validate()
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_layers": profile.num_layers,
        "num_kv_heads": profile.num_kv_heads,
        "head_class": ["".join(_LETTER[name] for name in row) for row in profile.head_class],
        "sink": _compact(profile.sink, profile.head_class),
        "window": _compact(profile.window, profile.head_class),
        "metadata": _plain_metadata(profile.metadata),
    }


def to_text(profile: HeadProfile) -> str:
    """The file's text: one line per layer, so that a person can read it and a diff shows the heads that changed.

    Raises:
        ProfileError: metadata that JSON cannot hold (named by its path), or a text larger than can be read back.
    """
    text = _layout(to_document(profile), 0) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise ProfileError(f"the profile would be larger than {MAX_BYTES} bytes; keep fewer scores in its metadata")
    return text


def from_document(document: Any, source: str = "the profile") -> HeadProfile:
    """Build a profile from parsed JSON.

    Args:
        document: what `strict_json.parse_json` returned.
        source: named in error messages.

    Raises:
        ProfileError: not this format, another version, missing or unknown keys, or a bad cell.
    """
    if not isinstance(document, dict):
        raise ProfileError(f'{source} holds {shorten(document)}; expected an object with "format": "{FORMAT}"')
    if document.get("format") != FORMAT:
        raise ProfileError(
            f'{source} is not a redknot-hf head profile: "format" is {shorten(document.get("format"))}, expected '
            f"{FORMAT!r}; head maps of other projects are read by HeadProfile.import_from(path)"
        )
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        hint = "; a newer redknot-hf may read it" if type(version) is int and version > VERSION else ""
        raise ProfileError(f"{source}: version is {shorten(version)}; this release reads version {VERSION}{hint}")
    missing = [key for key in _REQUIRED if key not in document]
    if missing:
        raise ProfileError(f"{source}: missing {', '.join(map(repr, missing))}")
    unknown = sorted(key for key in document if key not in _KEYS)
    if unknown:
        names = ", ".join(shorten(key) for key in unknown[:5]) + ("..." if len(unknown) > 5 else "")
        raise ProfileError(f"{source}: unknown keys {names}; additions belong under 'metadata'")
    try:
        classes = _classes(document["head_class"])
        return HeadProfile(
            num_layers=document["num_layers"],
            num_kv_heads=document["num_kv_heads"],
            head_class=classes,
            sink=_expanded(document["sink"], classes),
            window=_expanded(document["window"], classes),
            metadata=document.get("metadata", {}),
        )
    except ProfileError as error:
        raise ProfileError(f"{source}: {error}") from None


def _classes(rows: Any) -> Any:
    """Rows of names from rows of letters or names. A letter that means nothing stays, and validation names its cell."""
    if not isinstance(rows, list):
        return rows
    return [[_NAME.get(letter, letter) for letter in row] if isinstance(row, str) else row for row in rows]


def _expanded(value: Any, classes: Any) -> Any:
    if not isinstance(value, list):
        return value
    if not isinstance(classes, list) or len(classes) != len(value):
        return value
    lengths = [len(row) if isinstance(row, list) else 0 for row in classes]
    return [[row] * n if _is_int(row) else row for row, n in zip(value, lengths, strict=True)]


def _compact(rows: list[list[int]], classes: list[list[str]]) -> Any:
    """An int when all local heads agree, else per layer an int when its local heads agree, else the row."""

    def shared(values: list[int], names: list[str]) -> set[int]:
        return {value for value, name in zip(values, names, strict=True) if name == "local"}

    per_layer = [shared(values, names) for values, names in zip(rows, classes, strict=True)]
    everywhere = set().union(*per_layer)
    if len(everywhere) <= 1:
        return everywhere.pop() if everywhere else 0
    return [(values if len(found) > 1 else next(iter(found), 0)) for values, found in zip(rows, per_layer, strict=True)]


def _plain_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    plain = _plain(metadata, "metadata", 0)
    scores = plain.get("scores", {})
    for key, matrix in scores.items():
        scores[key] = [[None if x is None else float(f"{x:.4g}") for x in row] for row in matrix]
    return plain


def _plain(value: Any, path: str, depth: int) -> Any:
    """Copy into what JSON can hold, or say where it cannot."""
    if depth > MAX_DEPTH - 4:
        raise ProfileError(f"{path[:80]} is nested too deeply to be saved")
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):  # numpy scalars and arrays, tensors
        value = value.tolist()
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ProfileError(f"{path} has the key {shorten(key)}; JSON keys are strings")
        return {key: _plain(item, f"{path}[{shorten(key)}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ProfileError(f"{path} is {shorten(value)}, which is not valid Unicode") from None
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ProfileError(f"{path} is {value}; JSON has no such number")
        return value
    raise ProfileError(f"{path} is {shorten(value)} ({type(value).__name__}), which JSON cannot hold")


def _layout(value: Any, indent: int) -> str:
    """Objects and lists of rows over several lines, rows on one: json.dumps would give every number its own line."""
    pad = " " * (indent + 2)
    if isinstance(value, dict) and value:
        items = [f"{pad}{json.dumps(key)}: {_layout(item, indent + 2)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(item, (list, dict, str)) for item in value):
        return "[\n" + ",\n".join(pad + _layout(item, indent + 2) for item in value) + "\n" + " " * indent + "]"
    return json.dumps(value, ensure_ascii=False)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
