"""Entries on their way from host memory to a GPU, the first layers of all of them first.

A forward needs layer after layer, so it can start when the first layers are there. Several threads take pieces of the
entries in the order of the layers, copy each into page-locked memory, send it off, and hash it there while it is on its
way, where it has to be hashed: what the GPU gets is what was hashed, and the bytes are read from their file once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from .codec import PIECE_BYTES, PendingCheck, SegmentEntry

__all__ = ["Upload"]

WORKERS = 16
BUFFERS = 3  # of each worker: one is filled while the others are on their way


class _Piece(NamedTuple):
    layer: int  # the first that has bytes in it
    entry: int
    leaf: int  # its number in the entry's checksum
    source: np.ndarray | torch.Tensor  # a tensor if it is page-locked already
    target: torch.Tensor


class Upload:
    """Copies of the entries' tensors on ``device``.

    Args:
        entries: whole entries with ``extra["groups"]``; see `entry`.

    Attributes:
        stacks: per entry its tensors on the device. Those of layer ``l`` may be used after ``need(l)``.
        verdicts: per entry a future that ends when its bytes have been hashed, with `CorruptEntry` if they are damaged;
            None for an entry without a pending check, and for all entries where there is no GPU.
    """

    def __init__(self, entries: Sequence[SegmentEntry], device: torch.device | str):
        self.device = torch.device(device)
        self.stacks: list[dict[str, torch.Tensor]] = []
        self.verdicts: list[Future[None] | None] = [None] * len(entries)
        self._pool: ThreadPoolExecutor | None = None
        if not _is_gpu(self.device):
            self.stacks = [{n: t.to(self.device) for n, t in entry.tensors.items()} for entry in entries]
            return
        pieces: list[_Piece] = []
        self._checks: list[PendingCheck | None] = []
        for number, entry in enumerate(entries):
            self.stacks.append({})
            for name, tensor in entry.tensors.items():
                target = tensor.to(self.device) if tensor.is_cuda else torch.empty_like(tensor, device=self.device)
                self.stacks[-1][name] = target
                if not tensor.is_cuda:
                    pieces += _cut(number, entry, name, target)
            self._checks.append(None)
            if entry.check is not None and not any(t.is_cuda or t.is_pinned() for t in entry.tensors.values()):
                self.verdicts[number], self._checks[number] = Future(), entry.check
        if pieces:
            self._start(pieces)

    def _start(self, pieces: list[_Piece]) -> None:
        pieces.sort(key=lambda piece: piece.layer, reverse=True)  # taken from the end
        self._pieces = pieces
        self._left = np.zeros(1 + max(piece.layer for piece in pieces), np.int64)
        self._hashes: list[dict[int, bytes]] = [{} for _ in self._checks]
        self._unhashed = np.zeros(len(self._checks), np.int64)
        for piece in pieces:
            self._left[piece.layer] += 1
            self._unhashed[piece.entry] += 1
        self._ready = threading.Condition()
        self._error: BaseException | None = None
        self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have been somebody else's
        workers = max(1, min(WORKERS, (os.cpu_count() or 1) - 1, len(pieces)))
        self._pool = ThreadPoolExecutor(workers)
        self._workers = [self._pool.submit(self._work) for _ in range(workers)]

    def need(self, layer: int) -> None:
        """Make the current stream wait for everything up to ``layer``; waits itself until that has been sent."""
        if self._pool is None:
            return
        with self._ready:
            self._ready.wait_for(lambda: self._error is not None or not self._left[: layer + 1].any())
            if self._error is not None:
                raise self._error
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def close(self) -> None:
        """Wait for all that is under way. Must be called before the tensors are given back."""
        if self._pool is None:
            return
        with self._ready:
            self._pieces.clear()
        self._pool.shutdown(wait=True)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._pool = None

    def finish(self) -> Upload:
        """Wait until everything is there."""
        if self._pool is not None:
            self.need(len(self._left))
            self.close()
        return self

    # ------------------------------------------------------------------------------------------- on the workers
    def _work(self) -> None:
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                self._send()
        except BaseException as error:
            with self._ready:
                self._error = error
                self._ready.notify_all()
            for verdict in self.verdicts:
                if verdict is not None and not verdict.done():
                    verdict.set_exception(error)

    def _send(self) -> None:
        ring: list[tuple[torch.Tensor, np.ndarray, torch.cuda.Event]] = []
        turn = 0
        while True:
            try:
                piece = self._pieces.pop()
            except IndexError:
                return
            size = len(piece.source)
            if isinstance(piece.source, torch.Tensor):
                piece.target.copy_(piece.source, non_blocking=True)
                self._sent(piece)
                continue
            if len(ring) < BUFFERS:
                buffer = _page_locked(PIECE_BYTES)
                ring.append((buffer, buffer.numpy(), torch.cuda.Event()))
                turn = len(ring) - 1
            else:
                turn = (turn + 1) % BUFFERS
                ring[turn][2].synchronize()
            buffer, content, event = ring[turn]
            # numpy copies on this thread, without the GIL; torch would start threads of its own on each of ours
            np.copyto(content[:size], piece.source)
            piece.target.copy_(buffer[:size], non_blocking=True)
            event.record()
            self._sent(piece)
            check = self._checks[piece.entry]
            if check is not None:
                self._hash(check, piece.entry, piece.leaf, content[:size])

    def _sent(self, piece: _Piece) -> None:
        with self._ready:
            self._left[piece.layer] -= 1
            if not self._left[piece.layer]:
                self._ready.notify_all()

    def _hash(self, check: PendingCheck, entry: int, leaf: int, content: np.ndarray) -> None:
        digest = check.leaf(content)
        with self._ready:
            self._hashes[entry][leaf] = digest
            self._unhashed[entry] -= 1
            last = not self._unhashed[entry]
        if last:
            verdict = self.verdicts[entry]
            assert verdict is not None
            self._checks[entry] = None  # it holds the entry's file mapped
            try:
                check.compare([self._hashes[entry][i] for i in range(len(self._hashes[entry]))])
                verdict.set_result(None)
            except BaseException as error:
                verdict.set_exception(error)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _page_locked(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)  # torch keeps it for the next time


def _cut(number: int, entry: SegmentEntry, name: str, target: torch.Tensor) -> list[_Piece]:
    """The pieces of a tensor, as its checksum counts them."""
    tensor = entry.tensors[name].detach().contiguous()
    bytes_of, sink = tensor.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
    source = bytes_of if tensor.is_pinned() else bytes_of.numpy()
    group = int(name.partition(".")[2])
    layers = [layer for layer, g in enumerate(entry.extra["groups"]) if g == group]
    first_leaf = 0 if entry.check is None else entry.check.first_leaf(name)
    return [
        _Piece(
            layers[begin * len(layers) // len(source)],
            number,
            first_leaf + i,
            source[begin : begin + PIECE_BYTES],
            sink[begin : begin + PIECE_BYTES],
        )
        for i, begin in enumerate(range(0, len(source), PIECE_BYTES))
    ]
