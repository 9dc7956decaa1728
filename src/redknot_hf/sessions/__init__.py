"""Sessions that outlive their place on the device: files, host memory, and a store with budgets.

`RedKnotCache.save`, `load`, `offload` and `prefetch` are the front door; `SessionStore` keeps many sessions in few
bytes.
"""

from __future__ import annotations

from .container import DamagedFile
from .files import describe
from .store import SessionMissing, SessionStore, StoreReport

__all__ = ["DamagedFile", "SessionMissing", "SessionStore", "StoreReport", "describe"]
