"""The byte form of an entry: safetensors that others can read, and a reader that believes nothing."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import mmap
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_backends import assert_same, big_entry, make_entry

import redknot_hf.segments
from redknot_hf.errors import RedKnotError
from redknot_hf.segments import codec
from redknot_hf.segments.codec import CorruptEntry, SegmentEntry, UnreadableEntry, decode, encode
from redknot_hf.segments.entry import inspect
from redknot_hf.segments.ragged import pack_layer, unpack_layer

KEY = "ab" * 32


def encoded(entry: SegmentEntry | None = None, **options) -> bytes:
    entry = dataclasses.replace(entry if entry is not None else make_entry(1), key=KEY)
    return b"".join(encode(entry, **options))


def split(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict | bytes, tensors: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + tensors


def resealed(table: dict, tensors: bytes, **fields) -> bytes:
    """What an attacker without a secret can make: any table and fields, with a seal that is right for them."""
    described = json.loads(split(encoded())[0]["__metadata__"]["redknot_segment"]) | fields
    described.pop("keyed"), described.pop("seal")
    described["seal"] = codec._seal(described, table, None)
    described["keyed"] = False
    return joined({"__metadata__": {"redknot_segment": json.dumps(described)}, **table}, tensors)


def test_round_trip_keeps_every_bit_and_field():
    assert_same(decode(encoded(), key=KEY), make_entry(1))


def test_any_safetensors_reader_opens_it():
    loaded = safetensors.torch.load(encoded())
    entry = make_entry(1)
    for name, tensor in entry.tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(
            loaded[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        )


def test_tensors_are_views_of_a_mapped_file(tmp_path):
    path = tmp_path / "entry"
    path.write_bytes(encoded(big_entry(1, 1 << 20)))
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = decode(mapped, key=KEY).tensors["layer.0.k"]
    mapped[-8:] = b"\7" * 8
    assert tensor[-1] == int.from_bytes(b"\7" * 8, "little"), "no copy was made"
    tensor[-1] = 0
    assert path.read_bytes()[-8:] != b"\0" * 8, "and a stray write does not reach the file"


def test_encoding_copies_no_tensor():
    tensor = torch.arange(1000)
    part = encode(SegmentEntry({"x": tensor}))[-1]
    tensor[0] = 77
    assert part[:8].tobytes() == (77).to_bytes(8, "little")


def test_extra_comes_back_as_json_sees_it():
    entry = decode(encoded(SegmentEntry({}, extra={"t": (1, 2), 10: "a", 9: "b"})))
    assert entry.extra == {"t": [1, 2], "10": "a", "9": "b"}
    for bad in ({"x": math.nan}, {"x": {1, 2}}, {"x": torch.zeros(1)}):
        with pytest.raises(RedKnotError, match="JSON"):
            encode(SegmentEntry({}, extra=bad))


def test_the_checksum_tree_is_the_same_on_one_thread_and_on_many(monkeypatch):
    entry = big_entry(1, 20 << 20)
    many = encoded(entry)
    monkeypatch.setattr(codec.os, "cpu_count", lambda: 1)
    assert encoded(entry) == many


@pytest.mark.parametrize("at", [0, 5 << 20, (20 << 20) - 1])
def test_a_flipped_bit_anywhere_in_the_tensors_is_found(at):
    data = bytearray(encoded(big_entry(1, 20 << 20)))
    data[len(data) - (20 << 20) + at] ^= 0x10
    with pytest.raises(CorruptEntry, match="checksum"):
        decode(data, key=KEY)


def test_another_entry_under_the_key_is_found():
    with pytest.raises(CorruptEntry, match="another key"):
        decode(encoded(), key="cd" * 32)


def test_a_secret_is_needed_to_make_an_entry():
    ours = encoded(secret=b"right")
    assert_same(decode(ours, key=KEY, secret=b"right"), make_entry(1))
    with pytest.raises(CorruptEntry, match="seal"):
        decode(ours, key=KEY, secret=b"wrong")
    with pytest.raises(UnreadableEntry):
        decode(ours, key=KEY)
    with pytest.raises(UnreadableEntry):
        decode(encoded(), key=KEY, secret=b"right")
    header, tensors = split(ours)
    fields = json.loads(header["__metadata__"]["redknot_segment"])
    fields["num_tokens"] += 1
    header["__metadata__"]["redknot_segment"] = json.dumps(fields)
    with pytest.raises(CorruptEntry, match="seal"):
        decode(joined(header, tensors), key=KEY, secret=b"right")


def test_a_newer_version_is_left_alone():
    header, tensors = split(encoded())
    fields = json.loads(header["__metadata__"]["redknot_segment"]) | {"version": 99, "new_field": 1}
    header["__metadata__"]["redknot_segment"] = json.dumps(fields)
    with pytest.raises(UnreadableEntry, match="version 99"):
        decode(joined(header, tensors))


HUGE = 2**60


@pytest.mark.parametrize(
    "table",
    [
        {"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}},
        {"x": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64]}},
        {"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1] * 9 + [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        {"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        {
            "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
            "z": {"dtype": "U8", "shape": [3], "data_offsets": [5, 8]},
        },
        {"x": 7},
        {},
    ],
)
def test_a_table_that_does_not_tile_the_bytes_is_refused_before_a_tensor_is_made(table, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a tensor was made from a table that does not fit")

    data = resealed(table, b"\0" * 8)
    monkeypatch.setattr(codec.torch, "frombuffer", never)
    monkeypatch.setattr(codec.torch, "empty", never)
    with pytest.raises(CorruptEntry):
        decode(data, verify="header")  # so that the checksum of the bytes cannot be what refuses it


def test_shapes_without_elements_may_not_overflow_torch():
    empty = codec._data_digest([])
    shape = [0] + [2**31 - 1] * 7
    try:
        entry = decode(resealed({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b"", data=empty))
        assert entry.nbytes == 0
    except CorruptEntry:
        pass


@pytest.mark.parametrize("length", [HUGE, 2**64 - 1, 10_000_000, 0])
def test_a_header_length_is_compared_with_what_is_there(length):
    with pytest.raises(CorruptEntry, match="header" if length else "JSON"):
        decode(struct.pack("<Q", length) + encoded()[8:])


def test_a_header_is_small_however_large_the_entry(monkeypatch):
    monkeypatch.setattr(codec.json, "loads", lambda *a, **k: pytest.fail("a giant header was parsed"))
    with pytest.raises(CorruptEntry, match="header claims"):
        decode(joined(b" " * (codec.MAX_HEADER_BYTES + 1), b""))


def test_a_name_may_not_appear_twice():
    data = encoded(SegmentEntry({"x": torch.zeros(2)}))
    length = struct.unpack("<Q", data[:8])[0]
    text, tensors = data[8 : 8 + length].decode(), data[8 + length :]
    row = json.dumps(json.loads(text)["x"], separators=(",", ":"))
    assert f'"x":{row}' in text
    twice = text.replace(f'"x":{row}', f'"x":{row},"x":{row}')
    assert_same(decode(joined(text.encode(), tensors)), SegmentEntry({"x": torch.zeros(2)}))
    with pytest.raises(CorruptEntry, match="twice"):
        decode(joined(twice.encode(), tensors))


def test_a_header_that_is_a_bomb_is_refused():
    for bomb in (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 100_000, b'{"x":1,"x":2}', b"\xff\xfe", b"[]", b"null"):
        with pytest.raises(CorruptEntry):
            decode(joined(bomb, b""))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([2**31, HUGE, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
rows = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*codec._DTYPES, "Q", 3]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 2**31 - 1, 2**31, HUGE, -1]), max_size=9) | json_values,
        "data_offsets": st.tuples(st.integers(-1, 70), st.integers(-1, 70)).map(list) | json_values,
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), rows | json_values, max_size=4), st.integers(0, 64))
def test_no_table_makes_the_reader_do_anything_but_refuse_or_stay_within_the_bytes(table, size):
    table.pop("__metadata__", None)
    tensors = bytes(size)
    rows_in_order = sorted((r["data_offsets"] for r in table.values() if _plain(r)), key=str)
    views = [memoryview(tensors)[a:b] for a, b in rows_in_order]
    try:
        data = resealed(table, tensors, data=codec._data_digest(views))
    except ValueError:  # nan and infinity are no JSON
        return
    try:
        entry = decode(data)
    except CorruptEntry:
        return
    assert entry.nbytes == size and all(t.numel() == 0 or t.abs().max() == 0 for t in _as_int(entry))


def _plain(row) -> bool:
    offsets = row.get("data_offsets") if isinstance(row, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)


def _as_int(entry: SegmentEntry) -> list[torch.Tensor]:
    return [t.reshape(-1).view(torch.uint8).int() for t in entry.tensors.values() if t.numel()]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_the_bytes_is_an_error_or_changes_nothing(data):
    original = encoded()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if kind == "flip" and damaged:
            damaged[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=16))
        else:
            damaged[at : at + 8] = bytes(len(damaged[at : at + 8]))
    try:
        entry = decode(damaged, key=KEY)
    except (CorruptEntry, UnreadableEntry):
        return
    assert_same(entry, make_entry(1))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise):
    with pytest.raises(CorruptEntry):
        decode(noise, key=KEY)


def test_heads_may_keep_different_numbers_of_rows():
    keys = [torch.randn(n, 4).bfloat16() for n in (5, 0, 2)]
    values = [torch.randn(n, 6).bfloat16() for n in (5, 0, 2)]
    positions = [torch.arange(n) * 3 for n in (5, 0, 2)]
    entry = decode(encoded(SegmentEntry(pack_layer(3, keys, values, positions))))
    got = unpack_layer(entry, 3)
    for have, want in ((got.keys, keys), (got.values, values)):
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert [p.tolist() for p in got.positions] == [p.tolist() for p in positions]
    with pytest.raises(CorruptEntry, match=r"layer\.0\."):
        unpack_layer(entry, 0)
    entry.tensors["layer.3.count"] = torch.tensor([5, 1, 2], dtype=torch.int32)
    with pytest.raises(CorruptEntry, match="for \\[5, 1, 2\\]"):
        unpack_layer(entry, 3)
    with pytest.raises(RedKnotError, match="disagree"):
        pack_layer(0, keys, values[:2], positions)


def test_nothing_here_can_unpickle():
    folder = Path(redknot_hf.segments.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            if isinstance(node, ast.Attribute):
                names = [f"{ast.unparse(node)}"]
            assert not any("pickle" in n or "marshal" in n or n == "torch.load" or n == "shelve" for n in names), path


def test_an_unknown_way_to_verify_is_refused():
    with pytest.raises(RedKnotError, match="verify must be"):
        decode(bytearray(b"".join(encode(SegmentEntry({"a": torch.zeros(2)})))), verify="typo")


@pytest.mark.parametrize("verify", ["full", "later", "header"])
@pytest.mark.parametrize("extra", ['{"x":NaN}', '{"x":[-1e999]}', '{"x":' + "[" * 900 + "]" * 900 + "}"])
def test_a_description_that_cannot_be_written_as_json_is_corrupt(extra, verify):
    raw = b"".join(encode(SegmentEntry({"a": torch.zeros(2)})))
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    fields = header["__metadata__"]["redknot_segment"]
    header["__metadata__"]["redknot_segment"] = fields.replace('"extra":{}', f'"extra":{extra}')
    assert header["__metadata__"]["redknot_segment"] != fields
    text = json.dumps(header).encode()
    with pytest.raises(CorruptEntry):
        decode(bytearray(struct.pack("<Q", len(text)) + text + raw[8 + length :]), verify=verify)


@pytest.mark.parametrize("groups", [None, 5, 1.5, True, {}, "00", [0], [0, 1], [0, True], [0, 0.0], [0, []], [[], []]])
def test_layers_that_an_entry_makes_up_are_refused(groups):
    extra = {} if groups is None else {"groups": groups}
    tensors = {"k.0": torch.zeros(2, 1, 4, 8), "v.0": torch.zeros(2, 1, 4, 8)}
    with pytest.raises(CorruptEntry):
        inspect(SegmentEntry(tensors, num_tokens=4, extra=extra), [(1, 8, 8)] * 2, 4, 0, torch.float32)
