"""The static form: everything preallocated on the device, so that a decode step can be compiled and captured.

A decode step of `StaticRedKnotLayer` touches tensors at fixed addresses and nothing else: no Python number changes, no
memory is taken, nothing is read back. The host learns what the device has counted when a chunk of several tokens comes
(`StaticState.pull`), and before the capacity could be exceeded. Local heads take sink + window slots; ``max_cache_len``
bounds the heads that keep everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import compat, kernel_path
from .attention import HANDLE, NAME
from .errors import CacheError
from .layer import Handle, RedKnotLayer, Step
from .masks import STATIC_LENGTH, CacheLength
from .paging.pages import LayerPages
from .paging.pool import PagePool
from .paging.torch_attention import AttentionSpec

if TYPE_CHECKING:
    from .cache import RedKnotCache


class StaticState:
    """Token counts of one device, in tensors that are only ever changed in place.

    Attributes:
        seen: int64 scalar, logical tokens fed (padding counted).
        before, after: int32 ``[batch]``, real tokens stored around the latest step.
        started: every row holds a real token, so a single column that comes next is real in each row.
        decoding: ``started`` as it was before the forward that runs now: its layers must agree.
        unfinished: a forward has counted its tokens, and not all layers have stored theirs (compiled steps do not say so).
        leader: the state of the first layer's device, which keeps the account of eager decode steps for all devices:
        layers: how many take part; left: those that have not stored their token yet.
        lengths: ``before`` and ``after`` for the layers of an eager decode step; made anew for each.
    """

    lengths: kernel_path.Lengths

    def __init__(self, device: torch.device, batch: int, limit: int):
        with torch.inference_mode(False):  # steps of any mode count in them
            self.seen = torch.zeros((), dtype=torch.int64, device=device)
            self.before = torch.zeros(batch, dtype=torch.int32, device=device)
            self.after = torch.zeros(batch, dtype=torch.int32, device=device)
        self.limit = limit
        self.started = self.decoding = False
        self.unfinished, self.layers, self.left = True, 0, 0  # made by the first layer of a prompt
        self.leader: StaticState = self
        for tensor in (self.seen, self.before, self.after):
            torch._dynamo.mark_static_address(tensor)

    def step(self) -> None:
        """Count one more token for every row. Runs inside compiled code."""
        self.seen.add_(1)
        # reached only by callers that bypass generate(); stops the device before anything is written out of bounds
        torch._assert_async(
            self.seen <= self.limit, "RedKnotCache: more tokens than max_cache_len; build it with a larger one"
        )
        self.before.copy_(self.after)
        self.after.add_(1)

    def push(self, seen: int, before: np.ndarray, after: np.ndarray) -> None:
        self.seen.fill_(seen)
        self.before.copy_(torch.from_numpy(before.astype(np.int32)))
        self.after.copy_(torch.from_numpy(after.astype(np.int32)))
        self.started = bool(after.all())

    def pull(self) -> tuple[int, np.ndarray]:
        """Logical tokens and real tokens per row; waits for the device."""
        return int(self.seen), self.after.cpu().numpy().astype(np.int64)


class StaticPages(LayerPages):
    """Page tables that never change: every head has all its pages from the start, in a pool of its own."""

    def __init__(
        self,
        pool_of: Any,
        sink: np.ndarray,
        window: np.ndarray,
        batch_size: int,
        rollback: int,
        limit: int,
        page_size: int,
    ):
        ring = window.astype(np.int64) + rollback
        slots = np.minimum(limit, sink.astype(np.int64) + ring)
        pages = np.broadcast_to(-(-slots // page_size), (batch_size, len(sink)))
        super().__init__(pool_of(int(pages.sum())), sink, window, batch_size, rollback, contiguous=False)
        self.limit = limit
        self.table = np.zeros((*pages.shape, int(pages.max())), np.int32)
        owned = np.arange(self.table.shape[2]) < pages[..., None]
        self.table[owned] = self.pool.alloc(int(pages.sum()))
        self._changed()

    def prepare(self, new: np.ndarray) -> None:
        longest = int((self.lens + new).max(initial=0))
        if longest > self.limit:
            raise CacheError(
                f"the cache holds at most max_cache_len={self.limit} tokens, {longest} would be stored: build it with a "
                "larger max_cache_len, or without one"
            )

    def crop(self, removed: np.ndarray) -> None:
        self.lens = self.lens - removed

    def set_rollback(self, rollback: int) -> None:
        if rollback > self.rollback and len(self.ring_heads):
            raise CacheError(
                f"this static cache was built with rollback={self.rollback} but {rollback} is needed (assisted decoding): "
                f"build it with rollback={rollback}, or without max_cache_len"
            )

    def select(self, indices: np.ndarray) -> None:
        if len(indices) != self.batch_size:
            raise CacheError(
                f"a static cache keeps its {self.batch_size} rows but {len(indices)} are selected: build it without "
                "max_cache_len to change the number of rows"
            )
        source, target = self.table[indices], self.table
        pages = source > 0
        self.pool.copy(source[pages], target[pages])
        self.lens, self.oldest = self.lens[indices], self.oldest[indices]

    def clear(self) -> None:
        """Forget every token and keep the memory. Zeroed, so that no NaN of an earlier prompt survives in masked slots."""
        self.pool.k.zero_()
        self.pool.v.zero_()
        self.lens = np.zeros_like(self.lens)
        self.oldest = np.broadcast_to(self.sink.astype(np.int64), self.oldest.shape).copy()


class StaticHandle:
    """The handle of a decode step. Made and read inside compiled code, where the token is stored already.

    Attributes:
        key: in eager mode on a GPU, the token's keys, which attention stores; else None.
    """

    def __init__(self, layer: StaticRedKnotLayer, value: torch.Tensor, key: torch.Tensor | None = None):
        self.layer, self.value, self.key = layer, value, key


class StaticRedKnotLayer(RedKnotLayer):
    """A layer whose pages, tables and lengths keep their addresses.

    Args:
        cache, index, model_window: as for `RedKnotLayer`.
        limit: tokens that a head which keeps everything can hold.
    """

    is_compileable = True

    def __init__(self, cache: RedKnotCache, index: int, model_window: int | None, limit: int):
        super().__init__(cache, index, model_window)
        self.limit = limit
        self.state: StaticState | None = None
        self.first = False  # counts the step's tokens for its device

    # -------------------------------------------------------------------------------------------- a compiled step
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token per row on the device, or stage a chunk as `RedKnotLayer.update` does."""
        state = self.state
        if state is None or key_states.shape[2] != 1 or not state.decoding or (self.first and state.unfinished):
            return self._stage(key_states, value_states)
        eager = not compat.is_compiling()
        if eager:
            self._check(key_states)
        if self.first:
            state.step()
            if eager and state is state.leader:
                state.unfinished, state.left = True, state.layers
        if eager and self.kernel.replays:  # type: ignore[union-attr]
            if self.first:
                state.lengths = kernel_path.Lengths(state.before, state.after, None)
            keys = key_states.detach()
            setattr(keys, HANDLE, StaticHandle(self, value_states, keys))
            return keys, value_states
        self._append_token(key_states, value_states, state)
        if eager:
            self._token_stored(state)
        setattr(key_states, HANDLE, StaticHandle(self, value_states))
        return key_states, value_states

    @staticmethod
    def _token_stored(state: StaticState) -> None:
        leader = state.leader
        leader.left -= 1
        if not leader.left:
            leader.unfinished = False

    @torch.compiler.disable
    def _token_stored_apart(self, state: StaticState) -> None:
        """`_token_stored` for compiled code: a step that was counted eagerly, and whose attention is compiled."""
        self._token_stored(state)

    def _append_token(self, key_states: torch.Tensor, value_states: torch.Tensor, state: StaticState) -> None:
        torch.ops.segpaged_attention.append(
            key_states,
            value_states,
            self.k_pages,
            self.v_pages,
            self.block_table,
            state.before,
            self.sink_slots,
            self.ring_slots,
        )

    def attend(
        self,
        handle: Any,
        query: torch.Tensor,
        mask: Any,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> torch.Tensor:
        if not isinstance(handle, StaticHandle):
            return super().attend(handle, query, mask, scale, sliding_window, softcap, s_aux)
        if mask is not None:
            raise CacheError(
                f"a decode step of a static RedKnotCache got a mask ({type(mask).__name__}): a single new token cannot be padding"
            )
        assert self.state is not None
        if handle.key is not None:
            key, handle.key = handle.key, None  # and with it the cycle from the key tensor to itself
            if not compat.is_compiling():
                assert self.kernel is not None
                out = self.kernel.step_one(
                    key, handle.value, query, scale, softcap or 0.0, s_aux, self.extra_window, self.state.lengths
                )
                self._token_stored(self.state)
                return out
            self._append_token(key, handle.value, self.state)
            self._token_stored_apart(self.state)
        return torch.ops.segpaged_attention.decode(
            query,
            self.k_pages,
            self.v_pages,
            self.block_table,
            self.state.after,
            self.sink_slots,
            self.window_slots,
            self.ring_slots,
            scale,
            softcap or 0.0,
            None if s_aux is None else s_aux.float(),
            self.extra_window,
            self.rollback > 0,
        )

    def _check(self, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != self.batch_size:
            raise CacheError(
                f"this static cache holds {self.batch_size} row(s) but {key_states.shape[0]} are fed: build another one"
            )
        if self.first:
            implementation = self.cache.attention_implementation
            if implementation not in (None, NAME):
                raise CacheError(
                    f"a static RedKnotCache needs attn_implementation='{NAME}', the model runs {implementation!r}: call "
                    f"model.set_attn_implementation('{NAME}')"
                )
            self.cache.announce(1)

    # ------------------------------------------------------------------------------------------------ a chunk
    @torch.compiler.disable
    def _stage(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return RedKnotLayer.update(self, key_states, value_states)

    def _update_dense(self, k: torch.Tensor, v: torch.Tensor, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        raise CacheError(
            f"a static RedKnotCache needs attn_implementation='{NAME}', the model runs {implementation!r}: call "
            f"model.set_attn_implementation('{NAME}')"
        )

    def _ready(self, step: Step) -> LayerPages:
        if self.pages is None:

            def pool_of(count: int) -> PagePool:
                cache = self.cache
                return PagePool(
                    cache.page_size, self.key_dim, self.value_dim, self.dtype, self.device, count, cache.ceiling
                )

            pages = StaticPages(
                pool_of, self.sink, self.window, self.batch_size, self.rollback, self.limit, self.cache.page_size
            )
            self.pages, self.kernel = pages, kernel_path.KernelLayer(pages)
            self.kernel.sync()  # compiled steps are given these tensors, so they must be there before one is captured
            self.state, self.first = self.cache.static_state(self.device, self.batch_size)
            self.k_pages, self.v_pages = pages.pool.k, pages.pool.v
            self.block_table = self.kernel.table
            self.sink_slots, self.window_slots, self.ring_slots = self.kernel.sink, self.kernel.window, self.kernel.ring
            for tensor in (
                self.k_pages,
                self.v_pages,
                self.block_table,
                self.sink_slots,
                self.window_slots,
                self.ring_slots,
            ):
                torch._dynamo.mark_static_address(tensor)
            self.has_kernels = not kernel_path.unavailable(
                self.device, self.dtype, self.key_dim, self.value_dim, self.cache.page_size
            )
        self.pages.prepare(step.new)  # type: ignore[arg-type]
        if self.first:
            assert self.state is not None and step.new is not None
            self.state.push(step.start + step.length, self.pages.lens, self.pages.lens + step.new)
        return self.pages

    def _stored(self, handle: Handle) -> None:
        super()._stored(handle)
        if self is self.cache.paged_layers[-1]:
            self.cache.settle_states()

    def _attend_kernels(self, handle: Handle, query: torch.Tensor, spec: AttentionSpec, single: bool) -> torch.Tensor:
        if self.has_kernels:
            return super()._attend_kernels(handle, query, spec, single)
        return self._attend_torch(handle, query, spec, single)

    # ------------------------------------------------------------------------------------------------ lengths
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if compat.is_compiling():
            return (STATIC_LENGTH if query_length == 1 else self.limit), 0
        self.cache.announce(query_length)
        if self.state is None:
            return CacheLength.of(query_length, False), 0
        if query_length == 1 and self.state.decoding:
            return CacheLength.of(self.limit, True), 0
        return CacheLength.of(int(self.state.seen) + query_length, self.state.decoding), 0

    def get_seq_length(self) -> Any:
        """Logical tokens as a device scalar, so that asking does not wait for the device; 0 before the first."""
        return 0 if self.state is None else self.state.seen

    def get_max_length(self) -> int:
        return self.limit

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget every token; memory and addresses stay, so compiled code stays valid."""
        self.pending, self.seen = None, 0
        if self.pages is not None:
            assert isinstance(self.pages, StaticPages)
            self.pages.clear()
        if self.first and self.state is not None:
            self.state.push(0, np.zeros(self.batch_size), np.zeros(self.batch_size))
            self.state.decoding = self.state.unfinished = False

    def close(self) -> None:
        super().close()
        self.let_go()

    def let_go(self) -> None:
        """Drop the memory for good: the layer is not used again."""
        for name in ("k_pages", "v_pages", "block_table", "sink_slots", "window_slots", "ring_slots"):
            self.__dict__.pop(name, None)
        self.state = None

    def fork(self, cache: RedKnotCache) -> StaticRedKnotLayer:
        twin = super().fork(cache)
        assert isinstance(twin, StaticRedKnotLayer)
        twin.pages, twin.kernel, twin.state, twin.first = None, None, None, False
        if isinstance(self.pages, StaticPages):
            step = Step(0, 0, self.batch_size)
            step.new = np.zeros(self.batch_size, np.int64)
            twin._ready(step)
            twin.k_pages.copy_(self.k_pages)
            twin.v_pages.copy_(self.v_pages)
            twin.pages.lens, twin.pages.oldest = self.pages.lens, self.pages.oldest  # type: ignore[attr-defined]
            if twin.first:
                twin.state.push(self.seen, self.pages.lens, self.pages.lens)  # type: ignore[attr-defined]
                cache.settle_states()
        return twin
