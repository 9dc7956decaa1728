"""Far pages that are on the compute device: those that a retrieval head read last, and those it may read next.

Queries of consecutive steps are alike, so a step mostly picks the pages of the step before it and some that came close
then. A `ResidentPages` keeps a number of pages per head, the least recently wanted ones making room, and brings the
runners-up of a step from the archive while the other layers compute, on a stream of its own: the GPU reads page-locked
pages itself, others are gathered by a thread on the host. The step that asks then finds them here. What it does not find it
fetches itself: a prediction that was wrong costs time and changes nothing.

This module does not know how pages are picked, nor where the archive is. Pages are numbered as a head counts them, so a
number means the same tokens for as long as no tokens are taken back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from .cold_pools import HostPool, fetch_pages, read_by_device
from .pool import PagePool, _is_out_of_memory, upload

__all__ = ["FetchCounts", "ResidentPages"]

_workers: dict[torch.device, tuple[ThreadPoolExecutor, torch.cuda.Stream | None]] = {}
_workers_lock = threading.Lock()


def _after_fork() -> None:
    """Threads do not survive in a child process, which starts its own; the lock may have been held by one of them."""
    global _workers_lock
    _workers_lock = threading.Lock()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_KEPT = np.iinfo(np.int64).max


@dataclass
class FetchCounts:
    """What retrieval heads asked for in decode steps, in pages of one head.

    Attributes:
        asked: far pages that steps read.
        found: of these, how many were on the device, or on their way to it, when the step asked.
        late: of these, how many the step itself had to fetch.
        ahead: pages that were fetched before a step asked, whether one did afterwards or not.
        moved: bytes of keys and values that came from the archive for decode steps.
    """

    asked: int = 0
    found: int = 0
    late: int = 0
    ahead: int = 0
    moved: int = 0

    def __add__(self, other: FetchCounts) -> FetchCounts:
        return FetchCounts(
            self.asked + other.asked,
            self.found + other.found,
            self.late + other.late,
            self.ahead + other.ahead,
            self.moved + other.moved,
        )

    def __str__(self) -> str:
        share = f" ({self.found / self.asked:.1%} found on the device)" if self.asked else ""
        return (
            f"far pages: {self.asked:,} asked for{share}, {self.late:,} fetched late, {self.ahead:,} ahead, "
            f"{self.moved:,} bytes moved"
        )


class ResidentPages:
    """Pages of the retrieval heads of one layer and row.

    Args:
        heads: how many heads.
        page_size, key_dim, value_dim, dtype: of the pages.
        device: where they are kept.
    """

    def __init__(
        self, heads: int, page_size: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.heads, self.slots, self.device = heads, 0, device
        self.k = self._room(0, page_size, key_dim, dtype)
        self.v = self._room(0, page_size, value_dim, dtype)
        self._slot_of = np.full((heads, 0), -1, np.int64)  # of every page, -1 if it is not here
        self._page_in = np.full((heads, 0), -1, np.int64)  # of every slot
        self._wanted_at = np.zeros((heads, 0), np.int64)
        self._clock = 0
        self._coming: tuple[Future, np.ndarray, np.ndarray] | None = None  # job, heads, pages
        self._process = os.getpid()  # whose thread that is

    def _room(self, slots: int, size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(False):  # steps of any mode write into it
            return torch.empty(self.heads, slots, size, dim, dtype=dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    # ------------------------------------------------------------------------------------------------- a step
    def look(self, wanted: np.ndarray, slots: int) -> np.ndarray:
        """Begin a step that reads the pages ``wanted`` (bool ``[heads, pages]``); returns those that are not here.

        Args:
            slots: pages to keep per head from now on, if there are so many; never fewer than the step reads.
        """
        self._arrive()
        pages = wanted.shape[1]
        if pages > self._slot_of.shape[1]:
            more = np.full((self.heads, pages - self._slot_of.shape[1] + 64), -1, np.int64)
            self._slot_of = np.concatenate([self._slot_of, more], 1)
        need, goal = int(wanted.sum(1).max(initial=0)), min(slots, pages)
        if need > self.slots or goal > self.slots + self.slots // 4:  # not for every page that the context gets
            self._grow(max(need, goal))
        self._clock += 1
        return self.look_for(wanted)

    def look_for(self, pages: np.ndarray) -> np.ndarray:
        """Those of ``pages`` (bool ``[heads, pages]``) that are not here; those that are, are not the next to go."""
        slot = self._slot_of[:, : pages.shape[1]]
        head, page = np.nonzero(pages & (slot >= 0))
        self._wanted_at[head, slot[head, page]] = self._clock
        return pages & (slot < 0)

    def _grow(self, slots: int) -> None:
        for name in ("k", "v"):
            old = getattr(self, name)
            new = self._room(slots, old.shape[2], old.shape[3], old.dtype)
            new[:, : self.slots] = old
            setattr(self, name, new)
        more = slots - self.slots
        self._page_in = np.concatenate([self._page_in, np.full((self.heads, more), -1, np.int64)], 1)
        self._wanted_at = np.concatenate([self._wanted_at, np.zeros((self.heads, more), np.int64)], 1)
        self.slots = slots

    def place(self, new: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give slots to the pages ``new`` (bool ``[heads, pages]``), taking them from pages that are not in ``keep``.

        Returns:
            Heads, pages and slots of the new ones, int64 ``[n]``. Those for which there is no slot are left out.
        """
        pages = keep.shape[1]
        here = self._page_in >= 0
        inside = np.take_along_axis(keep, np.clip(self._page_in, 0, pages - 1), 1)
        kept = here & (self._page_in < pages) & inside  # after a crop there may be pages that are not far any more
        age = np.where(kept, _KEPT, np.where(here, self._wanted_at, -1))
        order = np.argsort(age, axis=1, kind="stable")
        head, page = np.nonzero(new)
        nth = (new.cumsum(1) - 1)[head, page]
        fits = nth < (age < _KEPT).sum(1)[head]
        head, page = head[fits], page[fits]
        slot = order[head, nth[fits]]
        gone = self._page_in[head, slot]
        self._slot_of[head[gone >= 0], gone[gone >= 0]] = -1
        self._page_in[head, slot] = page
        self._slot_of[head, page] = slot
        self._wanted_at[head, slot] = self._clock
        return head, page, slot

    def fill(self, head: np.ndarray, slot: np.ndarray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Pages ``[n, page_size, dim]`` into slots."""
        index = upload(head * self.slots + slot, self.device)
        for half, pages in ((self.k, k), (self.v, v)):
            half.flatten(0, 1).index_copy_(0, index, pages)

    def fill_from(self, source: HostPool, numbers: np.ndarray, placed: tuple[np.ndarray, ...]) -> None:
        """Pages ``numbers`` (int64 ``[n]``) of a pool that this device reads into the slots ``placed``, as `place` gave them."""
        fetch_pages(source, numbers, self.k.flatten(0, 1), self.v.flatten(0, 1), placed[0] * self.slots + placed[2])

    def read(self, heads: np.ndarray, pages: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages ``[h, n]`` of ``heads [h]``, all of them here: two ``[1, h, n * page_size, dim]``."""
        slot = self._slot_of[heads[:, None], pages] + heads[:, None] * self.slots
        index = upload(slot.ravel(), self.device)
        shape = (1, len(heads), pages.shape[1] * self.k.shape[2], -1)
        return (
            self.k.flatten(0, 1).index_select(0, index).view(shape),
            self.v.flatten(0, 1).index_select(0, index).view(shape),
        )

    # ------------------------------------------------------------------------------------------------- ahead
    def bring(
        self,
        source: PagePool,
        numbers: np.ndarray,
        placed: tuple[np.ndarray, ...],
        way: str = "thread",
    ) -> None:
        """Begin to copy pages ``numbers`` (int64 ``[n]``) of a pool into the slots ``placed``, as `place` gave them.

        Whatever the stream of this device was told to do before is done first, so slots that it still reads are safe.

        Args:
            way: ``"thread"``, where the device does not read the pool itself; ``"now"``: at once, as nothing would overlap.
        """
        head, page, slot = placed
        ready = stream = None
        if way != "now":
            worker, stream = _worker_of(self.device)
        if stream is not None:
            for half in (self.k, self.v):
                half.record_stream(stream)  # its memory must not be given away before the copy is done
            ready = torch.cuda.current_stream(self.device).record_event()
        work: Callable[[], torch.cuda.Event | None]
        if stream is not None and ready is not None and read_by_device(source, self.device):
            way, work = "now", partial(self._read_by_device, source, numbers, placed, stream, ready)
        else:
            slabs, halves = (source.k, source.v), (self.k.flatten(0, 1), self.v.flatten(0, 1))
            into = torch.from_numpy(head * self.slots + slot)
            work = partial(_copy, slabs, torch.from_numpy(numbers), halves, into, stream, ready)
        if way == "thread":
            done, self._process = worker.submit(work), os.getpid()
        else:
            done = Future()
            try:
                done.set_result(work())
            except Exception as error:  # `_arrive` raises it, if it is not for want of memory
                done.set_exception(error)
        self._coming = done, head, page

    def _read_by_device(
        self,
        source: HostPool,
        numbers: np.ndarray,
        placed: tuple[np.ndarray, ...],
        stream: torch.cuda.Stream,
        ready: torch.cuda.Event,
    ) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            self.fill_from(source, numbers, placed)
            return stream.record_event()

    def _arrive(self) -> None:
        """Wait for what was fetched ahead; usually it has come long ago."""
        if self._coming is None:
            return
        (job, head, page), self._coming = self._coming, None
        try:
            if not job.done() and self._process != os.getpid():
                raise MemoryError("the thread that fetched is in the process that this one was forked from")
            done = job.result()
        except BaseException as error:
            self.forget(head, page)
            if not isinstance(error, Exception) or not _is_out_of_memory(error):
                raise
            return
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)

    def forget(self, head: np.ndarray, page: np.ndarray) -> None:
        """As if these had never been placed: nobody may read what did not come."""
        slot = self._slot_of[head, page]
        self._page_in[head, slot] = self._slot_of[head, page] = -1

    def forget_from(self, page: int) -> None:
        """Forget the pages from this one on: their tokens are taken back."""
        self._arrive()
        self._slot_of[:, page:] = -1
        self._page_in[self._page_in >= page] = -1


def _worker_of(device: torch.device) -> tuple[ThreadPoolExecutor, torch.cuda.Stream | None]:
    with _workers_lock:
        if device not in _workers:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            _workers[device] = ThreadPoolExecutor(1, thread_name_prefix="redknot-fetch"), stream
        return _workers[device]


def _copy(
    slabs: tuple[torch.Tensor, torch.Tensor],
    numbers: torch.Tensor,
    halves: tuple[torch.Tensor, torch.Tensor],
    into: torch.Tensor,
    stream: torch.cuda.Stream | None,
    ready: torch.cuda.Event | None,
) -> torch.cuda.Event | None:
    """In the thread: gather pages on the host and carry them to their slots. Returns when they will be there."""
    with torch.inference_mode():
        if stream is None:
            for slab, half in zip(slabs, halves, strict=True):
                half.index_copy_(0, into, slab.index_select(0, numbers))
            return None
        with torch.cuda.stream(stream):
            assert ready is not None
            stream.wait_event(ready)
            where = into.pin_memory().to(stream.device, non_blocking=True)
            for slab, half in zip(slabs, halves, strict=True):
                staged = torch.empty(len(numbers), *slab.shape[1:], dtype=slab.dtype, pin_memory=True)
                torch.index_select(slab, 0, numbers, out=staged)
                half.index_copy_(0, where, staged.to(stream.device, non_blocking=True))
            return stream.record_event()
