"""Servers for the transfer tests: the fixtures of the segment stores' tests, and the launch of processes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "store_servers", Path(__file__).parent.parent / "segments" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
servers = importlib.util.module_from_spec(_spec)
sys.modules["store_servers"] = servers  # dataclasses look their module up
_spec.loader.exec_module(servers)

valkey_server = servers.valkey_server
mooncake_pool = servers.mooncake_pool


def environment(**more: str) -> dict[str, str]:
    """For child processes: one thread each, no GPU (gloo on the CPU), nothing from a launcher around the tests."""
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**keep, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", **more}
