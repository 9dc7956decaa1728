"""A cache of all ranks in one folder: written by any number of ranks, loaded by any other number.

`RedKnotCache.save` writes what one process holds, bit for bit. Here a folder holds the whole cache, one file per
(layer, KV head), and each rank that loads it reads its own heads. It is `publish` and `fetch` on a folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RedKnotError
from ..segments.stores import SegmentStore
from .fetching import Fetched
from .transfer import Publication, fetch, publish

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["load_world", "save_world"]

_KEY = "cache"


def save_world(cache: RedKnotCache, folder: str | os.PathLike[str], **options: Any) -> Publication:
    """Write the heads of all ranks into ``folder``; all ranks call it, and see the same folder.

    Args:
        folder: created if needed; what it held before is replaced once the new cache is complete.
        **options: tokens, model and group, as for `publish`.

    Raises:
        NotPublished: the disk is full or refuses, on any rank.
        CacheError: as `publish`.
    """
    with SegmentStore(Path(folder)) as store:
        return publish(cache, store, _KEY, **options)


def load_world(folder: str | os.PathLike[str], config: Any, **options: Any) -> Fetched:
    """The cache in ``folder``, with the heads of this process; all ranks of the model call it.

    Args:
        config: the model, or its config.
        **options: device, rank, world_size, group and options of the cache, as for `fetch`.

    Raises:
        CacheMissing: the folder holds no whole cache.
        CacheError: it belongs to another model.
    """
    if not Path(folder).is_dir():
        raise RedKnotError(f"folder: {os.fspath(folder)} is not a directory")
    with SegmentStore(Path(folder)) as store:
        return fetch(store, _KEY, config, **options)
