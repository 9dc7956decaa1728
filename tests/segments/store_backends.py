"""One face for all kinds of store, so that one test suite can run over them and break their bytes."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redknot_hf.segments.codec import SegmentEntry
from redknot_hf.segments.entry import in_int8, pack
from redknot_hf.segments.keys import SegmentKey
from redknot_hf.segments.stores import SegmentStore

KINDS = ["memory", "file", "fsspec-object", "fsspec-renamed", "s3", "valkey", "mooncake"]
SERVER_KINDS = ["s3", "valkey", "mooncake"]
SHARED_KINDS = ["file", "fsspec-renamed", "valkey", "mooncake"]

ALL_DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


def params(kinds: list[str]) -> list[Any]:
    return [pytest.param(k, marks=pytest.mark.store) if k in SERVER_KINDS else k for k in kinds]


@dataclasses.dataclass
class Backend:
    """A place for entries. `open` makes a store object over it; `raw`/`set_raw` see and replace an entry's bytes."""

    kind: str
    url: str
    options: dict[str, Any]
    raw: Callable[[str], bytes | None] | None = None
    set_raw: Callable[[str, bytes], None] | None = None

    def open(self, **options: Any) -> SegmentStore:
        return SegmentStore(self.url, **{**self.options, **options})


def make_backend(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Backend:
    if kind == "memory":
        return Backend(kind, "memory://", {})
    if kind in ("file", "fsspec-renamed"):
        root = tmp_path / "store"
        url = f"file://{root}" if kind == "file" else f"fsspec+file://{root}"

        def path(name: str) -> Path:
            return root / name[:2] / f"{name}.safetensors"

        return Backend(
            kind,
            url,
            {},
            lambda n: path(n).read_bytes() if path(n).exists() else None,
            lambda n, b: path(n).write_bytes(b),
        )
    if kind == "fsspec-object":
        fsspec = pytest.importorskip("fsspec")
        fs, root = fsspec.filesystem("memory"), f"/bucket-{uuid.uuid4().hex}/prefix"

        def obj(name: str) -> str:
            return f"{root}/{name[:2]}/{name}.safetensors"

        return Backend(
            kind,
            f"fsspec+memory:/{root}",
            {},
            lambda n: fs.cat_file(obj(n)) if fs.exists(obj(n)) else None,
            lambda n, b: fs.pipe_file(obj(n), b),
        )
    if kind == "s3":
        endpoint = request.getfixturevalue("s3_server")
        import s3fs

        options = dict(key="k", secret="s", client_kwargs={"endpoint_url": endpoint})
        files, bucket = s3fs.S3FileSystem(use_listings_cache=False, **options), f"bucket-{uuid.uuid4().hex[:12]}"
        files.mkdir(bucket)

        def key(name: str) -> str:
            return f"{bucket}/prefix/{name[:2]}/{name}.safetensors"

        return Backend(
            kind,
            f"s3://{bucket}/prefix",
            {"storage_options": options},
            lambda n: files.cat_file(key(n)) if files.exists(key(n)) else None,
            lambda n, b: files.pipe_file(key(n), b),
        )
    if kind == "valkey":
        server = request.getfixturevalue("valkey_server")
        import valkey

        client, prefix = valkey.Valkey(port=server.port), f"test-{uuid.uuid4().hex}"
        request.addfinalizer(client.close)
        return Backend(
            kind,
            f"valkey://127.0.0.1:{server.port}",
            {"prefix": prefix, "piece_bytes": 100_000},
            lambda n: valkey_raw(client, prefix, n),
            lambda n, b: valkey_set_raw(client, prefix, n, b),
        )
    if kind == "mooncake":
        pool = request.getfixturevalue("mooncake_pool")
        prefix = f"t{uuid.uuid4().hex[:8]}-"
        client = pool.member._connected()
        return Backend(
            kind,
            pool.url,
            {"prefix": prefix, "admin_port": pool.admin_port, "client": client},
            lambda n: client.get(prefix + n) or None,
            lambda n, b: check(client.upsert(prefix + n, b)),
        )
    raise AssertionError(kind)


def check(code: int) -> None:
    assert code == 0, f"mooncake: code {code}"


def valkey_raw(client: Any, prefix: str, name: str) -> bytes | None:
    import json

    manifest = client.get(f"{prefix}:m:{name}")
    if manifest is None:
        return None
    m = json.loads(manifest)
    return b"".join(client.get(f"{prefix}:c:{name}:{m['id']}:{i}") for i in range(m["pieces"]))


def valkey_set_raw(client: Any, prefix: str, name: str, data: bytes) -> None:
    import json

    client.set(f"{prefix}:c:{name}:raw:0", data)
    client.set(f"{prefix}:m:{name}", json.dumps({"id": "raw", "pieces": 1, "bytes": max(1, len(data))}))
    client.zadd(f"{prefix}:used", {name: 1.0})
    client.hset(f"{prefix}:size", name, len(data))


def make_key(seed: int = 0, **fields: Any) -> SegmentKey:
    defaults = dict(model="m" * 64, rope="r" * 64, header_ids=[1], dtype="bfloat16", token_ids=[seed, seed + 1])
    return SegmentKey.of(**{**defaults, **fields})


def make_entry(seed: int = 0, rows: int = 7) -> SegmentEntry:
    """Ragged keys and values of two heads, one tensor of every dtype that a store must keep, and rows in int8."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "layer.0.k": torch.randn(rows + 3, 8, generator=g).bfloat16(),
        "layer.0.v": torch.randn(rows + 3, 8, generator=g).bfloat16(),
        "layer.0.count": torch.tensor([rows, 3], dtype=torch.int32),
        "empty": torch.empty(0, 8, dtype=torch.float16),
        "scalar": torch.tensor(seed, dtype=torch.int64),
        "strided": torch.arange(24, dtype=torch.float32).view(4, 6).t(),
    }
    for dtype in ALL_DTYPES:
        bits = torch.randint(
            0, 2 if dtype == torch.bool else 256, (5 * dtype.itemsize,), generator=g, dtype=torch.uint8
        )
        tensors[str(dtype)] = bits.view(dtype)
    keys, values = (list(torch.randn(2, 3, rows, 8, generator=g)) for _ in range(2))
    tensors.update(in_int8(pack(keys, values, 1)).tensors)
    return SegmentEntry(
        tensors, num_tokens=rows, start=1, extra={"note": "größer", "seed": seed, "list": [1, 2.5, None]}
    )


def big_entry(seed: int, nbytes: int) -> SegmentEntry:
    g = torch.Generator().manual_seed(seed)
    data = torch.randint(-(2**31), 2**31, (nbytes // 8,), generator=g, dtype=torch.int64)
    return SegmentEntry({"layer.0.k": data}, num_tokens=seed)


def assert_same(got: SegmentEntry | None, put: SegmentEntry) -> None:
    assert got is not None, "missed"
    assert got.tensors.keys() == put.tensors.keys()
    for name, want in put.tensors.items():
        have = got.tensors[name]
        assert have.dtype == want.dtype and have.shape == want.shape, name
        assert torch.equal(bits_of(have), bits_of(want)), f"{name} differs in its bits"
    assert (got.num_tokens, got.start, got.extra) == (put.num_tokens, put.start, put.extra)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
