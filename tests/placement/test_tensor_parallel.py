"""Tensor parallel over gloo: 2 and 4 processes by torchrun on loopback, one launch each, against one process.

The checks are in `tp_worker`. A launch takes most of its time to import torch and transformers, hence one for all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import environment
from tp_worker import CHECKS

pytestmark = pytest.mark.dist
SECONDS = 240  # a launch takes a tenth of that on an idle machine


def launch(size: int, folder: Path, stores: list[Any]) -> list[dict[str, str]]:
    """Results of every rank; what did not finish has none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += [str(Path(__file__).with_name("tp_worker.py")), str(folder)]
    log = folder / "log.txt"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(REDKNOT_TEST_STORES=json.dumps(stores)),
        )  # fmt: skip
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):  # the launcher and its workers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
    found = []
    for rank in range(size):
        path = folder / f"results-{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else {})
    if any(set(each) != set(CHECKS) for each in found):
        print(log.read_text()[-6000:])
    return found


@pytest.fixture(scope="module")
def store_urls(request) -> list[Any]:
    """The servers that can be started here; without them the check of stores passes over fewer."""
    urls: list[Any] = []
    with contextlib.suppress(pytest.skip.Exception):
        server = request.getfixturevalue("valkey_server")
        urls.append([f"valkey://127.0.0.1:{server.port}", {}])
    with contextlib.suppress(pytest.skip.Exception):
        pool = request.getfixturevalue("mooncake_pool")
        pool.member._connected()  # it is its memory that the pool has
        options = {"admin_port": pool.admin_port, "segment_bytes": 0, "buffer_bytes": 16 << 20}
        urls.append([pool.url, options])
    return urls


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, store_urls) -> Any:
    """Launches on demand, once per number of ranks."""
    known: dict[int, list[dict[str, str]]] = {}

    def of(size: int) -> list[dict[str, str]]:
        if size not in known:
            known[size] = launch(size, tmp_path_factory.mktemp(f"ranks-{size}"), store_urls)
        return known[size]

    return of


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks(results, size, check):
    for rank, found in enumerate(results(size)):
        assert check in found, f"rank {rank} did not get to it"
        assert not found[check], f"rank {rank} of {size}: {found[check]}"
