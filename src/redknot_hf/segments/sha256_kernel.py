"""SHA-256 of many pieces of GPU memory by one launch.

The bytes of an entry are hashed where they are used: what the forward reads is what was checked, and the processor has
nothing to do but read files. One warp takes 32 pieces of 64 KiB; 4 GB are a few milliseconds of a GPU, against a tenth
of a second of sixteen cores. The digests are those of `hashlib.sha256`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import threading
from collections.abc import Sequence

import numpy as np
import torch

from . import place_kernel

__all__ = ["available", "digests", "ready", "serves", "sha256"]

logger = logging.getLogger(__name__)

LANES = 32  # pieces of one program: a warp's

available = place_kernel.available


def serves(tensor: torch.Tensor) -> bool:
    """Whether the kernel takes the bytes of a tensor: contiguous, whole pairs of words."""
    nbytes = tensor.numel() * tensor.element_size()
    return nbytes % 8 == 0 and tensor.is_contiguous() and tensor.data_ptr() % 8 == 0


def ready(device: torch.device) -> bool:
    """Whether the kernel is compiled. If it is not, a thread does that, and whoever asks now hashes in another way."""
    if not available(device):
        return False
    with _lock:
        if device not in _compiled:
            _compiled[device] = threading.Event()
            threading.Thread(target=_compile, args=(device, _compiled[device]), name="redknot-sha256").start()
    return _compiled[device].is_set()


_lock = threading.Lock()
_compiled: dict[torch.device, threading.Event] = {}


def _compile(device: torch.device, done: threading.Event) -> None:
    try:
        words = sha256([torch.zeros(64, dtype=torch.uint8, device=device)], 64)
        right = digests(words.cpu()) == hashlib.sha256(bytes(64)).digest()
    except Exception as error:  # a compiler that cannot be used here: threads go on hashing
        logger.warning("the GPU does not hash stored segments, threads do: %s: %s", type(error).__name__, error)
        return
    if right:
        done.set()
    else:
        logger.warning("the GPU does not hash stored segments, threads do: its digests are wrong")


def sha256(tensors: Sequence[torch.Tensor], piece_bytes: int) -> torch.Tensor:
    """Digests of all pieces of the tensors, in their order, on the current stream.

    Args:
        tensors: on one GPU, each of which `serves` accepts; they must live until the kernel has run.
        piece_bytes: a multiple of 8, below 512 MB; the last piece of a tensor is shorter.

    Returns:
        int32 ``[pieces, 8]``, the eight words of each digest as numbers.
    """
    from ._sha256_triton import sha256_kernel

    device = tensors[0].device
    rows = []
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        begins = np.arange(0, nbytes, piece_bytes, dtype=np.int64)
        rows.append(np.stack([tensor.data_ptr() + begins, np.minimum(nbytes - begins, piece_bytes)], 1))
    table = torch.from_numpy(np.concatenate(rows))
    most = (int(table[:, 1].max()) + 72) // 64  # blocks of 64 bytes, padding included
    if device.type == "cuda":  # a copy from pageable memory would wait for everything before it
        table = table.pin_memory().to(device, non_blocking=True)
    out = torch.empty(len(table), 8, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        sha256_kernel[(-(-len(table) // LANES),)](
            table, _rounds(device), out, len(table), most, LANES=LANES, num_warps=1
        )
    return out


@functools.cache
def _rounds(device: torch.device) -> torch.Tensor:
    """The constants of the rounds, int32 ``[64]``: fractional parts of the cube roots of the first primes."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, math.isqrt(n) + 1))]
    roots = [_cube_root(prime << 96) & 0xFFFFFFFF for prime in primes]
    return torch.from_numpy(np.array(roots, np.uint32).view(np.int32)).to(device)


def _cube_root(n: int) -> int:
    """The integer part."""
    low, high = 0, 1 << (n.bit_length() // 3 + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**3 <= n else (low, middle)
    return low


def digests(words: torch.Tensor) -> bytes:
    """The result of `sha256`, on the host: 32 bytes of each digest as `hashlib` would give them, one after the other.

    In one piece: tens of thousands of small objects would hold the interpreter's lock while a forward is launched.
    """
    return words.numpy().astype(">u4").tobytes()
