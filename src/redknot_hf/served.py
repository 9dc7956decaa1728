"""What a cache serves: which profile it takes, and which layers of the model it keeps in pages."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import compat
from .errors import RedKnotError, UnsupportedModel
from .heads import HeadProfile
from .heads.order import in_order_of
from .layer import RedKnotLayer

if TYPE_CHECKING:
    from .cache import RedKnotCache

logger = logging.getLogger(__name__)

__all__ = ["check_options", "check_served", "is_chunked", "resolve_profile"]


def check_options(prefill: str, page_size: int, rollback: int, max_cache_len: int | None) -> None:
    """Raise `RedKnotError` for an option of a cache that is out of range."""
    if prefill not in ("windowed", "full"):
        raise RedKnotError(f"prefill={prefill!r}: expected 'windowed' or 'full'")
    if type(page_size) is not int or not 1 <= page_size <= 1024 or page_size & (page_size - 1):
        raise RedKnotError(f"page_size={page_size!r}: expected a power of two from 1 to 1024, such as 64")
    if not isinstance(rollback, int) or isinstance(rollback, bool) or rollback < 0:
        raise RedKnotError(f"rollback={rollback!r}: expected a number of tokens, 0 or more")
    if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
        raise RedKnotError(f"max_cache_len={max_cache_len!r}: expected a number of tokens, or None to grow")


def resolve_profile(config: Any, profile: HeadProfile | str | None) -> HeadProfile | None:
    if profile is None:
        from .heads import find_shipped

        profile = find_shipped(config)
        if profile is None:
            _log_once(f"no head profile is shipped for {type(config).__name__}: all heads are global (exact)")
            return None
        _log_once(
            "using the head profile shipped for this model; pass HeadProfile.all_global(config) for exact results"
        )
    elif not isinstance(profile, HeadProfile):
        profile = HeadProfile.load(profile)
    profile.validate_for(config)
    return in_order_of(profile, config)


def is_chunked(config: Any, index: int) -> bool:
    """Chunked attention has its own mask pattern; transformers caches it like a sliding window."""
    types = getattr(config, "layer_types", None)
    if types:
        return types[index] == "chunked_attention"
    return bool(getattr(config, "attention_chunk_size", None)) and not getattr(config, "sliding_window", None)


def check_served(cache: RedKnotCache) -> None:
    """A profile must not be ignored without a word: say which layers with local heads are not served from pages.

    Raises:
        UnsupportedModel: none is served, or transformers cannot run the family under our attention.
    """
    if cache.profile is None:
        return
    # (up to transformers 5.20 layers that share an earlier one's keys have no entry in a cache)
    rows = cache.profile.head_class[: len(cache.layers)]
    local = [index for index, row in enumerate(rows) if "local" in row]
    if local and not compat.can_switch_attention(cache.config):
        raise UnsupportedModel(
            f"{type(cache.config).__name__}: transformers cannot change this family's attention, so local heads cannot be "
            "served. HeadProfile.all_global(config) is exact, and so is DynamicCache; load the model without "
            "attn_implementation='redknot'"
        )
    unserved = [index for index in local if not isinstance(cache.layers[index], RedKnotLayer)]
    if not unserved:
        return
    kinds = ", ".join(sorted({type(cache.layers[index]).__name__ for index in unserved}))
    if not cache.paged_layers:
        raise UnsupportedModel(
            f"{type(cache.config).__name__}: transformers keeps its keys and values in {kinds}, which a RedKnotCache "
            "does not serve; use DynamicCache, or HeadProfile.all_global(config)"
        )
    _log_once(
        f"layers {unserved} of {type(cache.config).__name__} are kept by transformers ({kinds}): local heads there keep "
        "what the model keeps",
        logging.WARNING,
    )


_logged: set[str] = set()


def _log_once(message: str, level: int = logging.INFO) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.log(level, message)
