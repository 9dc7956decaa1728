"""The hash kernel gives hashlib's digests, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import hashlib
import struct
import threading

import pytest
import torch

from redknot_hf.segments import sha256_kernel

TRITON_MODULE = "redknot_hf.segments._sha256_triton"  # what the fixture `device` makes anew for the interpreter


# around the places where the padding takes another block (55/56, 63/64), whole pieces, and a short last one
@pytest.mark.parametrize("sizes", [[48, 56, 64, 72, 112, 120, 128], [128 * 33 + 40, 8, 0]])
def test_digests_are_those_of_hashlib(device, sizes):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]
    want = [hashlib.sha256(bytes(t[i : i + 128].tolist())).digest() for t in tensors for i in range(0, len(t), 128)]
    found = sha256_kernel.sha256([t.to(device) for t in tensors], 128)
    assert sha256_kernel.digests(found.cpu()) == b"".join(want)


def test_what_the_kernel_cannot_take():
    assert sha256_kernel.serves(torch.zeros(8, dtype=torch.bfloat16))
    assert not sha256_kernel.serves(torch.zeros(6, dtype=torch.bfloat16))
    assert not sha256_kernel.serves(torch.zeros(4, 4, dtype=torch.bfloat16).t())


@pytest.mark.parametrize("fault", [None, "error", "digest"])
def test_it_is_compiled_in_the_background_and_used_only_if_it_is_right(monkeypatch, caplog, fault):
    asked = threading.Event()

    def hashed(tensors, piece_bytes):
        assert asked.wait(20)
        if fault == "error":
            raise RuntimeError("no compiler")
        raw = hashlib.sha256(bytes(64 if fault is None else 63)).digest()
        return torch.tensor([struct.unpack(">8i", raw)], dtype=torch.int32)

    monkeypatch.setattr(sha256_kernel, "available", lambda device: True)
    monkeypatch.setattr(sha256_kernel, "sha256", hashed)
    monkeypatch.setattr(sha256_kernel, "_compiled", {})
    device = torch.device("cpu")
    assert not sha256_kernel.ready(device)
    assert not sha256_kernel.ready(device)  # no second thread
    (worker,) = [thread for thread in threading.enumerate() if thread.name == "redknot-sha256"]
    asked.set()
    worker.join(20)
    assert sha256_kernel.ready(device) == (fault is None)
    assert len(caplog.records) == (fault is not None)
