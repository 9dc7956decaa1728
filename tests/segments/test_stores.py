"""One suite over every kind of store: what was put is what is got, bit for bit, or it is a miss."""

from __future__ import annotations

import logging
import multiprocessing
import threading

import pytest
import torch
from store_backends import (
    KINDS,
    SHARED_KINDS,
    Backend,
    assert_same,
    big_entry,
    make_backend,
    make_entry,
    make_key,
    params,
)

from redknot_hf.errors import RedKnotError
from redknot_hf.segments.codec import SegmentEntry, encode
from redknot_hf.segments.stores import SegmentStore

LOGGER = "redknot_hf.segments.stores"


@pytest.fixture
def backend(request, tmp_path) -> Backend:
    return make_backend(request.param, tmp_path, request)


@pytest.fixture
def store(backend):
    with backend.open() as opened:
        yield opened


over_all = pytest.mark.parametrize("backend", params(KINDS), indirect=True)
over_shared = pytest.mark.parametrize("backend", params(SHARED_KINDS), indirect=True)
over_bytes = pytest.mark.parametrize("backend", params([k for k in KINDS if k != "memory"]), indirect=True)


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelno >= logging.WARNING]


@over_all
def test_round_trip_is_bitwise(store):
    key, entry = make_key(1), make_entry(1)
    assert store.put(key, entry)
    got = store.get(key)
    assert_same(got, entry)
    assert (got.key, got.model, got.rope, got.dtype) == (key.hex, key.model, key.rope, key.dtype)
    assert got.tier == store.tier


@over_all
def test_a_missing_entry_is_none_and_says_nothing(store, caplog):
    assert store.get(make_key(2)) is None
    assert store.get_many([]) == [] and store.put_many([]) == []
    assert not store.contains(make_key(2)) and not store.delete(make_key(2))
    assert warnings_of(caplog) == []
    assert store.stat().misses == 1


@over_all
def test_put_replaces(store):
    key = make_key(3)
    assert store.put(key, make_entry(1, rows=500)) and store.put(key, make_entry(2, rows=3))
    assert_same(store.get(key), make_entry(2, rows=3))
    assert len(store.list()) == 1


@over_all
def test_delete_and_contains(store):
    key = make_key(4)
    store.put(key, make_entry())
    assert store.contains(key) and store.contains(key.hex)
    assert store.delete(key) and not store.contains(key) and store.get(key) is None and not store.delete(key)


@over_all
def test_batches_keep_order_and_tell_hits_from_misses(store):
    keys = [make_key(i) for i in range(5)]
    assert store.put_many([(k, make_entry(i)) for i, k in enumerate(keys) if i != 2]) == [True] * 4
    got = store.get_many(keys)
    assert got[2] is None
    for i in (0, 1, 3, 4):
        assert_same(got[i], make_entry(i))
    assert (store.stat().hits, store.stat().misses) == (4, 1)


@over_all
def test_list_and_stat_count_entries_and_bytes(store):
    for i in range(3):
        store.put(make_key(i), big_entry(i, 1000 * (i + 1)))
    records = store.list()
    assert {r.key for r in records} == {make_key(i).hex for i in range(3)}
    stat = store.stat()
    assert stat.entries == 3 and stat.nbytes == sum(r.nbytes for r in records) and 6000 <= stat.nbytes < 12_000


@over_all
def test_an_entry_of_many_pieces(store):
    """9 MB: 90 values in Valkey here, three pieces of the checksum tree."""
    entry = big_entry(7, 9_000_000)
    assert store.put(make_key(7), entry)
    assert_same(store.get(make_key(7)), entry)


@over_all
def test_what_a_caller_does_later_to_its_tensors_does_not_reach_the_store(store):
    entry, key = make_entry(1), make_key(8)
    store.put(key, entry)
    entry.tensors["layer.0.k"].zero_()
    assert_same(store.get(key), make_entry(1))


@over_all
def test_a_reader_that_writes_to_an_entry_never_changes_what_the_next_reader_gets(store, caplog):
    key = make_key(9)
    store.put(key, make_entry(1))
    store.get(key).tensors["layer.0.k"].zero_()
    again = store.get(key)
    if again is None:  # the memory store hands out its own tensors: it notices and drops them
        assert store.tier == "memory" and len(warnings_of(caplog)) == 1
    else:
        assert_same(again, make_entry(1))


@over_all
def test_the_ceiling_drops_the_least_recently_used_first(backend):
    sized = sum(p.nbytes for p in encode(SegmentEntry({"x": torch.zeros(12_500, dtype=torch.int64)}, key="0" * 64)))
    with backend.open(max_bytes=3 * sized + 1000) as store:
        for i in range(3):
            assert store.put(make_key(i), big_entry(i, 100_000))
        tick()
        assert store.get(make_key(0)) is not None  # 1 is now the oldest, where the kind knows of use at all
        tick()
        assert store.put(make_key(3), big_entry(3, 100_000))
        kept = {i for i in range(4) if store.contains(make_key(i))}
        by_use = {0, 2, 3} if backend.kind in ("memory", "file", "valkey") else None
        assert kept == by_use or (by_use is None and len(kept) == 3 and 3 in kept)
        assert store.stat().nbytes <= store.max_bytes
        assert not store.put(make_key(5), big_entry(5, 1_000_000)), "larger than the ceiling"
        assert {i for i in range(4) if store.contains(make_key(i))} == kept, "and nothing was evicted for it"


def tick() -> None:
    import time

    time.sleep(0.02)


@over_all
def test_gc_keeps_what_fits_and_drops_what_is_old(store):
    for i in range(4):
        store.put(make_key(i), big_entry(i, 80_000))
        tick()
    report = store.gc(max_bytes=2 * 85_000)
    assert (report.removed, report.kept) == (2, 2) and len(store.list()) == 2
    if store.tier != "mooncake":  # which has no times, so every entry is infinitely old
        assert store.gc(older_than=3600).removed == 0
    assert store.gc(older_than=-1).removed == 2 and store.list() == []


@over_all
@pytest.mark.parametrize(
    "bad", ["../../etc/passwd", "0" * 63, "0" * 65, "A" * 64, "", "0" * 63 + "\n", 7, None, b"0" * 64]
)
def test_only_hex_digits_are_keys(store, bad):
    for call in (store.get, store.contains, store.delete, lambda key: store.put(key, make_entry())):
        with pytest.raises(RedKnotError, match="64 lower-case hex digits"):
            call(bad)


@over_all
def test_an_entry_that_no_store_can_keep_is_the_callers_error(store):
    if store.tier != "memory":
        with pytest.raises(RedKnotError, match="complex64"):
            store.put(make_key(1), SegmentEntry({"x": torch.zeros(2, dtype=torch.complex64)}))
        with pytest.raises(RedKnotError, match="JSON"):
            store.put(make_key(1), SegmentEntry({}, extra={"x": object()}))


# -- damage -----------------------------------------------------------------------------------------------------------


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def header_only(data: bytes) -> bytes:
    return data[: 8 + int.from_bytes(data[:8], "little")]


def flipped_in_the_tensors(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def flipped_in_the_header(data: bytes) -> bytes:
    at = data.index(b"num_tokens") + 14
    return data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]


def longer(data: bytes) -> bytes:
    return data + b"\0" * 8


def noise(data: bytes) -> bytes:
    return bytes(range(256)) * 8


def huge_length(data: bytes) -> bytes:
    return (2**60).to_bytes(8, "little") + data[8:]


def pickled(data: bytes) -> bytes:
    import pickle

    return pickle.dumps({"k": [1, 2, 3]}) * 20


def other_key(data: bytes) -> bytes:
    entry = make_entry(1)
    entry.key = make_key(99).hex
    return b"".join(encode(entry))


def other_model(data: bytes) -> bytes:
    entry = make_entry(1)
    entry.key, entry.model, entry.rope, entry.dtype = make_key(1).hex, "x" * 64, "r" * 64, "bfloat16"
    return b"".join(encode(entry))


def other_dtype(data: bytes) -> bytes:
    entry = make_entry(1)
    entry.key, entry.model, entry.rope, entry.dtype = make_key(1).hex, "m" * 64, "r" * 64, "float32"
    return b"".join(encode(entry))


@over_bytes
@pytest.mark.parametrize(
    "damage",
    [
        truncated, header_only, flipped_in_the_tensors, flipped_in_the_header, longer, noise, huge_length, pickled,
        other_key, other_model, other_dtype,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_a_miss_with_one_warning_and_is_gone(backend, damage, caplog):
    key = make_key(1)
    with backend.open() as store:
        store.put(key, make_entry(1))
        store.put(make_key(2), make_entry(2))
        backend.set_raw(key.hex, damage(backend.raw(key.hex)))
        assert store.get(key) is None
        assert len(warnings_of(caplog)) == 1 and key.hex[:12] in warnings_of(caplog)[0]
        assert backend.raw(key.hex) is None, "quarantined: it must not warn the next reader again"
        assert store.get(key) is None and len(warnings_of(caplog)) == 1
        assert_same(store.get(make_key(2)), make_entry(2))  # the others are untouched, the store is not "down"
        assert store.put(key, make_entry(1))
        assert_same(store.get(key), make_entry(1))


@over_bytes
def test_an_entry_sealed_with_another_secret_is_never_used(backend, caplog):
    key = make_key(1)
    with backend.open(secret="right") as ours, backend.open(secret="wrong") as theirs, backend.open() as plain:
        ours.put(key, make_entry(1))
        assert_same(ours.get(key), make_entry(1))
        assert plain.get(key) is None and backend.raw(key.hex) is not None, "unreadable is not damaged: left alone"
        assert plain.get(key) is None and len(warnings_of(caplog)) == 1
        assert theirs.get(key) is None
        plain.put(key, make_entry(2))  # what somebody without the secret can do
        assert ours.get(key) is None


@pytest.mark.parametrize("backend", params([k for k in KINDS if k not in ("memory", "mooncake")]), indirect=True)
def test_header_mode_reads_no_tensor_bytes_but_still_checks_the_description(backend):
    key = make_key(1)
    with backend.open(verify="header") as store:
        store.put(key, make_entry(1))
        backend.set_raw(key.hex, flipped_in_the_tensors(backend.raw(key.hex)))
        assert store.get(key) is not None
        backend.set_raw(key.hex, flipped_in_the_header(backend.raw(key.hex)))
        assert store.get(key) is None


@pytest.mark.store
@pytest.mark.parametrize("backend", ["mooncake"], indirect=True)
def test_mooncake_has_no_header_mode(backend):
    """Its memory may be overwritten under a reader, so it checks everything whatever it is told."""
    with backend.open(verify="header") as store:
        store.put(make_key(1), make_entry(1))
        backend.set_raw(make_key(1).hex, flipped_in_the_tensors(backend.raw(make_key(1).hex)))
        assert store.get(make_key(1)) is None


@over_bytes
def test_verify_finds_exactly_the_damaged_entries(backend):
    with backend.open() as store:
        for i in range(3):
            store.put(make_key(i), make_entry(i))
        backend.set_raw(make_key(1).hex, flipped_in_the_tensors(backend.raw(make_key(1).hex)))
        used = [(r.key, r.last_used) for r in store.list()]
        bad = {record.key for record, problem in store.verify() if problem}
        assert [(r.key, r.last_used) for r in store.list()] == used, "looking is not using"
        assert bad == {make_key(1).hex} and len(store.list()) == 3
        list(store.verify(delete=True))
        assert {r.key for r in store.list()} == {make_key(0).hex, make_key(2).hex}


# -- several users at once
# ----------------------------------------------------------------------------------------------


def hammer(store: SegmentStore, worker: int, rounds: int, errors: list[str]) -> None:
    """Write and read the same few keys as everybody else. Any value some worker wrote is right; a mixture is not."""
    try:
        for i in range(rounds):
            key = make_key(i % 3)
            value = worker * 1000 + i
            entry = SegmentEntry({"a": torch.full((3000,), value), "b": torch.full((3000,), value)}, num_tokens=value)
            store.put(key, entry)
            got = store.get(key)
            if got is not None:
                values = {got.num_tokens, *got.tensors["a"].tolist(), *got.tensors["b"].tolist()}
                if len(values) != 1:
                    errors.append(f"worker {worker} got a mixture of {values}")
    except Exception as e:
        errors.append(f"worker {worker}: {type(e).__name__}: {e}")


@over_all
def test_threads_see_whole_entries(store, caplog):
    errors: list[str] = []
    threads = [threading.Thread(target=hammer, args=(store, w, 25, errors)) for w in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert errors == [] and not any(t.is_alive() for t in threads)
    assert warnings_of(caplog) == [], "a reader that meets a writer must not find damage"
    assert store.stat().failures == 0


def other_process(url: str, options: dict, rounds: int, queue) -> None:
    torch.set_num_threads(1)
    errors: list[str] = []
    with SegmentStore(url, **options) as store:
        hammer(store, 7, rounds, errors)
        errors += [f"failures: {store.stat().failures}"] if store.stat().failures else []
        store.put(make_key(50), make_entry(50))
    queue.put(errors)


@over_shared
def test_two_processes_share_a_store(backend, caplog):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    options = {k: v for k, v in backend.options.items() if k != "client"}
    if backend.kind == "mooncake":
        options |= {"segment_bytes": 16 << 20, "buffer_bytes": 16 << 20}
    process = context.Process(target=other_process, args=(backend.url, options, 40, queue))
    errors: list[str] = []
    with backend.open() as store:
        process.start()
        hammer(store, 1, 40, errors)
        theirs = queue.get(timeout=120)
        if backend.kind != "mooncake":  # whose entries may live in the memory of the process that is about to end
            assert_same(store.get(make_key(50)), make_entry(50))
    process.join(60)
    assert errors == [] and theirs == [] and process.exitcode == 0
    assert warnings_of(caplog) == []
