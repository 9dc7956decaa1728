"""What stores report, what they raise, and how their URLs are shown."""

from __future__ import annotations

import dataclasses
from urllib.parse import urlsplit

from redknot_hf.errors import RedKnotError

__all__ = [
    "GcReport",
    "StoreFull",
    "StoreRecord",
    "StoreStat",
    "StoreUnavailable",
    "private_parts",
    "redact",
]


class StoreUnavailable(RedKnotError):
    """The store did not answer: down, unreachable, or slower than its timeout."""


class StoreFull(RedKnotError):
    """The store has no room for the entry (disk full, larger than max_bytes, server out of memory)."""


@dataclasses.dataclass(frozen=True)
class StoreRecord:
    """One stored entry: 64 hex digits, bytes it takes, and when it was last used (seconds since 1970; 0 if unknown)."""

    key: str
    nbytes: int
    last_used: float = 0.0


@dataclasses.dataclass
class StoreStat:
    """State of a store (`entries`, `nbytes`) and what this object has seen since it was made (the rest)."""

    url: str
    tier: str
    entries: int
    nbytes: int
    max_bytes: int | None
    hits: int = 0
    misses: int = 0
    puts: int = 0
    corrupt: int = 0
    failures: int = 0
    evictions: int = 0


@dataclasses.dataclass
class GcReport:
    """What a `gc` removed: entries, leftovers of interrupted writes, and the bytes of both."""

    removed: int = 0
    leftovers: int = 0
    freed_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0


def redact(url: str) -> str:
    """A URL fit for print: user names, passwords and query values are gone."""
    head, has_query, _ = url.partition("?")
    scheme, separator, rest = head.rpartition("://")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        authority = "***@" + authority.rpartition("@")[2]
    return scheme + separator + authority + slash + path + ("?***" if has_query else "")


def private_parts(url: str) -> list[str]:
    """The pieces of a URL that must not appear in a log: credentials and query values, longest first."""
    try:
        parts = urlsplit(url)
        secrets = [parts.netloc.rpartition("@")[0], parts.password or "", parts.query]
        secrets += [value for _, _, value in (item.partition("=") for item in parts.query.split("&"))]
    except ValueError:
        return [url]
    return sorted({s for s in secrets if len(s) > 3}, key=len, reverse=True)
