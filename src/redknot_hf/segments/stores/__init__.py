"""Where segments are kept: memory, local files, anything fsspec reaches, Valkey, Mooncake, and chains of those."""

from redknot_hf.segments.stores.base import SegmentStore
from redknot_hf.segments.stores.types import GcReport, StoreFull, StoreRecord, StoreStat, StoreUnavailable

__all__ = ["GcReport", "SegmentStore", "StoreFull", "StoreRecord", "StoreStat", "StoreUnavailable"]
