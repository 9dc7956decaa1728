"""Damaged and hostile files, full disks, no memory, and a process killed while it saves.

Whatever happens: one clear `RedKnotError`, or the very session that was saved. Never another one, never a crash, never
more memory than the file can justify, and the file that was there before stays.
"""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from session_helpers import feed, make, mixed_profile, prompt, steps, tiny_config

from redknot_hf import RedKnotCache, RedKnotError
from redknot_hf.errors import PoolExhausted
from redknot_hf.paging.pool import PagePool
from redknot_hf.sessions import DamagedFile, SessionStore, container, files
from redknot_hf.sessions.container import Source, read_container, write_container

MANY = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """(bytes of a saved session with padding, shared rows and a rolled-back ring, its reference logits)."""
    path = tmp_path_factory.mktemp("saved") / "a"
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    cache = make(tiny, mixed_profile(tiny.config), 2, 40, mask, rollback=4)
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    cache.save(path)
    mask = mask.repeat_interleave(2, 0)[:, :-2]
    return path.read_bytes(), mask, steps(tiny, cache, 3, mask)


def load_or_refuse(tiny, path, raw: bytes, saved) -> None:
    path.write_bytes(raw)
    try:
        cache = RedKnotCache.load(path, tiny.config)
    except RedKnotError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:  # bytes that carry no meaning, e.g. the case of a hex digit in an escape
        assert torch.equal(steps(tiny, cache, 3, saved[1]), saved[2])


@MANY
@given(data=st.data())
def test_flipped_bits(tiny, saved, tmp_path, data):
    raw = bytearray(saved[0])
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(0, len(raw) - 1)))
        raw[where] ^= 1 << data.draw(st.integers(0, 7))
    load_or_refuse(tiny, tmp_path / "a", bytes(raw), saved)


@MANY
@given(data=st.data())
def test_truncated_extended_and_overwritten(tiny, saved, tmp_path, data):
    raw = saved[0]
    cut = data.draw(st.integers(0, len(raw)))
    tail = data.draw(st.binary(max_size=64))
    load_or_refuse(tiny, tmp_path / "a", raw[:cut] + tail, saved)
    load_or_refuse(tiny, tmp_path / "a", raw[:cut] + tail + raw[cut + len(tail) :], saved)


def test_every_flipped_bit_of_the_tensors_is_noticed(tiny, saved, tmp_path):
    raw = saved[0]
    start = 8 + int.from_bytes(raw[:8], "little")
    for where in range(start, len(raw), 997):
        bad = bytearray(raw)
        bad[where] ^= 0x10
        (tmp_path / "a").write_bytes(bad)
        with pytest.raises(DamagedFile, match="checksum"):
            RedKnotCache.load(tmp_path / "a", tiny.config)


# ------------------------------------------------------------- files that somebody made on purpose, seals in order
def forged(path: Path, raw: bytes, change) -> None:
    """Write the session again after ``change(description, tensors)``, with digests that fit."""
    source = path.with_suffix(".source")
    source.write_bytes(raw)
    contents = read_container(source)
    description = copy.deepcopy(contents.description)
    tensors = {name: tensor.clone() for name, tensor in contents.tensors.items()}
    change(description, tensors)
    write_container(path, description, [Source.of(name, tensor) for name, tensor in tensors.items()])


HOSTILE = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 2**31, 2**62, 2**63, 2**80, 1e308, "", "x", "__class__", [], {}, [[]]]
    ),
    st.text(max_size=5),
    st.integers(),
)


def leaves(value, path=()):
    """Every place in nested lists and objects."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from leaves(entry, (*path, index))


@pytest.fixture
def small_memory(monkeypatch):
    """Fail as soon as a pool becomes larger than any file may ask for."""
    slab = PagePool._slab

    def guarded(self, rows, dim, dtype, device):
        assert rows * self.page_size * dim * dtype.itemsize < files.ROOM, "a file made the pool explode"
        return slab(self, rows, dim, dtype, device)

    monkeypatch.setattr(PagePool, "_slab", guarded)


@pytest.mark.filterwarnings("ignore:the head profile was made for")
@MANY
@given(data=st.data())
def test_hostile_descriptions(tiny, saved, tmp_path, small_memory, data):
    def change(description, tensors):
        for _ in range(data.draw(st.integers(1, 2))):
            path = data.draw(st.sampled_from(sorted(leaves(description), key=str)[1:]))
            place = description
            try:
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = data.draw(HOSTILE)
            except (TypeError, IndexError, KeyError):
                pass

    try:
        forged(tmp_path / "a", saved[0], change)
    except (RedKnotError, ValueError):
        return  # cannot even be written
    try:
        cache = RedKnotCache.load(tmp_path / "a", tiny.config)
        cache.memory_report()
    except RedKnotError:
        pass


@MANY
@given(data=st.data())
def test_hostile_arrays(tiny, saved, tmp_path, small_memory, data):
    numbers = st.one_of(st.sampled_from([-1, 0, 1, 2, 7, 2**30, 2**31 - 1, -(2**31)]), st.integers(-4, 60))

    def change(description, tensors):
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        kind = data.draw(st.sampled_from(["value", "shape", "dtype", "gone", "more"]))
        if kind == "value":
            flat = tensor.view(-1)
            for _ in range(data.draw(st.integers(1, 4))):
                value = data.draw(numbers)
                flat[data.draw(st.integers(0, len(flat) - 1))] = value % 256 if tensor.dtype == torch.uint8 else value
        elif kind == "shape":
            tensors[name] = data.draw(
                st.sampled_from([tensor[:0], tensor[None], torch.cat([tensor, tensor]), tensor.reshape(-1)])
            )
        elif kind == "dtype":
            tensors[name] = tensor.to(data.draw(st.sampled_from([torch.int64, torch.float16, torch.bool])))
        elif kind == "gone":
            del tensors[name]
        else:
            tensors[name + "x"] = tensor

    forged(tmp_path / "a", saved[0], change)
    try:
        cache = RedKnotCache.load(tmp_path / "a", tiny.config)
    except RedKnotError:
        return
    # what loads must be usable: other numbers in keys and values are content, not damage
    logits = steps(tiny, cache, 2, saved[1])
    assert logits.shape == (4, 2, 97)


@pytest.fixture(scope="module")
def frozen(tiny, tmp_path_factory):
    """Bytes of a saved session whose rows share quantised pages, and have pages of their own behind them."""
    path = tmp_path_factory.mktemp("frozen") / "a"
    cache = make(tiny, mixed_profile(tiny.config), 1, 43, rollback=4, kv_dtype="int8")
    cache.batch_repeat_interleave(2)
    cache.freeze()
    feed(tiny, cache, prompt(2, 5, seed=1))
    cache.crop(-2)
    cache.save(path)
    return path.read_bytes()


@MANY
@given(data=st.data())
def test_hostile_frozen_pages(tiny, frozen, tmp_path, small_memory, data):
    numbers = st.one_of(st.sampled_from([-1, 0, 1, 2, 8, 2**30, 2**31 - 1]), st.integers(-4, 60))
    scales = st.sampled_from([-1.0, float("nan"), float("inf"), 1e38, 0.0])

    def change(description, tensors):
        names = sorted(name for name in tensors if ".frozen." in name)
        name = data.draw(st.sampled_from(names))
        tensor = tensors[name]
        kind = data.draw(st.sampled_from(["value", "value", "shape", "dtype", "gone", "all gone", "more"]))
        if kind == "value":
            flat = tensor.view(-1)
            for _ in range(data.draw(st.integers(1, 3))):
                value = data.draw(scales if tensor.is_floating_point() else numbers)
                flat[data.draw(st.integers(0, len(flat) - 1))] = value % 128 if tensor.dtype == torch.int8 else value
        elif kind == "shape":
            tensors[name] = data.draw(
                st.sampled_from(
                    [tensor[:0], tensor[:-1], tensor[None], torch.cat([tensor, tensor]), tensor.reshape(-1)]
                )
            )
        elif kind == "dtype":
            tensors[name] = tensor.to(data.draw(st.sampled_from([torch.int64, torch.float16, torch.bool, torch.uint8])))
        elif kind == "gone":
            del tensors[name]
        elif kind == "all gone":
            for other in names:
                if other.split(".")[1] == name.split(".")[1]:
                    del tensors[other]
        else:
            tensors[name + "x"] = tensor

    forged(tmp_path / "a", frozen, change)
    try:
        cache = RedKnotCache.load(tmp_path / "a", tiny.config)
    except RedKnotError:
        return
    assert steps(tiny, cache, 2).shape == (2, 2, 97)


@MANY
@given(data=st.data())
def test_flipped_bits_of_frozen_pages(tiny, frozen, tmp_path, data):
    raw = bytearray(frozen)
    where = data.draw(st.integers(0, len(raw) - 1))
    raw[where] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "a").write_bytes(raw)
    try:
        cache = RedKnotCache.load(tmp_path / "a", tiny.config)
    except RedKnotError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        (tmp_path / "b").write_bytes(frozen)
        twin = RedKnotCache.load(tmp_path / "b", tiny.config)
        assert torch.equal(steps(tiny, cache, 3), steps(tiny, twin, 3))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, (64 << 20) + 1, 0])
def test_huge_length_fields(tiny, saved, tmp_path, length):
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + saved[0][8:])
    with pytest.raises(DamagedFile):
        RedKnotCache.load(tmp_path / "a", tiny.config)


def test_a_huge_claim_is_refused_before_memory_is_taken(tiny, saved, tmp_path, small_memory):
    def change(description, tensors):
        description["seen"] = 10**9
        for layer in range(3):
            table = tensors[f"layers.{layer}.table"]
            tensors[f"layers.{layer}.lens"].fill_(10**9)
            tensors[f"layers.{layer}.table"] = table.new_ones(4, 2, 1000)

    forged(tmp_path / "a", saved[0], change)
    with pytest.raises(RedKnotError):
        RedKnotCache.load(tmp_path / "a", tiny.config)


def test_more_pages_than_the_file_justifies_are_refused(tiny, tmp_path):
    cache = make(tiny, mixed_profile(tiny.config), 1, 40, page_size=1024)
    cache.save(tmp_path / "a")
    RedKnotCache.load(tmp_path / "a", tiny.config)
    with pytest.raises(RedKnotError, match="pages are more than"):
        RedKnotCache.load(tmp_path / "a", tiny.config, max_bytes=100_000)


def test_a_page_of_two_heads_is_refused(tiny, tmp_path):
    """Head 1 made to read the page of head 0: possible numbers, wrong content."""
    path = tmp_path / "a"
    make(tiny, mixed_profile(tiny.config), 1, 7).save(path)

    def change(description, tensors):
        tensors["layers.2.table"].fill_(1)
        for half in ("k", "v"):
            tensors[f"layers.2.{half}"] = tensors[f"layers.2.{half}"][:7]

    forged(tmp_path / "b", path.read_bytes(), change)
    with pytest.raises(RedKnotError, match="shared by other heads"):
        RedKnotCache.load(tmp_path / "b", tiny.config)


@pytest.mark.parametrize(("old", "new"), [(rb"\"recording\":false", rb"\"recording\":true "), (b"float32", b"float64")])
def test_an_edited_description_is_noticed(tiny, saved, tmp_path, old, new):
    """Readable, and right in its form: only the seal tells."""
    assert old in saved[0]
    (tmp_path / "a").write_bytes(saved[0].replace(old, new))
    with pytest.raises(DamagedFile, match="does not match its seal"):
        RedKnotCache.load(tmp_path / "a", tiny.config)


@pytest.mark.parametrize("depth", [60, 100_000])
def test_nested_bombs(tiny, tmp_path, depth):
    header = b'{"__metadata__":{"redknot_session":"{}"},"x":' + b"[" * depth + b"]" * depth + b"}"
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DamagedFile, match="nested too deeply"):
        RedKnotCache.load(tmp_path / "a", tiny.config)


@pytest.mark.parametrize("path", ["missing", ".", "missing/folder/x"])
def test_paths_that_are_no_files(tiny, profile, tmp_path, path):
    with pytest.raises(RedKnotError, match=r"cannot open|not a regular file"):
        RedKnotCache.load(tmp_path / path, tiny.config)
    if path != "missing":
        with pytest.raises(RedKnotError, match="cannot write"):
            make(tiny, profile, 1, 4).save(tmp_path / path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_refused_at_once(tiny, tmp_path):
    """Opening a pipe waits for somebody to write into it: also when a store looks through its folder."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / ("a" * 40 + ".session.safetensors"))
    assert len(SessionStore(tiny, folder=tmp_path / "folder")) == 0
    for path in (next((tmp_path / "folder").iterdir()), "/dev/zero", "/dev/null"):
        with pytest.raises(DamagedFile, match="not a regular file"):
            RedKnotCache.load(path, tiny.config)


def test_links(tiny, profile, tmp_path):
    """A link is read like what it points to, and saving replaces the link, never what it points to."""
    cache = make(tiny, profile, 1, 20)
    cache.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert torch.equal(steps(tiny, RedKnotCache.load(tmp_path / "link", tiny.config), 3), steps(tiny, cache.fork(), 3))
    with pytest.raises(RedKnotError, match="cannot open"):
        RedKnotCache.load(tmp_path / "loop", tiny.config)
    steps(tiny, cache, 2)
    cache.save(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "a").read_bytes() == old
    assert RedKnotCache.load(tmp_path / "link", tiny.config).get_seq_length() == 22


@pytest.mark.parametrize("version", [3, 99, 1, 0, -1, 2.0, "2", None, True, [2]])
def test_other_versions(tiny, saved, tmp_path, version):
    def change(description, tensors):
        description["version"] = version

    forged(tmp_path / "a", saved[0], change)
    with pytest.raises(RedKnotError, match=r"version is .* this release reads version 2"):
        RedKnotCache.load(tmp_path / "a", tiny.config)


@pytest.mark.parametrize(
    "label", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "\x00", "a" * 512, "\ud800"]
)
def test_keys_and_labels_name_no_paths(tiny, profile, tmp_path, label):
    """Keys of a store and labels in files are text: nothing is written or removed outside the folder."""
    folder = tmp_path / "deep" / "folder"
    store = SessionStore(tiny, device_bytes=0, host_bytes=0, folder=folder)
    cache = make(tiny, profile, 1, 10)
    twin = cache.fork()
    store.put(label, cache)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1 and files[0].parent == folder
    again = SessionStore(tiny, folder=folder)  # the file says which key it is of
    assert again.keys() == [label]
    assert torch.equal(steps(tiny, again.get(label), 2), steps(tiny, twin, 2))


# -------------------------------------------------------------------------------------------------- disk and memory
@pytest.mark.parametrize("where", ["claim", "write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file(tiny, profile, tmp_path, monkeypatch, where):
    path = tmp_path / "a"
    cache = make(tiny, profile, 1, 40)
    cache.save(path)
    old = path.read_bytes()
    steps(tiny, cache, 5)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "claim":
            patch.setattr(os, "posix_fallocate", full)
        elif where == "write":
            patch.setattr(container, "_write_pieces", full)
        elif where == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(os, "replace", full)
        with pytest.raises(RedKnotError, match=r"disk is full .* unchanged"):
            cache.save(path)
    assert path.read_bytes() == old and [entry.name for entry in tmp_path.iterdir()] == ["a"]
    twin = cache.fork()
    cache.save(path)
    assert torch.equal(steps(tiny, RedKnotCache.load(path, tiny.config)), steps(tiny, twin))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("a tmpfs can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True, timeout=10)


def test_a_disk_that_is_really_full(tiny, profile, small_disk, monkeypatch):
    """Saving, a store and a cold tier on 256 KiB: each says so, and what was there before is there still."""
    small, large = make(tiny, profile, 1, 40), make(tiny, profile, 1, 2000)
    small.save(small_disk / "a")
    old = (small_disk / "a").read_bytes()
    with pytest.raises(RedKnotError, match=r"disk is full .* unchanged"):
        large.save(small_disk / "a")
    assert (small_disk / "a").read_bytes() == old and [entry.name for entry in small_disk.iterdir()] == ["a"]

    store = SessionStore(tiny, device_bytes=0, host_bytes=0, folder=small_disk / "store")
    twins = {}
    with pytest.raises(RedKnotError, match="disk is full"):
        for user in range(40):
            cache = make(tiny, profile, 1, 60, seed=user)
            twins[user] = cache.fork()
            store.put(str(user), cache)
    assert 2 < len(twins) < 40
    for user, twin in twins.items():  # the one that found no room, too
        assert torch.equal(steps(tiny, store.get(str(user)), 2), steps(tiny, twin, 2))
        store.delete(str(user))

    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    cold = RedKnotCache(tiny.config, profile, page_size=8, cold="disk")
    feed(tiny, cold, prompt(1, 40))
    twin = cold.fork()
    with pytest.raises(PoolExhausted, match=r"no room for .* bytes of cold pages"):
        feed(tiny, cold, prompt(1, 900))
    cold.reset()
    assert torch.equal(steps(tiny, twin, 3), steps(tiny, make(tiny, profile, 1, 40, cold="cpu"), 3))


def test_no_memory_to_load(tiny, profile, tmp_path, monkeypatch):
    make(tiny, profile, 1, 40).save(tmp_path / "a")
    slab = PagePool._slab

    def small(self, rows, *rest):
        if rows > 4:
            raise MemoryError
        return slab(self, rows, *rest)

    monkeypatch.setattr(PagePool, "_slab", small)
    with pytest.raises(PoolExhausted, match="no memory on cpu"):
        RedKnotCache.load(tmp_path / "a", tiny.config)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from session_helpers import make, mixed_profile, steps, tiny_model
from redknot_hf.sessions import container
model = tiny_model()
cache = make(model, mixed_profile(model.config), 1, 40)
cache.save({path!r})
print("saved", flush=True)
steps(model, cache, 5)
write = container._write_pieces
count = 0
def slow(file, source, digest):
    global count
    write(file, source, digest)
    count += 1
    if count == {after}:
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
container._write_pieces = slow
cache.save({path!r})
"""


@pytest.mark.dist
@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 15])
def test_killed_while_saving(tiny, tmp_path, after):
    path = tmp_path / "a"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path), after=after)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "saved\n"
        old = path.read_bytes()
        assert process.stdout.readline() == "writing\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_bytes() == old
    assert len(list(tmp_path.glob(".a.*.tmp"))) == 1  # what it had written, under a name that nobody reads
    cache = RedKnotCache.load(path, tiny.config)
    twin = make(tiny, mixed_profile(tiny.config), 1, 40)
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))
    cache.save(path)


SAVES_FOREVER = """
import sys
sys.path.insert(0, {tests!r})
from session_helpers import feed, make, mixed_profile, prompt, tiny_model
model = tiny_model()
cache = make(model, mixed_profile(model.config), 1, 40, kv_dtype={kv_dtype!r})
cache.save({path!r})
print("saved", flush=True)
while True:
    feed(model, cache, prompt(1, 1, seed=cache.get_seq_length()))
    cache.save({path!r})
"""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("round", range(6))
def test_killed_at_any_moment(tiny, tmp_path, round):
    """A process that saves its session after every token is killed: the file is that of one of its states, whole."""
    path, kv_dtype = tmp_path / "a", (None, "int8")[round % 2]
    code = SAVES_FOREVER.format(tests=str(Path(__file__).parent), path=str(path), kv_dtype=kv_dtype)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "saved\n"
        time.sleep(0.1 + 0.13 * round)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = RedKnotCache.load(path, tiny)
    twin = make(tiny, mixed_profile(tiny.config), 1, 40, kv_dtype=kv_dtype)
    while twin.get_seq_length() < cache.get_seq_length():
        feed(tiny, twin, prompt(1, 1, seed=twin.get_seq_length()))
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))
    assert len(list(tmp_path.iterdir())) <= 2  # and perhaps what it was writing


@pytest.mark.dist
def test_two_processes_save_to_one_path(tiny, tmp_path):
    """Whoever reads meanwhile, and at the end, finds a whole session of one of them."""
    path = tmp_path / "a"
    code = SAVES_FOREVER.format(tests=str(Path(__file__).parent), path=str(path), kv_dtype=None)
    writers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "saved\n"
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            cache = RedKnotCache.load(path, tiny)
    finally:
        for writer in writers:
            assert writer.poll() is None, "a writer failed"
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    cache = RedKnotCache.load(path, tiny)
    twin = make(tiny, mixed_profile(tiny.config), 1, 40)
    while twin.get_seq_length() < cache.get_seq_length():
        feed(tiny, twin, prompt(1, 1, seed=twin.get_seq_length()))
    assert torch.equal(steps(tiny, cache), steps(tiny, twin))


def test_saving_is_not_seen_half_done(tiny, profile, tmp_path):
    """A reader that loads again and again while a writer saves sees the old session or the new one."""
    import threading

    cache = make(tiny, profile, 1, 30)
    path = tmp_path / "a"
    cache.save(path)
    done = threading.Event()

    def write() -> None:
        for _ in range(10):
            feed(tiny, cache, prompt(1, 2))
            cache.save(path)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not done.is_set():
        seen.append(RedKnotCache.load(path, tiny.config).get_seq_length())
        time.sleep(0.001)
    thread.join()
    assert seen == sorted(seen) and set(seen) <= set(range(30, 52, 2))


def test_another_config_of_the_same_shape(tiny, saved, tmp_path):
    (tmp_path / "a").write_bytes(saved[0])
    with pytest.raises(RedKnotError, match="another model"):
        RedKnotCache.load(tmp_path / "a", tiny_config(rms_norm_eps=1e-3))


def test_numbers_survive_exactly(tiny, profile, tmp_path):
    """NaN payloads, infinities, denormals and negative zero are bits like any others."""
    cache = make(tiny, profile, 1, 9)
    pool = next(iter(cache._pools.values()))
    bits = np.random.default_rng(0).integers(0, 2**32, pool.k.numel(), dtype=np.uint32).view(np.float32)
    pool.k.copy_(torch.from_numpy(bits).view_as(pool.k))
    cache.save(tmp_path / "a")
    other = RedKnotCache.load(tmp_path / "a", tiny.config)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys.view(torch.int32), theirs.keys.view(torch.int32))
