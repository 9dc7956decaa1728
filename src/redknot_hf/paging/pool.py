"""The page pool: two slabs of pages and a reference count for each page.

A page holds ``page_size`` tokens of one KV head. The pool knows nothing of heads, layers or positions: it hands out
page numbers, counts who holds them, and takes them back. Page 0 is a scratch page that is never handed out; unused
page-table entries point at it, so that reading them is always in bounds.

Pages are zero when they are handed out. Attention multiplies the values of masked slots by a probability of zero,
and zero times a stale NaN or Inf would still be NaN.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import torch

from ..errors import PoolExhausted

# Growing copies the slabs, so there is room for more than the pages asked for: for about so many tokens, and at most
# an eighth of what the pool had.
SPARE_TOKENS = 1024
SPARE_SHARE = 8
ONE = np.int32(1)  # of the counts' own type: with another one, `ufunc.at` takes 25 times as long


def upload(values: np.ndarray, device: torch.device, dtype: type[np.generic] | None = None) -> torch.Tensor:
    """``values`` on ``device``, as ``dtype`` if given; the host does not wait for the device.

    (CUDA stages pageable memory before it returns.) On the CPU they may share memory.
    """
    if dtype is not None:
        values = np.ascontiguousarray(values, dtype)
    return torch.from_numpy(values).to(device, non_blocking=True)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)  # page-locked memory that cannot be had is a plain "CUDA error: out of memory"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "alloc" in text or "out of memory" in text


def _free_bytes(device: torch.device) -> str:
    """What a message can say about the memory that is left."""
    if device.type == "cuda":
        return f"{torch.cuda.mem_get_info(device)[0]:,} are free"
    return "the host has less"


def _no_room_to_grow(device: torch.device, old: int, new: int, size: int) -> PoolExhausted:
    return PoolExhausted(
        f"no memory on {device} to grow the page pool from {old} to {new} pages ({size:,} bytes, {_free_bytes(device)}): "
        "use a profile with fewer global heads, a shorter context or a smaller batch, or reset() caches that are no longer "
        "needed"
    )


class PoolCeiling:
    """The most bytes that the slabs of some pools may take together; while one of them grows, half of it is there twice.

    Attributes:
        max_bytes: None for as much as there is. May be changed at any time; pools that take more already stay as they are.
    """

    def __init__(self, max_bytes: int | None = None):
        self.max_bytes = max_bytes
        self.lock = threading.RLock()  # taken by a pool that holds its own lock, never the other way round
        self._pools: weakref.WeakSet[PagePool] = weakref.WeakSet()
        # bytes that pools which grow now will have, so that one on another thread does not count on them, too
        self._promised: dict[int, int] = {}

    @property
    def held(self) -> int:
        """Bytes of all pools, those that grow now counted as grown."""
        with self.lock:
            pools = {id(pool): pool.allocated_bytes for pool in list(self._pools)}
            return sum(max(pools.get(name, 0), self._promised.get(name, 0)) for name in {*pools, *self._promised})

    @contextlib.contextmanager
    def beginning(self, pool: PagePool, size: int) -> Iterator[None]:
        """While ``pool``, which is new, takes its first ``size`` bytes; it has joined the others afterwards.

        Raises:
            PoolExhausted: they may not be taken.
        """
        with self.lock:
            self.check(size)
            self._promised[id(pool)] = size
        try:
            yield
            with self.lock:
                self._pools.add(pool)
        finally:
            with self.lock:
                del self._promised[id(pool)]

    @contextlib.contextmanager
    def growing(self, pool: PagePool, needed: int, wanted: int) -> Iterator[int]:
        """While ``pool`` grows to that many pages: ``wanted``, or fewer if others could not have as many more then.

        Raises:
            PoolExhausted: not even the ``needed`` ones may be taken.
        """
        with self.lock:
            rows = self._rows(pool, needed, wanted)
            self._promised[id(pool)] = rows * pool.page_bytes
        try:
            yield rows
        finally:
            with self.lock:
                del self._promised[id(pool)]

    def _rows(self, pool: PagePool, needed: int, wanted: int) -> int:
        if self.max_bytes is None:
            return wanted
        there = pool.allocated_bytes // pool.page_bytes
        room = max(0, self.max_bytes - self.held) // pool.page_bytes
        if needed > there + room:
            self._refuse((needed - there) * pool.page_bytes)
        more = max(needed - there, 0)
        return max(needed, min(wanted, there + max(more, room // max(1, len(self._pools)))))

    def check(self, more: int) -> None:
        """Raise unless ``more`` bytes may be taken now.

        Raises:
            PoolExhausted: they may not.
        """
        if self.max_bytes is not None and more > max(0, self.max_bytes - self.held):
            self._refuse(more)

    def join(self, pool: PagePool) -> None:
        with self.lock:
            self._pools.add(pool)

    def _refuse(self, more: int) -> NoReturn:
        raise PoolExhausted(
            f"max_bytes={self.max_bytes:,} of this cache are reached: its page pools take {self.held:,} bytes and need "
            f"{more:,} more. Nothing that is stored is lost: set cache.max_bytes higher, release forks that share its "
            "pages, or go on in a new cache with a profile with fewer global heads or a shorter context"
        )


class PagePool:
    """Pages of one (device, dtype, head_dim).

    Args:
        page_size: tokens per page, a power of two.
        key_dim, value_dim: channels of a key and of a value.
        dtype, device: of both slabs.
        capacity: number of usable pages if the pool must not grow; ``None`` for a pool that grows.
        ceiling: what the pool and others may take together.
        room: usable pages that a pool which grows begins with: one that grew to them would be filled and copied.

    Attributes:
        k: ``[num_pages, page_size, key_dim]``; v: ``[num_pages, page_size, value_dim]``. The tensors are replaced when
            the pool grows: fetch them anew at each use.
        refs: int32 ``[num_pages]`` on the host, the number of page-table entries that hold each page.
        both_at_once: take both larger slabs before an old one goes. Takes more room while growing, and leaves nothing behind
            when there is none.
        lock: held while pages are written or handed out; forks on other threads share the pool.
    """

    both_at_once = False

    def __init__(
        self,
        page_size: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None = None,
        ceiling: PoolCeiling | None = None,
        room: int = 0,
    ):
        self.page_size, self.capacity, self.ceiling = page_size, capacity, ceiling
        self.lock = threading.RLock()
        rows = 1 + (room if capacity is None else capacity)
        size = rows * page_size * (key_dim + value_dim) * dtype.itemsize
        claim = contextlib.nullcontext() if ceiling is None else ceiling.beginning(self, size)
        try:
            with claim:
                self.k = self._slab(rows, key_dim, dtype, device)
                self.v = self._slab(rows, value_dim, dtype, device)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self.__dict__.pop("k", None)  # the error's traceback would hold on to half of it
            if capacity is None and room:
                raise _no_room_to_grow(device, 1, rows, size) from error
            raise PoolExhausted(
                f"no memory on {device} for {rows} pages of fixed memory "
                f"({size:,} bytes, {_free_bytes(device)}): use a "
                "smaller max_cache_len or batch, or a profile with fewer global heads"
            ) from error
        self.refs = np.zeros(rows, np.int32)
        self.refs[0] = 1
        self.releases = 0  # how often references were dropped: whoever shares pages may be alone since
        self._used = np.zeros(rows, bool)  # handed out before, so possibly not zero
        self._spare = np.zeros(rows, bool)  # free, and kept for the run before it while other pages are left

    def _slab(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        with torch.inference_mode(False):  # forwards of any mode write into it
            return torch.zeros(rows, self.page_size, dim, dtype=dtype, device=device)

    @property
    def num_pages(self) -> int:
        return len(self.refs)

    @property
    def num_free(self) -> int:
        return int(np.count_nonzero(self.refs == 0))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values together."""
        return self.page_size * (self.k.shape[2] * self.k.element_size() + self.v.shape[2] * self.v.element_size())

    @property
    def allocated_bytes(self) -> int:
        """Bytes of both slabs as the allocator holds them."""
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()

    @property
    def live_bytes(self) -> int:
        """Bytes of the pages that somebody holds."""
        return (self.num_pages - 1 - self.num_free) * self.page_bytes

    # ---------------------------------------------------------------------------------------------------- grow
    def reserve(self, count: int, spare: int | None = None) -> None:
        """Make sure that ``count`` more pages are free, growing the slabs if they may grow.

        Args:
            spare: pages to take on top when it has to grow. None: as many as if each of the ``count`` pages were a head's
                next one.

        Raises:
            PoolExhausted: the capacity is fixed and too small, or the device has no memory for larger slabs. Nothing
                has changed then.
        """
        with self.lock:  # forks on other threads count free pages and grow the slabs, too
            missing = count - self.num_free
            if missing <= 0:
                return
            if self.capacity is not None:
                raise PoolExhausted(
                    f"the page pool needs {count} free pages ({count * self.page_bytes:,} bytes) but only {self.num_free} "
                    f"({self.num_free * self.page_bytes:,} bytes) of its {self.capacity} are free; make max_cache_len larger, "
                    "the batch smaller, or release other caches first"
                )
            if spare is None:
                spare = count * (SPARE_TOKENS // self.page_size)
            needed = self.num_pages + missing
            wanted = needed + min(spare, self.num_pages // SPARE_SHARE)
            ceiling = self.ceiling
            claim = contextlib.nullcontext(wanted) if ceiling is None else ceiling.growing(self, needed, wanted)
            try:
                with claim as rows:
                    self._grow(rows)
                    return
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if rows <= needed:
                    raise _no_room_to_grow(self.k.device, self.num_pages, rows, rows * self.page_bytes) from error
            self.reserve(count, spare=0)  # what is needed may still fit

    def _grow(self, rows: int) -> None:
        """Larger slabs, one after the other, so that only one of them is there twice at any time."""
        grown = []
        for name in ("k", "v"):
            old = getattr(self, name)
            room = old.untyped_storage().nbytes() // (old[0].numel() * old.element_size())
            if room >= rows:  # this slab had grown before there was no memory for the other one
                new = old.as_strided((rows, *old.shape[1:]), old.stride())
            else:
                new = self._slab(rows, old.shape[2], old.dtype, old.device)
                new[: self.num_pages].copy_(old)
            grown.append(new)
            if not self.both_at_once:
                setattr(self, name, new[: self.num_pages])
        self.k, self.v = grown
        more = rows - self.num_pages
        self.refs = np.concatenate([self.refs, np.zeros(more, np.int32)])
        self._used = np.concatenate([self._used, np.zeros(more, bool)])
        self._spare = np.concatenate([self._spare, np.zeros(more, bool)])

    # ------------------------------------------------------------------------------------------------ hand out
    def alloc(self, count: int) -> np.ndarray:
        """``count`` zeroed pages with one reference each, int32 ``[count]``; pages kept for a run's growth come last."""
        with self.lock:
            self.reserve(count)
            free = np.flatnonzero((self.refs == 0) & ~self._spare)[:count]
            if len(free) < count:
                free = np.concatenate([free, np.flatnonzero((self.refs == 0) & self._spare)[: count - len(free)]])
            return self._take(free)

    def alloc_exact(self, pages: np.ndarray) -> bool:
        """Take exactly these pages if every one of them is free; otherwise take none and return False."""
        with self.lock:
            if pages.max(initial=0) >= self.num_pages or self.refs[pages].any():
                return False
            self._take(pages)
            return True

    def alloc_runs(self, runs: int, length: int, stride: int) -> np.ndarray:
        """``runs`` runs of ``length`` consecutive pages whose first pages lie ``stride`` pages apart.

        Such pages can be read as one strided view, without gathering. The ``stride - length`` pages behind each run stay
        free and are kept for it to grow into.

        Returns:
            int32 ``[runs, length]``.
        """
        with self.lock:
            want = runs * stride
            start = self._free_stretch(want)
            if start is None:
                if self.capacity is not None:  # no stretch is long enough: any pages will do
                    return self.alloc(runs * length).reshape(runs, length)
                taken = np.flatnonzero((self.refs != 0) | self._spare)
                tail = self.num_pages - 1 - int(taken[-1])
                self.reserve(self.num_free + want - tail)
                start = self._free_stretch(want)
                assert start is not None
            first = start + np.arange(runs)[:, None] * stride
            self._spare[first + np.arange(length, stride)] = True
            pages = first + np.arange(length)
            return self._take(pages.ravel()).reshape(runs, length)

    def _free_stretch(self, want: int) -> int | None:
        closed = np.ones(self.num_pages + 2, bool)
        closed[1:-1] = (self.refs != 0) | self._spare
        edges = np.flatnonzero(closed[1:] != closed[:-1])
        starts, ends = edges[::2], edges[1::2]
        fitting = np.flatnonzero(ends - starts >= want)
        return int(starts[fitting[0]]) if len(fitting) else None

    def _take(self, pages: np.ndarray) -> np.ndarray:
        index = pages.astype(np.int64)  # numpy would convert at each use
        dirty = index[self._used[index]]
        if len(dirty):
            where = upload(dirty, self.k.device)
            self.k.index_fill_(0, where, 0)
            self.v.index_fill_(0, where, 0)
        self.refs[index] = 1
        self._used[index] = True
        self._spare[index] = False
        return pages.astype(np.int32)

    # ------------------------------------------------------------------------------------------- share and free
    def share(self, pages: np.ndarray) -> None:
        """Add one reference for every entry of ``pages`` (entries may repeat; zeros are ignored)."""
        with self.lock:
            np.add.at(self.refs, pages[pages > 0], ONE)

    def release(self, pages: np.ndarray) -> None:
        """Drop one reference for every entry of ``pages``; pages without references are free again."""
        with self.lock:
            pages = pages[pages > 0]
            self.releases += 1
            np.subtract.at(self.refs, pages, ONE)
            behind = pages[self.refs[pages] == 0] + 1  # what was kept behind a run that is gone is anybody's
            behind = behind[behind < self.num_pages]
            behind = behind[self._spare[behind]]
            if len(behind):
                low = int(behind.min())
                ends = np.append(np.flatnonzero(~self._spare[low:]) + low, self.num_pages)
                for start, end in zip(behind, ends[np.searchsorted(ends, behind)], strict=True):
                    self._spare[start:end] = False

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages, keys and values."""
        with self.lock:
            src = upload(source.astype(np.int64), self.k.device)
            dst = upload(target.astype(np.int64), self.k.device)
            self.k.index_copy_(0, dst, self.k.index_select(0, src))
            self.v.index_copy_(0, dst, self.v.index_select(0, src))
