"""Where profiles are kept: files, the profiles shipped with the package, and Hub repositories."""

from __future__ import annotations

import copy
import os
import re
import secrets
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ProfileError, shorten
from .codec import from_document, to_text
from .model_shape import basename, model_shape
from .profile import HeadProfile
from .strict_json import read_json

__all__ = ["FILE_NAME", "find_shipped", "load_profile", "save_profile", "shipped_names"]

FILE_NAME = "head_profile.json"
"""Name of a profile in a directory and in a Hub repository."""

_SHIPPED = Path(__file__).parent / "profiles"
_HUB_ID = re.compile(r"[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+")


def load_profile(source: str | os.PathLike[str], *, revision: str | None = None) -> HeadProfile:
    """`HeadProfile.load`: a file or directory, then a shipped name, then a Hub repository."""
    if not isinstance(source, (str, os.PathLike)):
        raise ProfileError(f"profile is {shorten(source)}; expected a path, a shipped name, a Hub id or a HeadProfile")
    name = os.fspath(source)
    if isinstance(name, bytes) or not name or "\0" in name:
        raise ProfileError(f"profile is {shorten(source)}; expected a path, a shipped name or a Hub id")
    path = Path(name)
    try:
        path.is_dir()
    except (OSError, ValueError) as error:  # too long, or not encodable as a file name
        reason = getattr(error, "strerror", None) or "it cannot be a file name"
        raise ProfileError(f"profile is {shorten(source)}: {reason}") from None
    if path.is_dir() and (path / FILE_NAME).exists():
        path = path / FILE_NAME
    if path.is_file():
        return _read(path)
    if isinstance(source, str):
        shipped = _shipped_by_name(name)
        if shipped is not None:
            return shipped
        if _HUB_ID.fullmatch(name) and not path.is_dir() and not name.endswith(".json"):
            from .hub import pull

            return _read(pull(name, FILE_NAME, revision))
    what = f"the directory has no {FILE_NAME}" if path.is_dir() else "no such file"
    raise ProfileError(
        f"no head profile {shorten(name, 200)}: {what}, and it is neither the name of a shipped profile "
        f"({', '.join(shipped_names())}) nor a Hub id 'owner/name'"
    )


def save_profile(profile: HeadProfile, path: str | os.PathLike[str]) -> Path:
    """`HeadProfile.save`: write beside the target, then rename over it."""
    text = to_text(profile)
    target = Path(path)
    if target.is_dir():
        target = target / FILE_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: it makes private files, and a profile is meant to be shared.
        temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise ProfileError(f"cannot write {shorten(str(target), 200)}: {error}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ProfileError(f"cannot write {shorten(str(target), 200)}: {error}") from None
        raise
    return target


def shipped_names() -> list[str]:
    """Names of the profiles that come with the package, as `HeadProfile.load` takes them."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def find_shipped(config_or_name: Any) -> HeadProfile | None:
    """The shipped profile for a model, or None.

    Args:
        config_or_name: a transformers config, matched by the last part of its `_name_or_path` (owner, directories, case
            ignored) and by its numbers of layers and KV heads; or a model name, matched by its last part.
    """
    if isinstance(config_or_name, str):
        return _by_basename(config_or_name)
    shape = model_shape(config_or_name)
    profile = _by_basename(shape.name)
    if profile is None or (profile.num_layers, profile.num_kv_heads) != (shape.num_layers, shape.num_kv_heads):
        return None
    return profile


def _shipped_by_name(name: str) -> HeadProfile | None:
    """For `load`: a bare name, or a full model id that a profile records; `someone-else/SameName` is not ours."""
    if "/" not in name and os.sep not in name:
        return _by_basename(name)
    for shipped in shipped_names():
        names = {str(known).lower() for known in _known_names(_shipped(shipped))}
        if name.lower() in names:
            return _copy(_shipped(shipped))
    return None


def _by_basename(name: str) -> HeadProfile | None:
    wanted = basename(name)
    if not wanted:
        return None
    for shipped in shipped_names():
        if wanted == shipped.lower():
            return _copy(_shipped(shipped))
    for shipped in shipped_names():
        if wanted in {basename(str(known)) for known in _known_names(_shipped(shipped))}:
            return _copy(_shipped(shipped))
    return None


def _known_names(profile: HeadProfile) -> list[Any]:
    aliases = profile.metadata.get("model_aliases")
    return [profile.metadata.get("model", ""), *(aliases if isinstance(aliases, list) else [])]


@cache
def _shipped(name: str) -> HeadProfile:
    return _read(_SHIPPED / f"{name}.json")


def _copy(profile: HeadProfile) -> HeadProfile:
    """Callers may change what they get; the cached one stays."""
    return copy.deepcopy(profile)


def _read(path: Path) -> HeadProfile:
    return from_document(read_json(path), shorten(str(path), 200))
