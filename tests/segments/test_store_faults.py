"""What goes wrong with stores, and that the worst outcome is a miss, one warning and a bounded wait."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port, start_mooncake, start_valkey
from store_backends import assert_same, big_entry, make_entry, make_key

from redknot_hf.errors import RedKnotError
from redknot_hf.segments.stores import SegmentStore, StoreUnavailable, local
from redknot_hf.segments.stores.types import redact

LOGGER = "redknot_hf.segments.stores"


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelno >= logging.WARNING]


def seconds(action) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


# -- a server that is down ------------------------------------------------------------------------------------------


@pytest.mark.store
@pytest.mark.parametrize("scheme", ["valkey", "mooncake"])
def test_nobody_listens(scheme, caplog):
    pytest.importorskip("valkey" if scheme == "valkey" else "mooncake.store")
    with SegmentStore(f"{scheme}://127.0.0.1:{free_port()}", timeout=2.0) as store:
        results: list = []
        assert seconds(lambda: results.append(store.get(make_key(1)))) < 3
        assert seconds(lambda: results.extend(store.get(make_key(i)) for i in range(100))) < 0.5, "left alone now"
        assert results == [None] * 101
        assert store.put(make_key(1), make_entry()) is False and store.contains(make_key(1)) is False
        assert len(warnings_of(caplog)) == 1
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1"):
            store.stat()


@pytest.mark.store
def test_a_valkey_server_that_hangs_costs_one_timeout(tmp_path, caplog):
    server = start_valkey(tmp_path)
    try:
        with SegmentStore(f"valkey://127.0.0.1:{server.port}", timeout=1.0, retry_after=0.5) as store:
            store.put(make_key(1), make_entry(1))
            server.freeze()
            got: list = []
            assert 0.5 < seconds(lambda: got.append(store.get(make_key(1)))) < 2.5
            assert seconds(lambda: got.append(store.get(make_key(1)))) < 0.1 and got == [None, None]
            time.sleep(0.6)
            assert 0.5 < seconds(lambda: got.append(store.get(make_key(1)))) < 2.5, "tried again, and still down"
            assert len(warnings_of(caplog)) == 1
            server.thaw()
            time.sleep(0.6)
            assert_same(store.get(make_key(1)), make_entry(1))
            assert len(warnings_of(caplog)) == 1, "one warning for one outage"
            server.freeze()
            assert store.get(make_key(1)) is None
            assert len(warnings_of(caplog)) == 2, "and one more for the next outage"
    finally:
        server.stop()


@pytest.mark.store
def test_a_valkey_server_that_dies_in_the_middle_and_comes_back(tmp_path, caplog):
    server = start_valkey(tmp_path)
    try:
        with SegmentStore(f"valkey://127.0.0.1:{server.port}", timeout=1.0, retry_after=0.2) as store:
            assert store.put(make_key(1), make_entry(1))
            server.kill()
            assert store.get(make_key(1)) is None and store.put(make_key(2), make_entry(2)) is False
            server = start_valkey(tmp_path, server.port)
            time.sleep(0.3)
            assert store.get(make_key(1)) is None, "it came back empty: an ordinary miss"
    finally:
        server.stop()
    assert len(warnings_of(caplog)) == 1


@pytest.mark.store
def test_a_mooncake_master_that_dies_in_the_middle(tmp_path, caplog):
    master, admin = start_mooncake(tmp_path)
    store = SegmentStore(
        f"mooncake://127.0.0.1:{master.port}",
        admin_port=admin,
        timeout=8.0,
        segment_bytes=16 << 20,
        buffer_bytes=16 << 20,
    )
    try:
        assert store.put(make_key(1), make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))
        master.kill()
        assert seconds(lambda: store.get(make_key(1))) < 9
        assert store.get(make_key(1)) is None and store.put(make_key(2), make_entry(2)) is False
        assert len(warnings_of(caplog)) == 1
    finally:
        master.stop()
        store.close()


def test_an_error_text_that_quotes_the_url_is_cleaned(monkeypatch, caplog):
    pytest.importorskip("fsspec")
    url = "fsspec+memory://me:hunter2@bucket/x"

    def fails(*args, **kwargs):
        raise RuntimeError(f"cannot reach {url}?token=x as me:hunter2")

    with SegmentStore(url) as store:
        monkeypatch.setattr(type(store._fs), "cat_file", fails)
        assert store.get(make_key(1)) is None
    assert len(warnings_of(caplog)) == 1 and "cannot reach" in warnings_of(caplog)[0]
    assert "hunter2" not in warnings_of(caplog)[0]


def test_an_object_store_that_hangs_costs_one_timeout(monkeypatch, caplog):
    pytest.importorskip("fsspec")
    with SegmentStore("fsspec+memory://hangs", timeout=0.3) as store:
        monkeypatch.setattr(type(store._fs), "cat_file", lambda *a, **k: time.sleep(5))
        assert 0.2 < seconds(lambda: store.get(make_key(1))) < 1
        assert seconds(lambda: store.get(make_key(1))) < 0.1
        assert len(warnings_of(caplog)) == 1 and "0.3 s" in warnings_of(caplog)[0]


# -- entries that are half there --------------------------------------------------------------------------------------


@pytest.mark.store
def test_a_value_that_the_server_evicted_by_itself_is_a_miss(valkey_server, caplog):
    import valkey

    client = valkey.Valkey(port=valkey_server.port)
    with SegmentStore(f"valkey://127.0.0.1:{valkey_server.port}", prefix="evicts", piece_bytes=50_000) as store:
        for i in range(3):
            store.put(make_key(i), big_entry(i, 200_000))
        client.delete(next(client.scan_iter(f"evicts:c:{make_key(0).hex}:*:2")))
        client.delete(f"evicts:m:{make_key(1).hex}")
        assert store.get(make_key(0)) is None and store.get(make_key(1)) is None
        assert len(warnings_of(caplog)) == 1, "a torn entry warns; one that is gone altogether is an ordinary miss"
        assert_same(store.get(make_key(2)), big_entry(2, 200_000))
        assert [r.key for r in store.list()] == [make_key(2).hex]
        store.gc()
        left = {k.decode() for k in client.scan_iter("evicts:c:*")}
        assert left and all(make_key(2).hex in k for k in left), "gc removed the pieces nobody names"
    client.close()


@pytest.mark.store
def test_a_writer_that_dies_leaves_pieces_that_expire(valkey_server, monkeypatch):
    import valkey

    client = valkey.Valkey(port=valkey_server.port)
    with SegmentStore(f"valkey://127.0.0.1:{valkey_server.port}", prefix="dies", piece_bytes=50_000) as store:
        store.put(make_key(1), make_entry(1))

        def dies(*args, **kwargs):
            raise valkey.exceptions.ConnectionError("cable pulled")

        with monkeypatch.context() as m:
            m.setattr(type(store._client), "pipeline", dies)
            assert store.put(make_key(1), big_entry(1, 200_000)) is False
        store._down_until = 0.0
        assert_same(store.get(make_key(1)), make_entry(1))
        kept = store._pieces(make_key(1).hex, __import__("json").loads(client.get(store._manifest(make_key(1).hex))))
        orphans = [k for k in client.scan_iter("dies:c:*") if k.decode() not in kept]
        assert orphans and all(client.ttl(k) > 0 for k in orphans)
        assert all(client.ttl(k) == -1 for k in kept), "a finished entry does not expire"
    client.close()


@pytest.mark.store
@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'{"id":"x","pieces":99999999999,"bytes":1}', b"\xff", b"1" * 9000, b"[" * 100_000],
)
def test_a_hostile_manifest_is_a_miss(valkey_server, text, caplog):
    import valkey

    client = valkey.Valkey(port=valkey_server.port)
    with SegmentStore(f"valkey://127.0.0.1:{valkey_server.port}", prefix="hostile") as store:
        client.set(f"hostile:m:{make_key(1).hex}", text)
        assert store.get(make_key(1)) is None and len(warnings_of(caplog)) == 1
        assert not client.exists(f"hostile:m:{make_key(1).hex}")
    client.close()


@pytest.mark.parametrize(("rereads", "found"), [(0, False), (1, False), (2, True)])
def test_a_store_without_snapshots_reads_again_before_it_calls_an_entry_damaged(
    tmp_path, monkeypatch, rereads, found, caplog
):
    """Two mixed reads, as when another client replaces the entry meanwhile; the third is whole."""
    store = SegmentStore(tmp_path / "s")
    store.put(make_key(1), make_entry(1))
    whole, reads = store._read, []

    def mixed(name):
        reads.append(name)
        return whole(name) if len(reads) > 2 else bytearray(whole(name))[:-1] + b"?"

    monkeypatch.setattr(store, "_read", mixed)
    monkeypatch.setattr(store, "rereads", rereads)
    assert (store.get(make_key(1)) is not None) == found
    assert len(warnings_of(caplog)) == (not found)


@pytest.mark.store
def test_mooncake_is_such_a_store():
    pytest.importorskip("mooncake.store")
    from redknot_hf.segments.stores.mooncake import MooncakeStore

    assert MooncakeStore.rereads >= 2


# -- files ------------------------------------------------------------------------------------------------------------


def files_in(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.is_file())


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, caplog):
    store = SegmentStore(f"file://{tmp_path}/s")
    store.put(make_key(1), make_entry(1))
    before = files_in(tmp_path)
    written = []
    original = local._write_all

    def full(file, part):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(part)
        original(file, part)

    monkeypatch.setattr(local, "_write_all", full)
    assert store.put(make_key(2), make_entry(2)) is False and written, "it failed after the first bytes"
    assert store.put(make_key(1), make_entry(3)) is False
    assert files_in(tmp_path) == before
    assert_same(store.get(make_key(1)), make_entry(1))
    assert len(warnings_of(caplog)) == 1 and "no space left" in warnings_of(caplog)[0]
    monkeypatch.setattr(local, "_write_all", original)
    assert store.put(make_key(2), make_entry(2)), "and goes on as soon as there is room"


def test_a_really_full_disk(tmp_path, caplog):
    mount = shutil.which("mount")
    small = tmp_path / "small"
    small.mkdir()
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode
    ):
        pytest.skip("no permission to mount a small tmpfs here")
    try:
        store = SegmentStore(small)
        assert store.put(make_key(1), big_entry(1, 400_000))
        assert store.put(make_key(2), big_entry(2, 900_000)) is False
        assert len(files_in(small)) == 1 and len(warnings_of(caplog)) == 1
        assert_same(store.get(make_key(1)), big_entry(1, 400_000))
        assert store.put(make_key(3), big_entry(3, 300_000))
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_killed_writer_leaves_nothing_that_is_read_and_gc_sweeps_it(tmp_path):
    store = SegmentStore(f"file://{tmp_path}/s")
    store.put(make_key(1), make_entry(1))
    folder = store._path(make_key(1).hex).parent
    stale, fresh = (folder / f".{make_key(1).hex}.{digit * 16}.tmp" for digit in "ab")
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (1, 1))
    assert [r.key for r in store.list()] == [make_key(1).hex]
    report = store.gc()
    assert report.leftovers == 1 and not stale.exists() and fresh.exists(), "a write under way is not disturbed"
    assert_same(store.get(make_key(1)), make_entry(1))


def test_an_interrupted_put_removes_its_temporary_file(tmp_path, monkeypatch):
    store = SegmentStore(f"file://{tmp_path}/s")

    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(local.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put(make_key(1), make_entry(1))
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("plant", ["symlink", "directory", "pipe", "empty"])
def test_planted_things_are_misses_and_do_not_hang(tmp_path, plant, caplog):
    store = SegmentStore(f"file://{tmp_path}/s")
    store.put(make_key(2), make_entry(2))
    path = store._path(make_key(1).hex)
    path.parent.mkdir(exist_ok=True)
    if plant == "symlink":  # even to the right content: what it points to may change under a mapping
        store.put(make_key(1), make_entry(1))
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif plant == "directory":
        path.mkdir()
    elif plant == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
    assert seconds(lambda: store.get(make_key(1))) < 1 and store.get(make_key(1)) is None
    assert len(warnings_of(caplog)) == 1
    assert_same(store.get(make_key(2)), make_entry(2))


def test_a_file_that_is_removed_or_replaced_while_it_is_mapped_stays_readable(tmp_path):
    store = SegmentStore(f"file://{tmp_path}/s")
    store.put(make_key(1), big_entry(1, 3_000_000))
    got = store.get(make_key(1))
    store.put(make_key(1), big_entry(2, 3_000_000))
    store.delete(make_key(1))
    assert_same(got, big_entry(1, 3_000_000))


def test_reading_instead_of_mapping_gives_the_same(tmp_path):
    store = SegmentStore(tmp_path / "s", mmap_load=False, fsync=False)
    store.put(make_key(1), make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))


@pytest.mark.parametrize("call", ["dup", "open"])
def test_a_process_without_descriptors_does_not_leave_the_store_alone(tmp_path, monkeypatch, call, caplog):
    store = SegmentStore(tmp_path / "s")
    store.put(make_key(1), make_entry(1))

    def exhausted(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(local.os, call, exhausted)
        got = store.get(make_key(1))
    assert (got is None) == (call == "open"), "a mapping needs no second descriptor"
    assert len(warnings_of(caplog)) == (call == "open")
    assert_same(store.get(make_key(1)), make_entry(1))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_store_that_may_only_be_read_stays_in_use(tmp_path, monkeypatch, code, caplog):
    store = SegmentStore(tmp_path / "s")
    store.put(make_key(1), make_entry(1))

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local.os, "replace", refuse)
    monkeypatch.setattr(local.Path, "unlink", refuse)
    for _ in range(2):
        assert store.put(make_key(2), make_entry(2)) is False and store.delete(make_key(1)) is False
        assert_same(store.get(make_key(1)), make_entry(1))
    assert len(warnings_of(caplog)) == 1


# -- what users type, and what they must not read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["", "memory:", "/tmp/x", "nosuch://x", "file://host/x", "file://relative", "mooncake://", "mooncake://h:1/p", 7,
     None, "memory://name", []],
)  # fmt: skip
def test_a_wrong_url_is_one_clear_error(url):
    with pytest.raises(RedKnotError, match="url"):
        SegmentStore(url)


@pytest.mark.parametrize("option", [{"max_bytes": 0}, {"max_bytes": 1.5}, {"timeout": 0}, {"verify": "no"}])
def test_a_wrong_option_is_one_clear_error(option):
    with pytest.raises(RedKnotError, match=next(iter(option))):
        SegmentStore("memory://", **option)


@pytest.mark.store
def test_credentials_are_never_shown(caplog):
    pytest.importorskip("valkey")
    url = f"valkey://admin:hunter2@127.0.0.1:{free_port()}/0?client_name=topsecret"
    with caplog.at_level(logging.DEBUG), SegmentStore(url, timeout=1.0) as store:
        store.get(make_key(1))
        shown = [repr(store), store.url, *(r.getMessage() for r in caplog.records)]
        with pytest.raises(StoreUnavailable) as error:
            store.stat()
        shown += [str(error.value), repr(store._stat)]
    assert len(shown) > 4
    for text in shown:
        assert "hunter2" not in text and "topsecret" not in text, text
    assert redact("s3://key:secret@bucket/p?token=abc") == "s3://***@bucket/p?***"
    with pytest.raises(RedKnotError) as error:
        SegmentStore("nosuch://me:hunter2@host/x")
    assert "hunter2" not in str(error.value)


# -- chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_writes_through_and_promotes(tmp_path):
    memory, disk = SegmentStore("memory://"), SegmentStore(f"file://{tmp_path}/a")
    below = SegmentStore(f"file://{tmp_path}/b")
    chain = SegmentStore([memory, disk, below])
    assert chain.put(make_key(1), make_entry(1))
    assert all(tier.contains(make_key(1)) for tier in (memory, disk, below))
    memory.delete(make_key(1)), disk.delete(make_key(1))
    got = chain.get(make_key(1))
    assert_same(got, make_entry(1))
    assert got.tier == "file" and memory.contains(make_key(1)) and disk.contains(make_key(1))
    assert chain.get(make_key(1)).tier == "memory"
    assert chain.delete(make_key(1)) and not any(tier.contains(make_key(1)) for tier in (memory, disk, below))


def test_a_chain_gets_a_batch_from_several_tiers_in_order(tmp_path):
    memory, disk = SegmentStore("memory://"), SegmentStore(f"file://{tmp_path}/a")
    memory.put(make_key(0), make_entry(0)), disk.put(make_key(1), make_entry(1))
    chain = SegmentStore([memory, disk])
    got = chain.get_many([make_key(i) for i in (1, 7, 0)])
    assert [e and e.tier for e in got] == ["file", None, "memory"]
    assert_same(got[0], make_entry(1))
    assert (chain.stat().hits, chain.stat().misses, chain.stat().entries) == (2, 1, 2)


def test_a_small_fast_tier_in_front_of_a_big_one(tmp_path):
    chain = SegmentStore([SegmentStore("memory://", max_bytes=250_000), f"file://{tmp_path}/a"])
    for i in range(5):
        assert chain.put(make_key(i), big_entry(i, 100_000))
    assert [tier.stat().entries for tier in chain.tiers] == [2, 5]
    for i in range(5):
        assert_same(chain.get(make_key(i)), big_entry(i, 100_000))
    assert chain.tiers[0].stat().nbytes <= 250_000


@pytest.mark.store
def test_a_chain_with_a_dead_tier_works_on_the_others(tmp_path, caplog):
    pytest.importorskip("valkey")
    chain = SegmentStore(["memory://", f"valkey://127.0.0.1:{free_port()}", f"file://{tmp_path}/a"], timeout=1.0)
    assert chain.put(make_key(1), make_entry(1))
    chain.tiers[0].delete(make_key(1))
    assert_same(chain.get(make_key(1)), make_entry(1))
    assert len(warnings_of(caplog)) == 1


def test_a_damaged_upper_tier_is_repaired_from_below(tmp_path, caplog):
    chain = SegmentStore([f"file://{tmp_path}/a", f"file://{tmp_path}/b"])
    chain.put(make_key(1), make_entry(1))
    path = chain.tiers[0]._path(make_key(1).hex)
    path.write_bytes(path.read_bytes()[:-1])
    assert_same(chain.get(make_key(1)), make_entry(1))
    assert len(warnings_of(caplog)) == 1
    assert_same(chain.tiers[0].get(make_key(1)), make_entry(1))


def test_a_ceiling_for_a_whole_chain_is_refused():
    with pytest.raises(RedKnotError, match="max_bytes"):
        SegmentStore(["memory://"], max_bytes=5)


def test_entries_made_under_inference_mode_can_be_kept_and_read():
    with torch.inference_mode():
        store = SegmentStore("memory://")
        store.put(make_key(1), make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))
