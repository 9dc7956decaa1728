"""Entries on their way from host memory or files to a GPU, the first layers of all of them first.

A forward needs layer after layer, so it can start when the first layers are there. Several threads take runs of bytes in
the order of the layers, read each into page-locked memory and send it off. What has to be hashed is hashed on the GPU
when all of it is there, beside the forward, or by the thread that read it where the GPU cannot: what is used is what was
hashed, and the bytes are read once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from . import sha256_kernel
from .codec import PIECE_BYTES, CorruptEntry, FileSource, PendingCheck, SegmentEntry

__all__ = ["Upload"]

logger = logging.getLogger(__name__)

WORKERS = 16  # where they hash
READERS = 8  # where they only read: more are no quicker, and take the interpreter's lock from who launches the forward
BATCH = 4  # runs that a worker reads and sends together, to let the interpreter's lock go less often
# Batches of each worker: one is filled while the other is on its way. With eight workers that is 512 MB of page-locked
# memory at most, which torch keeps for the next time; loads of few runs take less.
BUFFERS = 2
# Read and sent at a time, a multiple of PIECE_BYTES. Larger runs leave the interpreter's lock to the thread that launches
# the forward, smaller ones bring the first layer sooner.
RUN_BYTES = 8 << 20


class _Run(NamedTuple):
    layer: int  # the first that has bytes in it
    entry: int
    leaf: int  # the number of its first piece in the entry's checksum
    size: int
    source: np.ndarray | torch.Tensor | None  # a tensor if it is page-locked already
    file: FileSource | None  # read this from `offset` on instead of a source
    offset: int
    target: torch.Tensor


class _Slot:
    """Page-locked memory for a batch of runs, and the event behind which it is free again."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, np.ndarray]] = []
        self.event = torch.cuda.Event()

    def wait(self) -> None:
        if not self.event.query():  # which keeps the interpreter's lock, and is nearly always enough
            self.event.synchronize()

    def take(self, place: int, size: int) -> tuple[torch.Tensor, np.ndarray]:
        if place == len(self.buffers):
            buffer = _page_locked(RUN_BYTES)
            self.buffers.append((buffer, buffer.numpy()))
        buffer, content = self.buffers[place]
        return (buffer, content) if size == RUN_BYTES else (buffer[:size], content[:size])


class Upload:
    """Copies of the entries' tensors on ``device``.

    Args:
        entries: whole entries with ``extra["groups"]``; see `entry`.

    Attributes:
        stacks: per entry its tensors on the device. Those of layer ``l`` may be used after ``need(l)``.
        verdicts: per entry a future that ends when its bytes have been read and hashed, with `CorruptEntry` if they are
            damaged; None for an entry that nothing is left to say about, and for all entries where there is no GPU.
    """

    def __init__(self, entries: Sequence[SegmentEntry], device: torch.device | str):
        self.device = torch.device(device)
        self.stacks: list[dict[str, torch.Tensor]] = []
        self.verdicts: list[Future[None] | None] = [None] * len(entries)
        self._pool: ThreadPoolExecutor | None = None
        if not _is_gpu(self.device):
            self.stacks = [{n: t.to(self.device) for n, t in entry.tensors.items()} for entry in entries]
            return
        runs: list[_Run] = []
        self._ready = threading.Condition()
        self._checks: dict[int, PendingCheck] = {}  # hashed by the threads that read
        self._checks_on_gpu: dict[int, PendingCheck] = {}
        for number, entry in enumerate(entries):
            self.stacks.append({})
            for name, tensor in entry.tensors.items():
                target = tensor.to(self.device) if tensor.is_cuda else torch.empty_like(tensor, device=self.device)
                self.stacks[-1][name] = target
                if not tensor.is_cuda:
                    runs += _cut(number, entry, name, target)
            if any(t.is_cuda or t.is_pinned() for t in entry.tensors.values()):
                continue
            if entry.check is not None or entry.source is not None:
                self.verdicts[number] = Future()
            if entry.check is not None:
                on_gpu = all(sha256_kernel.serves(t) for t in self.stacks[-1].values())
                on_gpu = on_gpu and sha256_kernel.ready(self.device)
                (self._checks_on_gpu if on_gpu else self._checks)[number] = entry.check
        moving = {run.entry for run in runs}
        for number, verdict in enumerate(self.verdicts):
            if verdict is not None and number not in moving:  # its tensors are empty: no worker will ever speak of it
                check = self._checks.pop(number, None) or self._checks_on_gpu.pop(number, None)
                self._compare(number, check, [])
        if runs:
            self._start(runs, len(entries))

    def _start(self, runs: list[_Run], entries: int) -> None:
        runs.sort(key=lambda run: run.layer, reverse=True)  # taken from the end
        self._runs = runs
        self._left = [0] * (1 + max(run.layer for run in runs))
        self._of_entry = [0] * entries  # runs that have not been read and hashed
        self._hashes: list[dict[int, bytes]] = [{} for _ in range(entries)]
        for run in runs:
            self._left[run.layer] += 1
            self._of_entry[run.entry] += 1
        self._hashed_on_gpu = frozenset(self._checks_on_gpu)  # who sends may look here after the last check has begun
        self._error: BaseException | None = None
        self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have been somebody else's
        workers = max(1, min(WORKERS if self._checks else READERS, (os.cpu_count() or 1) - 1, len(runs)))
        self._count = workers
        self._pool = ThreadPoolExecutor(workers)
        self._workers = [self._pool.submit(self._work) for _ in range(workers)]

    def need(self, layer: int) -> None:
        """Make the current stream wait for everything up to ``layer``; waits itself until that has been sent."""
        if self._pool is None:
            return
        with self._ready:
            self._ready.wait_for(lambda: self._error is not None or not any(self._left[: layer + 1]))
            if self._error is not None:
                raise self._error
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def close(self) -> None:
        """Wait for all that is under way. Must be called before the tensors are given back."""
        if self._pool is None:
            return
        with self._ready:
            self._runs.clear()
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
                if self._send() and self._checks_on_gpu:
                    try:
                        self._hash_on_gpu()
                    except Exception as error:
                        logger.warning("hashing on the GPU failed, hashing here: %s: %s", type(error).__name__, error)
                        self._hash_copies()
        except BaseException as error:
            with self._ready:
                self._error = error
                self._ready.notify_all()
            for number in range(len(self.verdicts)):
                self._judge(number, error)

    def _send(self) -> bool:
        """Whether this worker has sent the last run of all."""
        ring: list[_Slot] = []
        turn, last = 0, False
        while True:
            batch = self._next()
            if not batch:
                return last
            targets: list[torch.Tensor] = []
            sources: list[torch.Tensor] = []
            for run in batch:
                if isinstance(run.source, torch.Tensor):
                    targets.append(run.target)
                    sources.append(run.source)
            unlocked = [run for run in batch if not isinstance(run.source, torch.Tensor)]
            contents: list[np.ndarray] = []
            slot = None
            if unlocked:
                if len(ring) < BUFFERS:
                    ring.append(_Slot())
                    turn = len(ring) - 1
                else:
                    turn = (turn + 1) % BUFFERS
                slot = ring[turn]
                slot.wait()
                for place, run in enumerate(unlocked):
                    buffer, content = slot.take(place, run.size)
                    if run.file is not None:
                        self._read(run, run.file, content.data)
                    else:
                        # numpy copies on this thread, without the GIL; torch would start threads of its own on each of ours
                        np.copyto(content, run.source)  # type: ignore[arg-type]
                    targets.append(run.target)
                    sources.append(buffer)
                    contents.append(content)
            # one call for all: whoever launches the forward waits for the interpreter's lock each time it is let go here
            torch._foreach_copy_(targets, sources, non_blocking=True)
            if slot is not None:
                slot.event.record()
            last = self._sent(batch)
            for run, content in zip(unlocked, contents, strict=True):
                self._done(run, content)

    def _next(self) -> list[_Run]:
        """Runs that one layer waits for, so that none waits for later ones; few where all workers would not get some."""
        batch: list[_Run] = []
        with self._ready:
            if self._runs:
                layer = self._runs[-1].layer
                most = max(1, min(BATCH, self._left[layer] // self._count))
                while self._runs and len(batch) < most and self._runs[-1].layer == layer:
                    batch.append(self._runs.pop())
        return batch

    def _read(self, run: _Run, file: FileSource, into: memoryview) -> None:
        done = 0
        try:
            while done < len(into):
                count = os.preadv(file.file.fileno(), [into[done:]], run.offset + done)
                if not count:
                    raise OSError(f"it has shrunk: {run.offset + done} bytes")
                done += count
        except OSError as error:  # a miss, like any other damage
            self._judge(run.entry, CorruptEntry(f"it cannot be read: {error}"))

    def _sent(self, batch: Sequence[_Run]) -> bool:
        with self._ready:
            for run in batch:
                self._left[run.layer] -= 1
            if not all(self._left[run.layer] for run in batch):
                self._ready.notify_all()
            return not any(self._left)

    def _done(self, run: _Run, content: np.ndarray) -> None:
        """Read and sent; here it is hashed if that is not for the GPU to do."""
        if run.entry in self._hashed_on_gpu:
            return
        check = self._checks.get(run.entry)
        hashes = check.leaves(content) if check is not None else ()
        with self._ready:
            self._hashes[run.entry].update(enumerate(hashes, run.leaf))
            self._of_entry[run.entry] -= 1
            last = not self._of_entry[run.entry]
        if not last:
            return
        leaves = self._hashes[run.entry]
        self._checks.pop(run.entry, None)  # it holds the entry's file mapped
        self._compare(run.entry, check, [leaves[i] for i in range(len(leaves))])

    def _hash_on_gpu(self) -> None:
        checks = dict(self._checks_on_gpu)
        tensors = [self.stacks[number][name] for number, check in checks.items() for name in check.names]
        stream = torch.cuda.Stream(self.device, priority=-1)  # a few milliseconds, which somebody waits for
        stream.wait_stream(self._stream)
        with torch.cuda.stream(stream):
            words = sha256_kernel.sha256(tensors, PIECE_BYTES)
            found = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            found.copy_(words, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        event.synchronize()
        leaves = sha256_kernel.digests(found)
        self._checks_on_gpu.clear()
        at = 0
        for number, check in checks.items():
            size = 32 * sum(-(-view.nbytes // PIECE_BYTES) for view in check.views)
            self._compare(number, check, [leaves[at : at + size]])
            at += size

    def _hash_copies(self) -> None:
        """What the GPU could not hash: the bytes that are used, brought back."""
        for number, check in dict(self._checks_on_gpu).items():
            leaves: list[bytes] = []
            for name in check.names:
                leaves += check.leaves(self.stacks[number][name].cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._compare(number, check, leaves)
        self._checks_on_gpu.clear()

    def _compare(self, entry: int, check: PendingCheck | None, leaves: list[bytes]) -> None:
        error: BaseException | None = None
        try:
            if check is not None:
                check.compare(leaves)
        except BaseException as damage:
            error = damage
        self._judge(entry, error)

    def _judge(self, entry: int, error: BaseException | None) -> None:
        """The first word about an entry counts."""
        verdict = self.verdicts[entry]
        with self._ready:
            if verdict is None or verdict.done():
                return
            if error is None:
                verdict.set_result(None)
            else:
                verdict.set_exception(error)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _page_locked(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)  # torch keeps it for the next time


def _cut(number: int, entry: SegmentEntry, name: str, target: torch.Tensor) -> list[_Run]:
    """The runs of a tensor; each begins with a piece of its checksum."""
    targets = target.view(-1).view(torch.uint8).split(RUN_BYTES)
    tensor = entry.tensors[name]
    pinned = tensor.is_pinned()
    file = None if pinned else entry.source
    offset = 0 if file is None else file.offsets[name]
    sources: Sequence[np.ndarray | torch.Tensor | None] = [None] * len(targets)
    if file is None:
        pieces = tensor.detach().contiguous().view(-1).view(torch.uint8).split(RUN_BYTES)
        sources = pieces if pinned else [piece.numpy() for piece in pieces]
    total = target.nbytes
    group = int(name.partition(".")[2])
    layers = [layer for layer, g in enumerate(entry.extra["groups"]) if g == group]
    first_leaf = 0 if entry.check is None else entry.check.first_leaf(name)
    return [
        _Run(
            layers[begin * len(layers) // total],
            number,
            first_leaf + begin // PIECE_BYTES,
            min(RUN_BYTES, total - begin),
            source,
            file,
            offset + begin,
            sink,
        )
        for begin, source, sink in zip(range(0, total, RUN_BYTES), sources, targets, strict=False)
    ]
