"""`RedKnotCache.offload` and `RedKnotCache.prefetch`: a whole cache to host memory and back.

While a layer sleeps, a `SleepingPages` stands where its page table was. It answers what can be told without the pages
(rows, bytes) and wakes the layer as soon as anything else is asked of it, so a sleeping cache is used like any other;
`prefetch` only chooses when the copy happens. In a forward that is the question for the mask, before any layer has
taken part: if the device has no memory then, the session sleeps on, whole. Live tokens alone
are kept, each once however many rows share it.

On CUDA the copies run on a stream of their own between pinned host memory and the pages; the stream that calls does not
wait for the host, later work on it waits for the copies.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CacheError, PoolExhausted
from ..layer import RedKnotLayer
from ..paging.frozen import FrozenPages
from ..paging.pages import LayerPages
from ..paging.tiers import TieredPages, rehoused
from .rows import PageState, read_rows, write_rows

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["SleepingPages", "offload_cache", "prefetch_cache", "sleeping_layers", "sleeps"]

_streams: dict[torch.device, torch.cuda.Stream] = {}
_streams_lock = threading.Lock()


@contextlib.contextmanager
def copy_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """The device's stream for copies from and to the host, behind everything queued so far. None on the CPU."""
    if device.type != "cuda":
        yield None
        return
    with _streams_lock:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream(device).wait_stream(stream)


def host_empty(rows: int, dim: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """``[rows, dim]`` of host memory, page-locked where copies to a GPU will start from it."""
    return torch.empty(rows, dim, dtype=dtype, pin_memory=pinned)


class SleepingPages:
    """Stands for the page table of a layer whose tokens are in host memory.

    Attributes:
        asleep: True, to tell it from a `LayerPages` without importing this module.
        sink, window, ring: as in `LayerPages`.
        host_bytes: of keys and values here.
    """

    asleep = True

    def __init__(
        self, layer: RedKnotLayer, geometry: LayerPages, state: PageState, keys: torch.Tensor, values: torch.Tensor
    ):
        self.layer, self.state, self.keys, self.values = layer, state, keys, values
        self.geometry = geometry
        self.sink, self.window, self.ring = geometry.sink, geometry.window, geometry.ring
        self.group: list[SleepingPages] = [self]
        self.lock = threading.RLock()
        self.copied: torch.cuda.Event | None = None
        self.awake: LayerPages | None = None

    @property
    def host_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + (0 if self.frozen is None else self.frozen.store.nbytes)

    @property
    def frozen(self) -> FrozenPages | None:
        """The table with its frozen pages, which are on the host now, if there are any."""
        return self.geometry if isinstance(self.geometry, FrozenPages) and self.awake is None else None

    @property
    def archive(self) -> LayerPages | None:
        """The cold page table behind it, if it has one."""
        return getattr(self.geometry, "archive", None)

    @property
    def batch_size(self) -> int:
        return len(self.state.lens)

    @property
    def num_heads(self) -> int:
        return len(self.sink)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one head, key and value."""
        return self.keys.shape[1] * self.keys.element_size() + self.values.shape[1] * self.values.element_size()

    def rows_per_head_bytes(self) -> list[int]:
        """Bytes of the tokens of each head, ``[kv_heads]``, summed over the batch."""
        stored = np.minimum(self.state.lens[:, None], self.sink.astype(np.int64) + self.ring).sum(0)
        ideal = stored * self.token_bytes
        return (ideal if self.frozen is None else self.frozen.frozen_bytes(ideal, self.token_bytes)).tolist()

    def rest(self) -> tuple[PageState, torch.Tensor, torch.Tensor]:
        """State, keys and values ``[rows, dim]`` on the host, without waking; waits for a copy that is under way."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return self.state, self.keys, self.values

    def wake(self) -> LayerPages:
        """Bring back this layer and those that went to sleep with it.

        Raises:
            PoolExhausted: the device has no memory for them; they sleep on.
        """
        with self.lock:
            if self.awake is None:
                _wake([sleeper for sleeper in self.group if sleeper.awake is None])
            assert self.awake is not None
            return self.awake

    def free(self) -> None:
        """Forget the tokens: what `reset` and the destructor of a cache ask for, and no reason to wake."""
        with self.lock:
            if self.awake is not None:
                self.awake.free()
                return
            self.group.remove(self)
            self.group = [self]
            self.let_go()
            if self.archive is not None:
                self.archive.free()

    def let_go(self) -> None:
        """Drop the host memory, keeping the widths."""
        self.keys, self.values = (half.new_empty(0, half.shape[1]) for half in (self.keys, self.values))
        if isinstance(self.geometry, FrozenPages):
            self.geometry.melt()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.wake(), name)


def install(layer: RedKnotLayer, pages: LayerPages) -> None:
    """Make ``pages`` the storage of ``layer``, with the kernels where they serve it."""
    layer.pages, layer.kernel = pages, layer.kernel_for(pages)


def sleeps(layer: Any) -> bool:
    pages = getattr(layer, "pages", None)
    return isinstance(pages, SleepingPages) and pages.awake is None


def sleeping_layers(cache: RedKnotCache) -> list[SleepingPages]:
    """The layers of a cache that sleep now."""
    return [layer.pages for layer in cache.layers if sleeps(layer)]


def offload_cache(cache: RedKnotCache, chosen: Iterable[Any]) -> int:
    """Move the tokens of the layers ``chosen`` to host memory and give the pages back; returns the bytes moved.

    Raises:
        CacheError: the host has no memory for them, or a layer cannot be moved. Nothing has changed then.
    """
    cache._settle()
    chosen = list(chosen)
    layers = [layer for layer in chosen if isinstance(layer, RedKnotLayer) and isinstance(layer.pages, LayerPages)]
    for layer in layers:
        if type(layer) is not RedKnotLayer:
            raise CacheError(
                f"layer {layer.index} is a {type(layer).__name__}, whose memory is fixed: build the cache without "
                "max_cache_len to offload it"
            )
    sleepers = [_lull(layer) for layer in layers]
    lock = threading.RLock()
    for layer, sleeper in zip(layers, sleepers, strict=True):
        sleeper.group, sleeper.lock = sleepers, lock
        LayerPages.free(layer.pages)  # type: ignore[arg-type]  # an archive behind it is on the host already
        layer.pages, layer.kernel = sleeper, None  # type: ignore[assignment]
    for other in chosen:
        if not isinstance(other, RedKnotLayer):
            other.offload()
    # slabs without a page in use go back to the allocator, unless a fork still works with them
    cache._drop_pools()
    return sum(sleeper.host_bytes for sleeper in sleepers)


def _lull(layer: RedKnotLayer) -> SleepingPages:
    pages = layer.pages
    assert pages is not None
    state, rows = PageState.of(pages)
    pinned = layer.device.type == "cuda"
    halves = []
    with copy_stream(layer.device) as stream:
        for slab in (pages.pool.k, pages.pool.v):
            try:
                host = host_empty(len(rows), slab.shape[2], slab.dtype, pinned)
            except (MemoryError, RuntimeError) as error:
                raise CacheError(_no_host_memory(layer, len(rows))) from error
            start = 0
            for piece in read_rows(slab, rows):
                host[start : start + len(piece)].copy_(piece, non_blocking=pinned)
                start += len(piece)
            halves.append(host)
        geometry = _geometry(pages)
        if isinstance(geometry, FrozenPages):
            try:
                geometry.store = geometry.store.to("cpu", pinned)
            except (MemoryError, RuntimeError) as error:
                raise CacheError(_no_host_memory(layer, int(geometry.store.start[-1]))) from error
        sleeper = SleepingPages(layer, geometry, state, *halves)
        if stream is not None:
            sleeper.copied = stream.record_event()
    return sleeper


def _no_host_memory(layer: RedKnotLayer, tokens: int) -> str:
    return (
        f"the host has no memory for {tokens:,} tokens of layer {layer.index}: the cache stays on {layer.device}. Save it "
        "to disk with cache.save(path), or free other sessions first"
    )


def _geometry(pages: LayerPages) -> LayerPages:
    """An empty table of the same form, to ask geometry of; holds no pages, but does hold on to nothing else either."""
    twin = object.__new__(type(pages))
    twin.__dict__.update(pages.__dict__)
    twin.pool = None  # type: ignore[assignment]
    twin.table = np.zeros_like(pages.table)
    twin._changed()
    if isinstance(twin, TieredPages) and twin.far is not None:
        twin.far = twin.far.moved_to(twin)  # what is resident on the device stays behind
    return twin


def prefetch_cache(cache: RedKnotCache, chosen: Iterable[Any]) -> int:
    """Bring those of the layers ``chosen`` that sleep back to their device; returns the bytes moved.

    Raises:
        PoolExhausted: the device has no memory for them; they sleep on.
    """
    chosen = list(chosen)
    sleepers = [layer.pages for layer in chosen if sleeps(layer)]
    moved = sum(sleeper.host_bytes for sleeper in sleepers)
    if sleepers:
        with sleepers[0].lock:
            _wake([sleeper for sleeper in sleepers if sleeper.awake is None])
    for other in chosen:
        if not isinstance(other, RedKnotLayer) and getattr(other, "device", None) is not None:
            other.prefetch()
    return moved


def _wake(sleepers: list[SleepingPages]) -> None:
    wanted: dict[int, tuple[Any, int]] = {}
    fresh: list[LayerPages] = []
    for sleeper in sleepers:
        layer, old = sleeper.layer, sleeper.geometry
        pool = layer.cache.pool(layer)
        pages = rehoused(old, pool)
        fresh.append(pages)
        wanted[id(pool)] = (pool, wanted.get(id(pool), (pool, 0))[1] + sleeper.state.pages_wanted(pages))
    try:
        for pool, count in wanted.values():
            pool.reserve(count)
        rows = [sleeper.state.place(pages) for sleeper, pages in zip(sleepers, fresh, strict=True)]
    except PoolExhausted:
        for pages in fresh:
            LayerPages.free(pages)
        raise
    for sleeper, pages, where in zip(sleepers, fresh, rows, strict=True):
        with copy_stream(sleeper.layer.device):
            write_rows(pages.pool.k, where, sleeper.keys)
            write_rows(pages.pool.v, where, sleeper.values)
        if isinstance(pages, FrozenPages):
            pages.store = pages.store.to(sleeper.layer.device)
        sleeper.awake = pages
        install(sleeper.layer, pages)
    for sleeper in sleepers:
        sleeper.let_go()
        sleeper.group = []  # not even itself: the cycle would hold on to the pages until it is collected
