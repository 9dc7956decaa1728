"""Entries from host memory to a GPU.

Stored entries lie in ordinary memory, often in a mapped file, from which a copy to a GPU runs at a fraction of the
bus. Here several threads take pieces of all entries of a prompt, copy each into page-locked memory of their own, and
send it on its way while they fill the next. torch keeps the page-locked memory for the next time.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

__all__ = ["to_device"]

PIECE_BYTES = 4 << 20
WORKERS = 16
BUFFERS = 3  # of each worker: one is filled while the others are on their way


def to_device(entries: Sequence[dict[str, torch.Tensor]], device: torch.device | str) -> list[dict[str, torch.Tensor]]:
    """The tensors on ``device``; those that are there already are not copied.

    The copies are ordered before whatever the current stream is given afterwards. The sources are read before this
    returns, except those in page-locked memory.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return [{name: tensor.to(device) for name, tensor in tensors.items()} for tensors in entries]
    moved: list[dict[str, torch.Tensor]] = []
    pieces: queue.SimpleQueue[tuple[np.ndarray, torch.Tensor]] = queue.SimpleQueue()
    for tensors in entries:
        moved.append({})
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                moved[-1][name] = tensor.to(device)
                continue
            target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            moved[-1][name] = target
            if tensor.is_pinned():
                target.copy_(tensor, non_blocking=True)
            else:
                source = tensor.detach().contiguous().view(-1).view(torch.uint8)
                sink = target.view(-1).view(torch.uint8)
                for part in zip(source.split(PIECE_BYTES), sink.split(PIECE_BYTES), strict=True):
                    pieces.put((part[0].numpy(), part[1]))
    count = pieces.qsize()
    if count:
        stream = torch.cuda.current_stream(device)
        with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1, count)) as pool:
            for worker in [pool.submit(_send, pieces, stream) for _ in range(pool._max_workers)]:
                worker.result()
    return moved


def _send(pieces: queue.SimpleQueue[tuple[np.ndarray, torch.Tensor]], stream: torch.cuda.Stream) -> None:
    """Copy pieces until there are none left."""
    ring: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
    turn = 0
    while True:
        try:
            source, target = pieces.get_nowait()
        except queue.Empty:
            return
        if len(ring) < BUFFERS:
            ring.append((torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), None))
        buffer, busy = ring[turn]
        if busy is not None:
            busy.synchronize()
        # numpy copies on this thread, without the GIL; torch would start threads of its own on each of ours
        np.copyto(buffer.numpy()[: len(source)], source)
        with torch.cuda.stream(stream):
            target.copy_(buffer[: len(source)], non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        ring[turn] = (buffer, event)
        turn = (turn + 1) % BUFFERS
