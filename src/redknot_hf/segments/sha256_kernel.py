"""SHA-256 of many pieces of GPU memory by one launch.

The bytes of an entry are hashed where they are used: what the forward reads is what was checked, and the processor has
nothing to do but read files. One warp takes 32 pieces of 64 KiB; 4 GB are a few milliseconds of a GPU, against a tenth
of a second of sixteen cores. The digests are those of `hashlib.sha256`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import place_kernel

__all__ = ["available", "serves", "sha256"]

LANES = 32  # pieces of one program: a warp's

available = place_kernel.available


def serves(tensor: torch.Tensor) -> bool:
    """Whether the kernel takes the bytes of a tensor: whole words, contiguous, fewer than 512 MB in a piece."""
    nbytes = tensor.numel() * tensor.element_size()
    return nbytes % 4 == 0 and tensor.is_contiguous() and tensor.data_ptr() % 4 == 0


def sha256(tensors: Sequence[torch.Tensor], piece_bytes: int) -> torch.Tensor:
    """Digests of all pieces of the tensors, in their order, on the current stream.

    Args:
        tensors: on one GPU, each of which `serves` accepts; they must live until the kernel has run.
        piece_bytes: a multiple of 4; the last piece of a tensor is shorter.

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
        sha256_kernel[(-(-len(table) // LANES),)](table, out, len(table), most, LANES=LANES, num_warps=1)
    return out


def digests(words: torch.Tensor) -> list[bytes]:
    """The result of `sha256`, on the host, as `hashlib` would give it."""
    raw = words.numpy().astype(">u4").tobytes()
    return [raw[i : i + 32] for i in range(0, len(raw), 32)]
