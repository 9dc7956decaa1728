"""Uploads bring the first layers first, hash what they send, and say so when they fail. CUDA is a stand-in here; the
real one is used in test_reuse_gpu.py."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

from redknot_hf.segments import sha256_kernel, transfer
from redknot_hf.segments.codec import CorruptEntry, SegmentEntry, decode, encode
from redknot_hf.segments.stores import SegmentStore
from redknot_hf.segments.transfer import Upload

LAYERS, GROUPS = 6, [0, 1, 0, 0, 1, 0]
KEY = "ab" * 32


class _Event:
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_is_gpu", lambda device: True)
    monkeypatch.setattr(transfer, "_page_locked", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(transfer, "WORKERS", 3)
    monkeypatch.setattr(transfer.os, "cpu_count", lambda: 4)
    for name, value in {
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def entry_of(seed: int, tokens: int) -> SegmentEntry:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{part}.{group}": torch.randn(GROUPS.count(group), 2, tokens, dim, generator=generator)
        for group, dim in ((0, 64), (1, 32))
        for part in "kv"
    }
    return SegmentEntry(tensors, num_tokens=tokens, key=KEY, extra={"groups": GROUPS})


def stored(entry: SegmentEntry, damage: bool = False) -> SegmentEntry:
    raw = bytearray(b"".join(encode(entry)))
    if damage:
        raw[-5] ^= 1
    return decode(raw, verify="later")


# 0.4 MB in one piece per tensor; 21 MB in pieces that end inside a layer
@pytest.mark.parametrize("tokens", [200, 10_300])
def test_everything_arrives_and_is_hashed(tokens):
    entries = [entry_of(i, tokens + i) for i in range(3)]
    upload = Upload([stored(entry) for entry in entries], "cpu")
    upload.need(LAYERS - 1)
    for entry, stacks in zip(entries, upload.stacks, strict=True):
        assert stacks.keys() == entry.tensors.keys()
        for name, tensor in entry.tensors.items():
            assert torch.equal(stacks[name], tensor)
            assert stacks[name].data_ptr() != tensor.data_ptr()
    for verdict in upload.verdicts:
        assert verdict.exception(timeout=30) is None
    upload.close()


def test_damage_is_found_in_the_right_entry():
    entries = [stored(entry_of(i, 10_300), damage=i == 1) for i in range(3)]
    upload = Upload(entries, "cpu").finish()
    found = [verdict.exception(timeout=30) for verdict in upload.verdicts]
    assert [type(error) for error in found] == [type(None), CorruptEntry, type(None)]


def test_the_first_layers_are_there_while_the_last_are_on_their_way(monkeypatch):
    gate, following = threading.Event(), Upload._next

    def slow(self):
        batch = following(self)
        if batch and batch[0].layer > 2:
            assert gate.wait(30)
        return batch

    monkeypatch.setattr(Upload, "_next", slow)
    entry = entry_of(0, 20_600)  # layers 0, 2, 3, 5 of 10.5 MB in each of k.0 and v.0
    upload = Upload([stored(entry)], "cpu")
    upload.need(0)
    for part in "kv":
        assert torch.equal(upload.stacks[0][f"{part}.0"][0], entry.tensors[f"{part}.0"][0])
    assert not torch.equal(upload.stacks[0]["k.0"][3], entry.tensors["k.0"][3])
    gate.set()
    upload.need(LAYERS - 1)
    assert torch.equal(upload.stacks[0]["k.0"], entry.tensors["k.0"])
    upload.close()


@pytest.mark.parametrize(
    ("left", "count", "expected"),
    [((7, 9), 1, [0, 0]), ((7, 9), 4, [0]), ((1, 9), 8, [0]), ((40, 9), 8, [0, 0])],
)
def test_a_batch_is_of_one_layer_and_small_where_there_is_little(left, count, expected):
    """Two runs of layer 0 are not taken yet; more may be on their way, on other workers."""
    upload = object.__new__(Upload)
    upload._ready, upload._left, upload._count = threading.Condition(), list(left), count
    empty = torch.empty(0)
    upload._runs = [transfer._Run(layer, 0, 0, 0, empty, None, 0, empty) for layer in (1, 1, 1, 0, 0)]
    assert [run.layer for run in upload._next()] == expected


def test_many_runs_of_a_layer_go_together(monkeypatch):
    sizes, following = [], Upload._next
    monkeypatch.setattr(Upload, "_next", lambda self: sizes.append(following(self)) or sizes[-1])
    upload = Upload([stored(entry_of(i, 20 + i)) for i in range(20)], "cpu").finish()
    assert max(map(len, sizes)) == transfer.BATCH and sum(map(len, sizes)) == 80
    for i in (0, 7, 19):
        for name, tensor in entry_of(i, 20 + i).tensors.items():
            assert torch.equal(upload.stacks[i][name], tensor)


def test_an_error_on_a_worker_reaches_who_waits(monkeypatch):
    def fail(target, source):
        raise OSError("gone")

    monkeypatch.setattr(transfer.np, "copyto", fail)
    upload = Upload([stored(entry_of(0, 200))], "cpu")
    with pytest.raises(OSError, match="gone"):
        upload.need(0)
    assert isinstance(upload.verdicts[0].exception(timeout=30), OSError)
    upload.close()


def test_closing_early_ends_the_workers():
    before = threading.active_count()
    upload = Upload([stored(entry_of(i, 10_300)) for i in range(3)], "cpu")
    upload.close()
    upload.close()
    assert threading.active_count() == before


def store_with(tmp_path, entries, **options) -> tuple[SegmentStore, list[str]]:
    store = SegmentStore(f"file://{tmp_path}", fsync=False, **options)
    keys = [f"{i:064x}" for i in range(len(entries))]
    for key, entry in zip(keys, entries, strict=True):
        assert store.put(key, entry)
    return store, keys


def path_of(tmp_path, key):
    return tmp_path / key[:2] / f"{key}.safetensors"


@pytest.mark.parametrize("verify", ["full", "header"])
def test_files_are_read_and_not_touched_through_their_mapping(tmp_path, monkeypatch, verify):
    entries = [entry_of(i, 10_300 + i) for i in range(2)]
    store, keys = store_with(tmp_path, entries, verify=verify)
    monkeypatch.setattr(transfer.np, "copyto", lambda *args: pytest.fail("the mapping was touched"))
    upload = Upload(store.get_many(keys, defer=True), "cpu").finish()
    for entry, stacks in zip(entries, upload.stacks, strict=True):
        for name, tensor in entry.tensors.items():
            assert torch.equal(stacks[name], tensor)
    assert [verdict.exception(timeout=30) for verdict in upload.verdicts] == [None, None]


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path):
    entries = [entry_of(i, 10_300) for i in range(2)]
    store, keys = store_with(tmp_path, entries, verify="header")
    found = store.get_many(keys, defer=True)
    path = path_of(tmp_path, keys[1])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    upload = Upload(found, "cpu").finish()
    assert upload.verdicts[0].exception(timeout=30) is None
    assert isinstance(upload.verdicts[1].exception(timeout=30), CorruptEntry)
    assert torch.equal(upload.stacks[0]["k.0"], entries[0].tensors["k.0"])


def test_without_descriptors_to_spare_the_mapping_serves(tmp_path, monkeypatch):
    from redknot_hf.segments.stores import local

    monkeypatch.setattr(local, "_most_files", lambda: 0)
    entry = entry_of(0, 10_300)
    store, keys = store_with(tmp_path, [entry])
    (found,) = store.get_many(keys, defer=True)
    assert found.source is None
    upload = Upload([found], "cpu").finish()
    assert torch.equal(upload.stacks[0]["v.1"], entry.tensors["v.1"])
    assert upload.verdicts[0].exception(timeout=30) is None


def test_descriptors_go_with_the_entries(tmp_path):
    store, keys = store_with(tmp_path, [entry_of(0, 20)])
    (found,) = store.get_many(keys, defer=True)
    fd = found.source.file.fileno()
    os.fstat(fd)
    del found
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_entry_that_is_copied_to_another_store_forgets_its_file(tmp_path):
    store, keys = store_with(tmp_path, [entry_of(0, 20)])
    memory = SegmentStore("memory://")
    (found,) = store.get_many(keys)
    assert found.source is not None
    memory.put(keys[0], found)
    assert memory.get(keys[0]).source is None


@pytest.mark.parametrize("late_word", [False, True])
@pytest.mark.parametrize("damaged", [None, 1])
def test_hashes_of_the_gpu_are_compared(tmp_path, monkeypatch, damaged, late_word):
    if late_word:  # a worker that has sent the last run of an entry says so only while the hashes are being compared
        done, compare, last = Upload._done, Upload._compare, {}

        def remember(self, run, content):
            last[run.entry] = run, content
            done(self, run, content)

        def compare_after(self, entry, check, leaves):
            if check is not None:
                with self._ready:
                    self._of_entry[entry] += 1
                done(self, *last[entry])
            compare(self, entry, check, leaves)

        monkeypatch.setattr(Upload, "_done", remember)
        monkeypatch.setattr(Upload, "_compare", compare_after)
    asked = []

    def hashed(tensors, piece_bytes):
        asked.append(len(tensors))
        raw = [memoryview(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in tensors]
        leaves = [hashlib.sha256(r[i : i + piece_bytes]).digest() for r in raw for i in range(0, len(r), piece_bytes)]
        return torch.from_numpy(np.frombuffer(b"".join(leaves), ">u4").astype(np.uint32).view(np.int32)).view(-1, 8)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: empty(*shape, **more))
    monkeypatch.setattr(sha256_kernel, "ready", lambda device: True)
    monkeypatch.setattr(sha256_kernel, "sha256", hashed)
    entries = [entry_of(i, 10_300) for i in range(3)]
    store, keys = store_with(tmp_path, entries)
    if damaged is not None:
        path = path_of(tmp_path, keys[damaged])
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
    upload = Upload(store.get_many(keys, defer=True), "cpu").finish()
    found = [verdict.exception(timeout=30) for verdict in upload.verdicts]
    assert asked == [12]  # one launch for all
    assert [type(error) for error in found] == [CorruptEntry if i == damaged else type(None) for i in range(3)]


def test_an_entry_of_empty_tensors_is_judged():
    empty = SegmentEntry({f"{part}.0": torch.empty(6, 2, 0, 8) for part in "kv"}, key=KEY, extra={"groups": [0] * 6})
    for entries in ([empty], [entry_of(0, 20), empty]):
        upload = Upload([stored(entry) for entry in entries], "cpu").finish()
        assert [verdict.exception(timeout=30) for verdict in upload.verdicts] == [None] * len(entries)


@pytest.mark.parametrize("damaged", [None, 1])
def test_what_the_gpu_fails_to_hash_is_hashed_here(monkeypatch, caplog, damaged):
    def failing(tensors, piece_bytes):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sha256_kernel, "ready", lambda device: True)
    monkeypatch.setattr(sha256_kernel, "sha256", failing)
    entries = [stored(entry_of(i, 10_300), damage=i == damaged) for i in range(3)]
    upload = Upload(entries, "cpu").finish()
    found = [verdict.exception(timeout=30) for verdict in upload.verdicts]
    assert [type(error) for error in found] == [CorruptEntry if i == damaged else type(None) for i in range(3)]
    assert len([r for r in caplog.records if "out of memory" in r.getMessage()]) == 1
