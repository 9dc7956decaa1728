"""One attention layer of a `RedKnotCache`.

``update`` only stages the new keys and values: which of them are padding is known to the attention function alone. The
attention function comes back through `RedKnotLayer.attend`, which attends over pages and staged chunk and stores the
chunk. A `Step` is what the layers of one forward have in common.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from . import compat, kernel_path
from .attention import HANDLE, NAME
from .dense_views import DenseViews
from .errors import CacheError, UnsupportedModel
from .masks import CacheLength, RedKnotMask
from .paging import torch_attention
from .paging.pages import KEEP_ALL, LayerPages
from .paging.torch_attention import AttentionSpec
from .step import Handle, NoBackward, Step
from .windows import effective_window

if TYPE_CHECKING:
    from .cache import RedKnotCache


class RedKnotLayer(DenseViews, CacheLayerMixin):
    """Pages of one attention layer, with the interface of a transformers cache layer.

    Args:
        cache: the cache it belongs to.
        index: layer index.
        model_window: the model's own sliding window in this layer (tokens), or None.
    """

    is_paged = True  # told apart several times a step; isinstance() takes a microsecond for an abstract base class
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: RedKnotCache, index: int, model_window: int | None = None):
        super().__init__()
        self.cache = cache
        self.index, self.model_window = index, model_window
        self.is_sliding = model_window is not None
        self.seen = 0
        self.rollback = cache.rollback
        self.pages: LayerPages | None = None
        self.kernel: kernel_path.KernelLayer | None = None
        self.pending: Handle | None = None

    @property
    def cache(self) -> RedKnotCache:
        """The cache, held weakly: a dropped cache frees its pages at once and not when cycles are collected."""
        cache = self._cache()
        assert cache is not None, "the cache of this layer is gone"
        return cache

    @cache.setter
    def cache(self, cache: RedKnotCache) -> None:
        self._cache = weakref.ref(cache)

    def __repr__(self) -> str:
        return f"RedKnotLayer({self.index}, tokens={self.seen})"

    # ---------------------------------------------------------------------------------------- what transformers calls
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, head count, dtype and device from the first keys ``[batch, kv_heads, n, dim]``."""
        heads = key_states.shape[1]
        self.sink, self.window, self.extra_window = self.cache.geometry(self.index, heads, self.model_window)
        self.batch_size, self.num_heads = key_states.shape[0], heads
        self.key_dim, self.value_dim = key_states.shape[3], value_states.shape[3]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage a chunk; the attention function stores it.

        Args:
            key_states, value_states: ``[batch, kv_heads, n, dim]``, keys after RoPE.

        Returns:
            Key and value tensors for the attention function, the key carrying the handle to this layer.

        Raises:
            CacheError: another batch size, head count or dtype than before, an interrupted forward, another thread.
        """
        if torch.compiler.is_compiling():
            return self._update_apart(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif key_states.shape[0] != self.batch_size:
            raise CacheError(
                f"this cache holds {self.batch_size} row(s) but {key_states.shape[0]} are fed. Before beam search on a "
                "prefilled cache call cache.batch_repeat_interleave(num_beams); for another prompt call cache.reset()"
            )
        elif key_states.shape[1:4:2] != (self.num_heads, self.key_dim) or key_states.dtype != self.dtype:
            raise CacheError(
                f"layer {self.index} stores {self.num_heads} KV heads of {self.key_dim} channels in {self.dtype}, but "
                f"{key_states.shape[1]} of {key_states.shape[3]} in {key_states.dtype} are fed: a cache serves one model; "
                "make another one"
            )
        cache = self.cache
        if self.seen == cache.seen or cache.step is None:  # a forward begins here
            cache.running = cache.attention_implementation
        if cache.running not in (None, NAME):
            return self._update_dense(key_states, value_states, cache.running)
        step = cache.join_step(self, key_states.shape[2])
        # a view carries the handle, so that a caller's own tensor is left alone
        keys, values = key_states.detach(), value_states
        if values.requires_grad:
            values = values.detach()
        handle = Handle(self, step, keys, values)
        self.pending = handle
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys, values = NoBackward.apply(keys, key_states), NoBackward.apply(values, value_states)
            handle._value = weakref.ref(values)
        setattr(keys, HANDLE, handle)
        cache.last_handle = handle
        return keys, values

    @torch.compiler.disable
    def _update_apart(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` for compiled code that calls it: not traced. (The wrapper costs an eager step a tenth of its time.)"""
        return self.update(key_states, value_states)

    def attend(
        self,
        handle: Handle,
        query: torch.Tensor,
        mask: Any,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of ``query [batch, q_heads, n, dim]`` over pages and staged chunk -> ``[batch, n, q_heads, dim]``."""
        step = handle.step
        if sliding_window is not None and sliding_window != self.model_window:
            self._adopt_window(sliding_window)
        if (
            step.length == 1
            and mask is None
            and self.kernel is not None
            and not handle.stored
            and self.pages.take_one()  # type: ignore[union-attr]
        ):
            return self._decode_one(handle, query, scale, softcap or 0.0, s_aux)
        step.resolve(mask, self.pages.lens if self.pages is not None else np.zeros(step.batch, np.int64))
        step.use_pattern(mask, self.device)
        self._check_window(step, mask)
        assert step.new is not None
        spec = AttentionSpec(scale, softcap or 0.0, s_aux, self.extra_window)
        single = step.length == 1 and step.order is None
        if handle.stored and not single:
            raise UnsupportedModel(
                f"layer {self.index}: the attention function ran twice over one chunk, which a RedKnotCache does not "
                "serve; use DynamicCache"
            )
        if not handle.stored:
            self._ready(step)
        run = self._attend_kernels if self.kernel is not None else self._attend_torch
        out = run(handle, query.detach(), spec, single)
        return NoBackward.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out

    def _decode_one(
        self, handle: Handle, query: torch.Tensor, scale: float, softcap: float, s_aux: torch.Tensor | None
    ) -> torch.Tensor:
        """A decode step by the kernels while the page tables stay as they are: what eager decoding mostly does.

        The host's time is what such a step takes on a GPU, so nothing is done here that can be done once per forward or
        once per page.
        """
        step, pages, kernel = handle.step, self.pages, self.kernel
        assert pages is not None and kernel is not None and handle.k is not None and handle.v is not None
        lengths = step.lengths.get(self.device)
        if lengths is None:  # the first layer of the step
            step.resolve(None, pages.lens)
            lengths = self.cache.lengths(step, pages.lens, self.device)
        q = query.detach() if query.requires_grad else query
        out = kernel.step_one(handle.k, handle.v, q, scale, softcap, s_aux, self.extra_window, lengths)
        pages.count_one()
        self._stored(handle)
        return NoBackward.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out

    def _attend_torch(self, handle: Handle, query: torch.Tensor, spec: AttentionSpec, single: bool) -> torch.Tensor:
        step, pages = handle.step, self.pages
        assert pages is not None and step.new is not None
        if single:
            if not handle.stored:
                pages.write(handle.k, handle.v, step.new)  # type: ignore[arg-type]
                pages.advance(step.new)
                self._stored(handle)
            return torch_attention.decode(pages, query, spec)
        k, v = step.compact(handle.k), step.compact(handle.v)  # type: ignore[arg-type]
        commit = not self.cache.defers
        if step.pattern is not None:
            out = torch_attention.masked(pages, query, handle.k, handle.v, step.pattern, step.positions, spec)  # type: ignore[arg-type]
            if commit:
                pages.write(k, v, step.new)
                pages.advance(step.new)
        else:
            out = torch_attention.prefill(
                pages, step.compact(query), k, v, step.new, spec, self._unwindowed(step), commit
            )
            out = step.expand(out)
        if commit:
            self._stored(handle)
        return out

    def _attend_kernels(self, handle: Handle, query: torch.Tensor, spec: AttentionSpec, single: bool) -> torch.Tensor:
        step, pages, kernel = handle.step, self.pages, self.kernel
        assert pages is not None and kernel is not None and step.new is not None
        lengths = self.cache.lengths(step, pages.lens if not handle.stored else pages.lens - step.new, self.device)
        few = 1 < step.length <= kernel_path.MAX_DECODE_ROWS and step.order is None and step.pattern is None
        if single or (few and not self.cache.defers and pages.rollback >= step.length - 1 and bool(pages.lens.all())):
            if not handle.stored:
                self._append(handle.k, handle.v, step)  # type: ignore[arg-type]
                self._stored(handle)
            return kernel.decode(query, spec, lengths)
        k, v = step.compact(handle.k), step.compact(handle.v)  # type: ignore[arg-type]
        if step.pattern is not None:
            out = torch_attention.masked(pages, query, handle.k, handle.v, step.pattern, step.positions, spec)  # type: ignore[arg-type]
        else:
            past = int(pages.lens.max(initial=0))
            out = kernel.prefill(step.compact(query), k, v, spec, lengths, past, self._unwindowed(step))
            out = step.expand(out)
        if not self.cache.defers:
            self._append(k, v, step)
            self._stored(handle)
        return out

    def _unwindowed(self, step: Step) -> bool:
        return self.cache.prefill == "full" and step.start == 0

    def _ready(self, step: Step) -> LayerPages:
        """The page tables, with room for the step's tokens."""
        if self.pages is None:
            self.pages = self.cache.new_pages(self)
            self.kernel = self.kernel_for(self.pages)
        self.cache.reserve(self, step)
        if self.cache.recording and 1 < step.length <= 256:
            self.set_rollback(max(self.rollback, step.length))
        self.pages.prepare(step.new)  # type: ignore[arg-type]
        return self.pages

    def kernel_for(self, pages: LayerPages) -> kernel_path.KernelLayer | None:
        """The kernels over ``pages``; None where they do not serve this layer. They know neither cold nor quantised pages."""
        missing = kernel_path.unavailable(self.device, self.dtype, self.key_dim, self.value_dim, self.cache.page_size)
        pages.needs_pool = not missing and self.cache.tier is None and not pages.quantised
        return kernel_path.KernelLayer(pages) if pages.needs_pool else None

    def adopt(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Store a whole prompt ``[batch, kv_heads, n, dim]`` in an empty layer; see `RedKnotCache.adopt`."""
        self._ready(step)
        self._append(k, v, step)
        self.seen = step.length

    def lay_out(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The pages of a whole prompt as keys and values ``[batch, kv_heads, slots, dim]`` to be written in place.

        ``k`` and ``v`` tell shapes and dtype. `settle` ends what this begins. None, with nothing taken, where a head
        evicts or the pages do not lie side by side.
        """
        self.lazy_initialization(k, v)
        lossless = self.cache.tier is None and getattr(self.cache, "kv_dtype", None) is None
        if not lossless or not (self.window >= KEEP_ALL).all():
            return None
        pages = self._ready(step)
        views = pages.full_views()
        if views is None:
            pages.free()
        return views

    def settle(self, tokens: int) -> None:
        """Count the first ``tokens`` of what was laid out as stored; pages behind them are given back."""
        pages = self.pages
        assert pages is not None
        room = (pages.table > 0).sum(2).max()
        if tokens <= (room - 1) * pages.pool.page_size:
            whole = int(room) * pages.pool.page_size
            pages.advance(np.full(pages.batch_size, whole, np.int64))
            pages.crop(np.full(pages.batch_size, whole - tokens, np.int64))
        else:
            pages.advance(np.full(pages.batch_size, tokens, np.int64))
        self.seen = tokens

    def _append(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Store a compact chunk, by the kernels where they serve this layer."""
        pages = self.pages
        assert pages is not None and step.new is not None
        if self.kernel is not None:
            self.kernel.append(k, v, self.cache.lengths(step, pages.lens, self.device))
        else:
            pages.write(k, v, step.new)
        pages.advance(step.new)

    def _stored(self, handle: Handle) -> None:
        handle.step.stored = True
        handle.release()
        self.pending = None

    def _adopt_window(self, window: int) -> None:
        """The family passes a sliding window to attention that its cache layer type does not show."""
        if self.pages is not None:
            raise UnsupportedModel(
                f"layer {self.index} was called with sliding_window={window} after {self.model_window}; use DynamicCache"
            )
        self.model_window = window
        self.sink, self.window, self.extra_window = self.cache.geometry(self.index, self.num_heads, window)

    def _check_window(self, step: Step, mask: Any) -> None:
        """The window that the model masks with must be the one that it caches with, where the difference would show.

        Raises:
            UnsupportedModel: they differ, so that a layer would see other tokens than with the family's own cache.
        """
        if not isinstance(mask, RedKnotMask) or not mask.is_causal:
            return
        own = self.model_window or 0
        if mask.window != own and step.start + step.length > min(size for size in (mask.window, own) if size):
            raise UnsupportedModel(
                f"layer {self.index} caches a window of {own or 'all'} tokens but masks with {mask.window or 'all'}: this "
                "family is not served; use DynamicCache"
            )

    def flush(self) -> None:
        """Store a chunk that was kept back for layers which attend over this layer's keys."""
        handle, self.pending = self.pending, None
        if handle is None or handle.stored or handle.step.new is None or self.pages is None:
            return
        step = handle.step
        self._append(step.compact(handle.k), step.compact(handle.v), step)  # type: ignore[arg-type]
        handle.release()

    # -------------------------------------------------------------------------------------------------- lengths
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.seen + query_length
        if compat.is_compiling():
            return length, 0
        decoding = self.pages is not None and self.pages.started
        seen = self.seen
        return CacheLength.of(length, decoding, lambda: self.cache.real_columns(self.batch_size, seen)), 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    # ------------------------------------------------------------------------------------------ what the cache calls
    def reset(self) -> None:
        if self.pages is not None:
            self.pages.free()
        self.pages, self.kernel, self.pending, self.seen = None, None, None, 0
        if self.is_initialized:
            self.is_initialized = False
            del self.batch_size

    def close(self) -> None:
        """The cache is gone: give pages and memory back, even if a chunk that was never stored still refers to the layer."""
        if self.pages is not None:
            self.pages.free()
        self.pages, self.kernel, self.pending = None, None, None

    def set_rollback(self, rollback: int) -> None:
        self.rollback = rollback
        if self.pages is not None:
            self.pages.set_rollback(rollback)

    def select(self, indices: np.ndarray) -> None:
        if self.pages is not None:
            self.pages.select(indices)
        if self.is_initialized:
            self.batch_size = len(indices)

    def fork(self, cache: RedKnotCache) -> RedKnotLayer:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.cache, twin.pending = cache, None
        twin.pages = self.pages.fork() if self.pages is not None else None
        twin.kernel = (
            kernel_path.KernelLayer(twin.pages) if twin.pages is not None and self.kernel is not None else None
        )
        return twin

    # the base class's own batch, crop and reorder methods work on dense tensors; RedKnotCache handles these for all layers
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx.cpu().numpy())

    def crop(self, tokens_to_remove: int) -> None:
        raise CacheError("crop a RedKnotCache as a whole: cache.crop(n)")

    def offload(self) -> None:
        raise CacheError("offload a RedKnotCache as a whole: cache.offload()")

    prefetch = offload

    # ------------------------------------------------------------------------------------------------ dense views


__all__ = ["Handle", "RedKnotLayer", "Step", "effective_window"]
