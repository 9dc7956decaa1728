"""Where cold pages lie, host memory or files, and how they come to the compute device.

`HostPool` and `FilePool` are page pools like any other. A GPU reads single pages of a page-locked `HostPool` itself; other
copies run on a stream of their own, by way of page-locked memory. This module does not know which pages are wanted, or why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from ..errors import PoolExhausted
from .pool import PagePool, upload

__all__ = ["FilePool", "HostPool", "fetch_pages", "read_by_device", "side_stream", "upload_pages"]

_streams: dict[torch.device, torch.cuda.Stream] = {}


class HostPool(PagePool):
    """Pages in host memory, page-locked so that a GPU can copy from and to them without waiting.

    Attributes:
        readers: by stream of a GPU, an event behind its latest program that reads the slabs. Their memory is not given
            away, to be written by somebody else, before these.
    """

    def __init__(self, *args: Any, pinned: bool = False, **options: Any):
        self.pinned = pinned
        self.readers: dict[int, torch.cuda.Event] = {}
        super().__init__(*args, **options)

    def _slab(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self._wait_for_readers()  # this may be about to replace a slab
        with torch.inference_mode(False):
            return torch.zeros(rows, self.page_size, dim, dtype=dtype, pin_memory=self.pinned)

    def _wait_for_readers(self) -> None:
        while self.readers:
            self.readers.popitem()[1].synchronize()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # of a process that ends, or a device that is gone
            self._wait_for_readers()


class FilePool(PagePool):
    """Pages in files that are mapped into memory; the system decides which of them are in memory now.

    The files have no names: they vanish with the pool, and with the process however it ends. Their space is taken when
    the pool grows, so a full disk is an error then and never a crash at some later access.
    """

    both_at_once = True

    def __init__(self, *args: Any, folder: str | os.PathLike[str] | None = None, **options: Any):
        self.folder = folder
        super().__init__(*args, **options)

    @torch.inference_mode(False)
    def _slab(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        count = rows * self.page_size * dim
        handle, name = tempfile.mkstemp(prefix="redknot-pages-", dir=self.folder)
        try:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, count * dtype.itemsize)
                else:  # pragma: no cover
                    os.truncate(handle, count * dtype.itemsize)
            except OSError as error:
                raise PoolExhausted(
                    f"no room for {count * dtype.itemsize:,} bytes of cold pages in {os.path.dirname(name)}: "
                    f"{error.strerror}. Free some space, choose another folder (TMPDIR), or use cold='cpu'"
                ) from error
            # zeros: a fresh file reads as such
            return torch.from_file(name, shared=True, size=count, dtype=dtype).view(rows, self.page_size, dim)
        finally:
            os.close(handle)
            Path(name).unlink()


@contextlib.contextmanager
def side_stream(device: torch.device, wait_after: bool) -> Iterator[torch.cuda.Stream | None]:
    """Run copies between ``device`` and the host beside the computation, whose stream is yielded. Nothing on the CPU."""
    if device.type != "cuda":
        yield None
        return
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    stream, main = _streams[device], torch.cuda.current_stream(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        yield main
    if wait_after:
        main.wait_stream(stream)


def read_by_device(pool: PagePool, device: torch.device) -> TypeGuard[HostPool]:
    """Whether programs on ``device`` read single pages of this pool in place, instead of the host gathering them."""
    return device.type == "cuda" and isinstance(pool, HostPool) and pool.pinned and _have_triton()


@functools.cache
def _have_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fetch_pages(
    pool: HostPool, numbers: np.ndarray, k_out: torch.Tensor, v_out: torch.Tensor, slots: np.ndarray
) -> None:
    """Copy pages of a page-locked pool to a device, on its current stream; the host waits for nothing.

    Args:
        numbers, slots: int64 ``[n]``: pages of the pool, and where in ``k_out`` and ``v_out`` they go.
        k_out, v_out: ``[slots, page_size, dim]`` on the device, contiguous.
    """
    from ._fetch_triton import fetch

    moves = upload(np.stack([numbers, slots]), k_out.device)
    stream = torch.cuda.current_stream(k_out.device)
    with pool.lock:  # a fork on another thread may be about to replace the slabs
        fetch(pool.k, pool.v, moves, k_out, v_out)
        pool.readers[stream.cuda_stream] = stream.record_event()


def upload_pages(
    slab: torch.Tensor, index: torch.Tensor, device: torch.device, main: torch.cuda.Stream | None
) -> torch.Tensor:
    """Pages of a host slab on ``device``, by way of page-locked memory; called within `side_stream`, read on ``main``."""
    if main is None:
        return slab.index_select(0, index)
    staged = torch.empty(len(index), *slab.shape[1:], dtype=slab.dtype, pin_memory=True)
    torch.index_select(slab, 0, index, out=staged)
    found = staged.to(device, non_blocking=True)
    found.record_stream(main)  # its memory is the side stream's, and must not be given away while it is read
    return found
