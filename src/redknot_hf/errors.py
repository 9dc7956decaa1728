"""Errors a user can cause.

Every one is a `RedKnotError`, so `except RedKnotError` (or `except ValueError`) catches them all, and the command line
prints their text as one line. A message names the argument, the value, what was expected and what to do about it.
Programming mistakes inside the package stay ordinary exceptions.
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "MissingExtraError",
    "PoolExhausted",
    "ProfileError",
    "RedKnotError",
    "RollbackExceeded",
    "UnsupportedModel",
    "shorten",
]


class RedKnotError(ValueError):
    """Wrong input or an unsupported combination; the message says which and what to do."""


class ProfileError(RedKnotError):
    """A head profile, or a file that should hold one, is malformed or belongs to another model."""


class CacheError(RedKnotError):
    """A cache was used in a way it cannot serve, e.g. with another batch size or after an interrupted forward."""


class RollbackExceeded(CacheError):
    """`crop` would make tokens visible again that a local head has evicted."""


class PoolExhausted(CacheError):
    """The page pool may not grow, or the device has no memory left; nothing has been changed."""


class UnsupportedModel(RedKnotError):
    """The model does something with its keys, values or masks that a RedKnotCache cannot serve."""


class MissingExtraError(RedKnotError):
    """A feature needs an optional dependency that is not installed.

    Args:
        feature: what the user asked for, e.g. `"plots as PNG or SVG"`.
        module: the module that could not be imported.
        extra: the extra of redknot-hf that brings it.
    """

    def __init__(self, feature: str, module: str, extra: str) -> None:
        super().__init__(f"{feature} needs {module}, which is not installed: pip install 'redknot-hf[{extra}]'")
        self.module = module
        self.extra = extra


def shorten(value: object, limit: int = 60) -> str:
    """`repr(value)` cut to `limit` characters, for error messages about values of unknown size."""
    # Slice long strings before repr: the value may be megabytes of a hostile file.
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return repr(value[:limit]) + "..."
    if isinstance(value, (list, tuple, dict, set)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4300 digits, nested bombs
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
