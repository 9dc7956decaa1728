"""Which class serves which URL. Client packages are imported only when their kind of store is opened."""

from __future__ import annotations

import os
from typing import Any

from redknot_hf.errors import RedKnotError
from redknot_hf.segments.stores.base import SegmentStore
from redknot_hf.segments.stores.types import redact

__all__ = ["store_class"]


def store_class(url: Any) -> type[SegmentStore]:
    """The class for a URL, a path object or a list of tiers.

    Raises:
        RedKnotError: if it is none of them.
    """
    if isinstance(url, (list, tuple)):
        from redknot_hf.segments.stores.tiered import TieredStore

        return TieredStore
    if isinstance(url, os.PathLike):
        from redknot_hf.segments.stores.local import LocalFileStore

        return LocalFileStore
    if not isinstance(url, str) or "://" not in url:
        shown = redact(url) if isinstance(url, str) else repr(type(url))
        raise RedKnotError(
            f"url must be memory://, file:///directory, valkey://host:port, mooncake://host:port, an fsspec URL such "
            f"as s3://bucket/prefix, or a list of those, got {shown}"
        )
    scheme = url.partition("://")[0].lower()
    if scheme == "memory":
        from redknot_hf.segments.stores.memory import MemoryStore

        return MemoryStore
    if scheme == "file":
        from redknot_hf.segments.stores.local import LocalFileStore

        return LocalFileStore
    if scheme in ("valkey", "valkeys", "redis", "rediss"):
        from redknot_hf.segments.stores.valkey import ValkeyStore

        return ValkeyStore
    if scheme == "mooncake":
        from redknot_hf.segments.stores.mooncake import MooncakeStore

        return MooncakeStore
    from redknot_hf.segments.stores.remote import FsspecStore

    return FsspecStore
