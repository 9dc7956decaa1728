"""What a fuzzer calls with bytes: every reader of files and entries that may come from strangers.

Each target takes any bytes and returns quietly when they are refused with a `RedKnotError` or read as something valid.
Anything else is a finding: another exception, a line break in a message, memory that no input of this size explains, or
a file outside the folder it works in. Two targets start from valid bytes and change them behind the checksum: hashes
would otherwise keep a fuzzer from ever getting past the first check.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.heads.codec import from_document, to_text
from redknot_hf.heads.strict_json import parse_json
from redknot_hf.segments import codec
from redknot_hf.segments.keys import key_hex
from redknot_hf.segments.stores.valkey import _parse_manifest
from redknot_hf.sessions.container import Source, read_container, write_container

MOST_BYTES = 8 << 20  # of tensors that an input of a few kilobytes may lead to


@functools.cache
def folder() -> Path:
    """A folder of this process, in memory where the system has such a thing."""
    shared = "/dev/shm"
    return Path(tempfile.mkdtemp(prefix="redknot-fuzz-", dir=shared if os.path.isdir(shared) else None))


@functools.cache
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip


def _refused(call: Callable[[], Any]) -> Any:
    """The result, or None if the input was refused in one line."""
    try:
        return call()
    except RedKnotError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)[:3000]
        return None


def profile(data: bytes) -> None:
    """A head profile file: read, checked, written again and read as the same."""
    found = _refused(lambda: from_document(parse_json(data, "fuzz"), "fuzz"))
    if found is not None:
        again = from_document(parse_json(to_text(found), "again"), "again")
        assert again.head_class == found.head_class and again.window == found.window
        found.kv_bytes(1000, head_dim=8)
        _refused(lambda: found.validate_for(config()))


def importers(data: bytes) -> None:
    """Head maps of other projects, in every format."""
    path = folder() / ("map.json" if data[:1] != b"\x1f" else "map.json.gz")
    path.write_bytes(data[1:] if data[:1] != b"\x1f" else data)
    for form, options in (
        ("auto", {}),
        ("redknot", {}),
        ("headkv", {"num_kv_heads": 2}),
        ("minference", {"num_kv_heads": 2}),
    ):
        found = _refused(lambda form=form, options=options: HeadProfile.import_from(path, form, **options))
        if found is not None:
            found.validate()


def duo_attention(data: bytes) -> None:
    """The table of gates beside a config."""
    path = folder() / "duo"
    path.mkdir(exist_ok=True)
    gates, _, rest = data.partition(b"\0")
    (path / "full_attention_heads.tsv").write_bytes(gates)
    (path / "config.json").write_bytes(rest or b'{"sink_size": 4, "recent_size": 8}')
    found = _refused(lambda: HeadProfile.import_from(path, sparsity=0.5))
    if found is not None:
        found.validate()


def session(data: bytes) -> None:
    """A saved session from arbitrary bytes."""
    path = folder() / "session"
    path.write_bytes(data)
    _refused(lambda: _bounded(RedKnotCache.load(path, config())))


def _bounded(cache: RedKnotCache) -> RedKnotCache:
    report = cache.memory_report()
    assert report.allocated <= 256 << 20, f"{report.allocated:,} bytes"
    return cache


@functools.cache
def saved() -> bytes:
    """A valid session: 12 tokens, one head local."""
    heads = HeadProfile.uniform(config(), sink=1, window=4, global_heads={(0, 0), (0, 1), (1, 0)})
    cache = RedKnotCache(config(), heads, page_size=4)
    torch.manual_seed(0)
    cache.adopt([(torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)) for _ in range(2)], 12)
    path = folder() / "valid"
    cache.save(path)
    return path.read_bytes()


def session_behind_the_seal(data: bytes) -> None:
    """A valid session whose description is changed and sealed again: at one place, to one value, both told by the input."""
    path = folder() / "resealed"
    path.write_bytes(saved())
    contents = read_container(path)
    description = json.loads(json.dumps(contents.description))
    _change(description, data)
    tensors = {name: tensor.clone() for name, tensor in contents.tensors.items()}
    if len(data) > 3 and data[3] % 4 == 0:  # and one number of one table
        name = sorted(tensors)[data[2] % len(tensors)]
        if tensors[name].numel() and not tensors[name].is_floating_point():
            tensors[name].view(-1)[data[1] % tensors[name].numel()] = (
                int.from_bytes(data[4:8] or b"\0", "little", signed=True) % 128
            )
    try:
        write_container(path, description, [Source.of(name, tensor) for name, tensor in tensors.items()])
    except (RedKnotError, ValueError):
        return  # cannot be written
    _refused(lambda: _bounded(RedKnotCache.load(path, config())))


_VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 1e300, "", "x", "../x", [], {}, [[]], "cuda:99", "float64", "local",
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        found += _places(entry, (*path, key))
    return found


def _change(document: Any, data: bytes) -> None:
    if len(data) < 3:
        return
    places = _places(document)
    *parents, last = places[(data[0] << 8 | data[1]) % len(places)]
    for step in parents:
        document = document[step]
    document[last] = _VALUES[data[2] % len(_VALUES)]


def entry(data: bytes) -> None:
    """A stored segment from arbitrary bytes; memory stays in proportion to the input."""
    found = _refused(lambda: codec.decode(data))
    if found is not None:
        assert sum(tensor.numel() * tensor.element_size() for tensor in found.tensors.values()) <= len(data)


@functools.cache
def stored() -> bytes:
    tensors = {"k": torch.arange(24.0).view(2, 12), "n": torch.arange(3)}
    return b"".join(codec.encode(codec.SegmentEntry(tensors, num_tokens=12, key="0" * 64)))


def entry_behind_the_seal(data: bytes) -> None:
    """A valid entry whose header is changed and sealed again."""
    raw = stored()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["redknot_segment"])
    both = {"table": {key: row for key, row in header.items() if key != "__metadata__"}, "fields": fields}
    _change(both, data)
    if not isinstance(both["table"], dict) or not isinstance(both["fields"], dict):
        return
    unsealed = {key: value for key, value in both["fields"].items() if key not in ("seal", "keyed")}
    try:
        seal = codec._seal(unsealed, both["table"], None)
        text = json.dumps({**unsealed, "seal": seal, "keyed": False}, allow_nan=False)
    except ValueError:
        return
    rebuilt = json.dumps({"__metadata__": {"redknot_segment": text}, **both["table"]}).encode()
    changed = len(rebuilt).to_bytes(8, "little") + rebuilt + raw[8 + length :]
    found = _refused(lambda: codec.decode(changed))
    if found is not None:
        held = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in found.tensors.values())
        assert held <= MOST_BYTES


def manifest(data: bytes) -> None:
    """What a server says about an entry's pieces."""
    found = _parse_manifest(data)
    assert found is None or (0 < found["pieces"] <= 65_536 and len(found["id"]) <= 64)


def names(data: bytes) -> None:
    """Segment ids, and names that `HeadProfile.load` takes for a file, a shipped profile or a Hub repository."""
    text = data.decode("utf-8", "replace")
    key = _refused(lambda: key_hex(text))
    assert key is None or (len(key) == 64 and set(key) <= set("0123456789abcdef"))
    if "/" not in text:  # with one it may be a path of this machine, or a Hub id, which offline ends in a RedKnotError
        _refused(lambda: HeadProfile.load(text))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        profile, importers, duo_attention, session, session_behind_the_seal, entry, entry_behind_the_seal, manifest, names,
    )
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Valid or nearly valid inputs to start from."""
    small = to_text(HeadProfile.uniform(config(), sink=1, window=4, global_heads=0.5)).encode()
    foreign = json.dumps(
        {"head_class": [["local", "global"]], "window": 4, "num_layers": 1, "num_kv_heads": 2}
    ).encode()
    scores = json.dumps({"0-0": [0.5], "0-1": [0.1], "1-0": [0.2], "1-1": [0.9]}).encode()
    patterns = json.dumps([{"0": ["stream_llm", 10, 10, 1.0], "1": ["vertical_and_slash", 1, 1, 1.0]}]).encode()
    return {
        "profile": [small],
        "importers": [b" " + foreign, b" " + scores, b" " + patterns, b" " + small],
        "duo_attention": [b"0.1\t0.9\n0.8\t0.2\n", b'0.5\t1\n\0{"sink_size": 4, "recent_size": 8}'],
        "session": [saved()],
        "entry": [stored()],
        "manifest": [b'{"id": "ab", "pieces": 2, "bytes": 100}'],
        "names": [b"SmolLM2-135M-Instruct", b"0" * 64, b"../x"],
    }.get(name, [bytes([0, 5, 3, 0, 1]), bytes([0, 9, 7, 4, 200, 1])])
