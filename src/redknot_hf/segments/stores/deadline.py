"""Bound the time of a call into a library that has no timeout of its own (C++ clients, object-store SDKs)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from redknot_hf.segments.stores.types import StoreUnavailable

__all__ = ["within"]

T = TypeVar("T")


def within(seconds: float, what: str, action: Callable[[], T]) -> T:
    """Run `action` on a thread and wait at most `seconds` for it.

    A call that is late is abandoned, not stopped: its thread (a daemon, so the interpreter can exit) ends when the
    library returns, and its result is dropped.

    Raises:
        StoreUnavailable: if the time is up. Whatever `action` raises is raised here.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(action())
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=run, name=f"redknot-store-{what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise StoreUnavailable(f"{what}: no answer within {seconds:g} s")
    return outcome[0]
