"""Many requests in one process: no page leaks, no growth of memory, every text a fresh cache's. See `soak`."""

from __future__ import annotations

import pytest
from soak import Soak

MIB = 1 << 20


def check(soak: Soak, requests: int, growth: int) -> None:
    assert sum(soak.served.values()) >= requests and soak.served["cancelled"] > requests // 20
    # the first tenth warms up allocators and caches of other libraries
    assert soak.sizes[-1] - soak.sizes[2] <= growth, [size // MIB for size in soak.sizes]


def test_some_hundred_requests_leave_nothing_behind():
    soak = Soak(seed=1)
    soak.run(300)
    check(soak, 300, 16 * MIB)


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind():
    soak = Soak(seed=2)
    soak.run(10_000, report=lambda number, size, pages: print(number, size // MIB, "MiB", pages, "pages", flush=True))
    check(soak, 10_000, 16 * MIB)
