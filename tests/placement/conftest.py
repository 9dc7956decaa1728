"""Fixtures of the placement tests."""

from processes import mooncake_pool, valkey_server

__all__ = ["mooncake_pool", "valkey_server"]
