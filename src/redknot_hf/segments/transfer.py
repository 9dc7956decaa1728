"""Entries from host memory to a GPU.

Stored entries lie in ordinary memory, often in a mapped file, from which a copy to a GPU runs at a fraction of the
bus. Here several threads fill page-locked buffers piece by piece, and each piece is on its way while the next is
filled. torch keeps the buffers for the next time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["to_device"]

PIECE_BYTES = 8 << 20
WORKERS = 8


def to_device(tensors: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The tensors on ``device``; those that are there already are not copied."""
    device = torch.device(device)
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    moved = {
        name: tensor if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in tensors.items()
    }
    pieces = []
    for name, tensor in tensors.items():
        if tensor.is_cuda:
            moved[name] = tensor.to(device)
        elif tensor.is_pinned():
            moved[name].copy_(tensor, non_blocking=True)
        else:
            source, target = tensor.contiguous().view(-1), moved[name].view(-1)
            count = max(1, PIECE_BYTES // tensor.element_size())
            pieces += list(zip(source.split(count), target.split(count), strict=True))
    if pieces:
        stream = torch.cuda.current_stream(device)

        def send(piece: tuple[torch.Tensor, torch.Tensor]) -> None:
            source, target = piece
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            buffer.copy_(source)
            with torch.cuda.stream(stream):
                target.copy_(buffer, non_blocking=True)

        with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1, len(pieces))) as pool:
            list(pool.map(send, pieces))
    return moved
