"""Prefill in one process, decode in others, over Valkey and Mooncake; readers and servers that die on the way."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import environment, servers
from transfer_worker import GREEDY, decode, make_model, make_profile, prefill

from redknot_hf.distributed import CacheMissing, NotPublished, fetch, publish
from redknot_hf.segments.stores import SegmentStore

pytestmark = [pytest.mark.dist, pytest.mark.store]
SECONDS = 180


@contextlib.contextmanager
def worker(*arguments: str) -> Iterator[tuple[subprocess.Popen, Iterator[dict]]]:
    """A process and the lines it says; killed at the end, or when it takes too long."""
    command = [sys.executable, str(Path(__file__).with_name("transfer_worker.py")), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    guard = threading.Timer(SECONDS, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        yield process, (json.loads(line) for line in process.stdout if line.startswith("{"))
    finally:
        guard.cancel()
        process.kill()
        process.wait(20)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def expected(model):
    return decode(model, *prefill(model, make_profile(model)))


def test_prefill_here_decode_there(request, model, expected):
    """A writer, then this process, a reader killed between fetching and decoding, and a reader after it; both stores."""
    stores = []
    with contextlib.suppress(pytest.skip.Exception):
        server = request.getfixturevalue("valkey_server")
        stores.append([f"valkey://127.0.0.1:{server.port}", {}])
    with contextlib.suppress(pytest.skip.Exception):
        pool = request.getfixturevalue("mooncake_pool")
        pool.member._connected()  # it is its memory that the pool has
        stores.append([pool.url, {"admin_port": pool.admin_port, "segment_bytes": 0, "buffer_bytes": 16 << 20}])
    if not stores:
        pytest.skip("neither Valkey nor Mooncake can be started here")
    with worker("write", "prompt", json.dumps(stores)) as (process, lines):
        written = list(lines)
        assert process.wait(20) == 0 and [line["url"] for line in written] == [url for url, _ in stores]
    for line, (url, options) in zip(written, stores, strict=True):
        assert line["published"] < 0.5 * line["dense"]
        with SegmentStore(url, **options) as store:
            found = fetch(store, "prompt", model)
            assert found.nbytes == line["published"]
            text = model.generate(**found.inputs, past_key_values=found.cache, **GREEDY)
            assert (text == expected).all(), url
            half = [fetch(store, "prompt", model.config, rank=rank, world_size=2).nbytes for rank in (0, 1)]
            assert sum(half) == found.nbytes and max(half) < 0.8 * found.nbytes
    with worker("read", "prompt", json.dumps(stores), "100") as (process, lines):
        assert "fetched" in next(lines)
        process.kill()
    with worker("read", "prompt", json.dumps(stores)) as (process, lines):
        said = list(lines)
        assert process.wait(20) == 0
    texts = [line["text"] for line in said if "text" in line]
    assert texts == [expected.tolist()] * len(stores)


@pytest.fixture
def own_server(tmp_path) -> Iterator[servers.Server]:
    server = servers.start_valkey(tmp_path)
    yield server
    server.stop()


def open_valkey(server: servers.Server) -> SegmentStore:
    return SegmentStore(f"valkey://127.0.0.1:{server.port}", timeout=2, retry_after=0.1)


def test_a_server_killed_while_reading(own_server, tmp_path, model, expected, caplog):
    """Some layers are read when it dies: no cache comes out, and feeding the prompt gives the right text."""
    caplog.set_level(logging.ERROR)
    profile = make_profile(model)
    store = open_valkey(own_server)
    cache, ids = prefill(model, profile)
    publish(cache, store, "prompt", tokens=ids)
    load, calls = store._load_many, []

    def load_many(names):
        calls.append(names)
        if len(calls) == 3:
            own_server.kill()
        return load(names)

    store._load_many = load_many
    with pytest.raises(CacheMissing, match=r"layer 1, head 0 .*store did not answer"):
        fetch(store, "prompt", model)
    assert len(calls) >= 3
    assert (decode(model, *prefill(model, profile)) == expected).all()
    # it comes back without its memory: still a miss, until somebody publishes again
    back = servers.start_valkey(tmp_path, own_server.port)
    try:
        store = open_valkey(own_server)
        with pytest.raises(CacheMissing, match="no cache is published"):
            fetch(store, "prompt", model)
        publish(cache, store, "prompt", tokens=ids)
        found = fetch(store, "prompt", model)
        text = model.generate(**found.inputs, past_key_values=found.cache, **GREEDY)
        assert (text == expected).all()
    finally:
        back.stop()


def test_a_server_killed_while_writing(own_server, model, caplog):
    caplog.set_level(logging.ERROR)
    store = open_valkey(own_server)
    save, calls = store._save_many, []

    def save_many(items):
        calls.append(items)
        if len(calls) == 2:
            own_server.kill()
        return save(items)

    store._save_many = save_many
    with pytest.raises(NotPublished, match="nothing was published under 'prompt'"):
        publish(prefill(model, make_profile(model))[0], store, "prompt")
    with pytest.raises(CacheMissing):
        fetch(open_valkey(own_server), "prompt", model)


def test_a_server_that_hangs(own_server, model, caplog):
    """Frozen, not dead: the timeout ends it."""
    caplog.set_level(logging.ERROR)
    store = open_valkey(own_server)
    publish(prefill(model, make_profile(model))[0], store, "prompt")
    own_server.freeze()
    try:
        with pytest.raises(CacheMissing):
            fetch(store, "prompt", model)
    finally:
        own_server.thaw()


def test_a_dead_mooncake_master(tmp_path, model, caplog):
    caplog.set_level(logging.ERROR)
    master, admin = servers.start_mooncake(tmp_path)
    store = SegmentStore(
        f"mooncake://127.0.0.1:{master.port}",
        admin_port=admin,
        segment_bytes=32 << 20,
        buffer_bytes=16 << 20,
        timeout=10,
    )
    try:
        cache, ids = prefill(model, make_profile(model))
        publish(cache, store, "prompt", tokens=ids)
        assert fetch(store, "prompt", model).cells == 12
        load, calls = store._load_many, []

        def load_many(names):
            calls.append(names)
            if len(calls) == 3:
                master.kill()
            return load(names)

        store._load_many = load_many
        with pytest.raises(CacheMissing, match="layer 1, head 0"):
            fetch(store, "prompt", model)
        with pytest.raises(NotPublished):
            publish(cache, store, "prompt", tokens=ids)
    finally:
        master.stop()
