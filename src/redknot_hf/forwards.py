"""One forward after the other: who takes part in it, which tokens it feeds, and how many each layer holds.

Layers of a model store their chunks one by one, so a cache is in order only between two forwards. `Forwards` opens a `Step`
with the first layer, lets the others join, and tells an interrupted forward, a second thread and keys that nobody
attended to apart. It also keeps the account of padding, and of tokens that compiled steps have counted on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import CacheError
from .kernel_path import Lengths
from .paging.pool import upload
from .pools import Pools
from .static import StaticState
from .step import Handle, Step

if TYPE_CHECKING:
    from .layer import RedKnotLayer


class Forwards(Pools):
    """The part of a `RedKnotCache` that layers talk to during a forward.

    Attributes:
        seen: logical tokens fed so far, padding and evicted ones included.
        step: the forward that runs, or ran last; None before the first and after the rows were changed from outside.
        padding: (first column, bool ``[batch, columns]``) of earlier chunks with padding.
        last_handle: the chunk that was staged last.
        running: the attention implementation of the forward that runs.
    """

    config: Any
    layers: list[Any]
    limit: int | None
    defers: bool
    seen: int
    step: Step | None
    padding: list[tuple[int, np.ndarray]]
    last_handle: Handle | None
    running: str | None
    _device_lens: dict[torch.device, torch.Tensor]
    _states: dict[torch.device, StaticState]
    _budget: int
    _lock: threading.Lock

    def _start(self) -> None:
        """Nothing has been fed."""
        self.seen, self.padding, self.step, self.last_handle, self._device_lens = 0, [], None, None, {}
        self.running, self._states, self._budget, self._lock = None, {}, 0, threading.Lock()

    def _freeze_if_due(self) -> None:
        raise NotImplementedError

    def join_step(self, layer: RedKnotLayer, length: int) -> Step:
        """The forward that ``layer`` takes part in with ``length`` tokens; its first layer begins it.

        Raises:
            CacheError: the forward before was interrupted, its keys were not consumed, or another thread is inside.
        """
        with self._lock:
            last = self.last_handle
            if last is not None and not last.stored and not self.defers:
                if last.step is self.step and last.step.thread != threading.get_ident():
                    self._refuse_second_thread()
                self._refuse_unconsumed(last)
            if layer.seen == self.seen:
                self._begin(length, layer)
            step = self.step
            if step is None or layer.seen != step.start or step.length != length:
                raise CacheError(
                    f"layer {layer.index} holds {layer.seen} tokens and gets {length}, the other layers hold "
                    f"{self.seen}: an earlier forward was interrupted, or another thread uses this cache, too. Call "
                    "cache.reset() and feed the prompt again; give each thread its own cache or a fork()"
                )
            if step.thread != threading.get_ident():
                self._refuse_second_thread()
            layer.seen += length
            return step

    def _begin(self, length: int, layer: RedKnotLayer) -> None:
        if self.seen and length > self.seen and getattr(self.config, "use_cache", True) is False:
            raise CacheError(
                f"{type(self.config).__name__}.use_cache is False, so generate() feeds all {length} tokens again at every "
                "step: set model.config.use_cache = True, or generate without a cache"
            )
        self._check_finished()
        self.announce(length)
        self._pull()
        if self.seen:
            behind = [other.index for other in self.paged_layers if other.seen not in (0, self.seen)]
            missing = [o.index for o in self.paged_layers if o.seen == 0 and o.is_initialized]
            if behind or missing or (self.step and self.step.new is None):
                raise CacheError(
                    f"the forward before stopped before layer {(behind or missing or [layer.index])[0]}, or another thread "
                    "is inside it: call cache.reset() and feed the prompt again, or give each thread its own cache"
                )
        if self.defers:
            self.flush()
        for state in self._states.values():
            state.unfinished = True
        self._remember_padding()
        self._freeze_if_due()
        self.step = Step(self.seen, length, layer.batch_size)
        self.seen += length

    def abandon(self, step: Step) -> None:
        """A forward was refused: if no layer has stored anything yet, the cache is again as it was before it."""
        with self._lock:
            if step is not self.step or step.stored or self._states or step.thread != threading.get_ident():
                return
            for layer in self.paged_layers:
                if step.start:
                    layer.seen, layer.pending = min(layer.seen, step.start), None
                else:
                    layer.reset()
            if not step.start:
                self._drop_pools()
            self.seen, self.step, self.last_handle = step.start, None, None

    @staticmethod
    def _refuse_second_thread() -> None:
        raise CacheError(
            "two threads use one RedKnotCache at the same time: give each its own cache or a fork(). If the other thread "
            "fails, too, call cache.reset() before using this one again"
        )

    def _refuse_unconsumed(self, handle: Handle) -> None:
        layer = handle.layer
        raise CacheError(
            f"the keys that layer {layer.index} staged were never attended to: the model does not run "
            "attn_implementation='redknot' (load it so, or call model.set_attn_implementation('redknot') and build the "
            "cache from model.config), or its attention changes the keys after the cache, which a RedKnotCache cannot "
            "serve. Call cache.reset() before using the cache again"
        )

    def adopt(
        self,
        layers: Iterable[tuple[torch.Tensor, torch.Tensor] | None],
        tokens: int,
        counts: np.ndarray | None = None,
    ) -> None:
        """Take over keys and values that were computed elsewhere; local heads keep what the rule lets them keep.

        Args:
            layers: keys (rotated for positions 0, 1, ...) and values, ``[batch, kv_heads, tokens, dim]``, of every layer in
                order; drawn one by one, so that a layer can be freed once it is stored. None for a layer that was
                filled in place (`RedKnotLayer.lay_out`).
            tokens: how many.
            counts: int ``[batch]``, of how many tokens each row really is, if they differ. A row's tokens come first in
                what ``layers`` gives; to the model they are padded on the left.

        Raises:
            CacheError: the cache is not empty, or has layers that are not served from pages.
            PoolExhausted: nothing has been stored then.
        """
        if self.seen or len(self.paged_layers) != len(self.layers):
            raise CacheError(f"adopt() fills an empty cache of attention layers; this one holds {self.seen} tokens")
        if not tokens:
            return
        step: Step | None = None
        for layer, given in zip(self.paged_layers, layers, strict=True):
            if given is None:
                layer.settle(tokens)
                continue
            k, v = given
            layer.lazy_initialization(k, v)
            if step is None:
                step = Step(0, tokens, layer.batch_size)
                step.pad_left(np.full(step.batch, tokens) if counts is None else counts)
            layer.adopt(k, v, step)
        self.seen = tokens
        if step is not None and step.real is not None:
            self.padding.append((0, step.real))

    def static_state(self, device: torch.device, batch: int) -> tuple[StaticState, bool]:
        """The counts of ``device``, and whether the asking layer is the first there (it counts each step)."""
        known = device in self._states
        if not known:
            assert self.limit is not None
            self._states[device] = StaticState(device, batch, self.limit)
        leader = self._states[device].leader = next(iter(self._states.values()))
        leader.layers += 1
        return self._states[device], not known

    def settle_states(self) -> None:
        """A forward is through: the next one may be a decode step."""
        for state in self._states.values():
            state.decoding, state.unfinished = state.started, False

    def _check_finished(self) -> None:
        """Raise if a forward of the static form was interrupted: its device has counted tokens that some layer lacks.

        Raises:
            CacheError: one was.
        """
        if not self.defers and any(state.unfinished for state in self._states.values()):
            raise CacheError(
                "the forward before stopped before its last layer had stored its tokens, or another thread is inside it: "
                "call cache.reset() and feed the prompt again, or give each thread its own cache"
            )

    def announce(self, tokens: int) -> None:
        """``tokens`` more are coming: refuse what a static cache cannot hold, before anything is stored.

        It may be called more often than tokens come. Only when that count has used up what surely fits is the device
        asked, so a decode step waits for nothing.

        Raises:
            CacheError: more tokens than ``max_cache_len``.
        """
        if self.limit is None:
            return
        self._budget -= tokens
        if self._budget >= 0:
            return
        seen = int(next(iter(self._states.values())).seen) if self._states else 0
        if seen + tokens > self.limit:
            raise CacheError(
                f"the cache holds at most max_cache_len={self.limit} tokens: {seen} are stored and {tokens} come. "
                "Build it with a larger max_cache_len (prompt + new tokens), or without one"
            )
        self._budget = self.limit - seen - tokens

    def _pull(self) -> None:
        """Learn what compiled steps have counted on the device."""
        if not self._states:
            return
        self.seen, lens = next(iter(self._states.values())).pull()
        for layer in self.paged_layers:
            layer.seen = self.seen
            if layer.pages is not None:
                layer.pages.advance(lens - layer.pages.lens)

    def lengths(self, step: Step, before: np.ndarray, device: torch.device) -> Lengths:
        """Tokens stored around ``step``, on ``device``; counted there, uploaded only after rows were changed."""
        if device not in step.lengths:
            fed = None if step.order is None else upload(step.new, device, np.int32)  # type: ignore[arg-type]
            state = self._states.get(device)
            if state is not None:  # the static form counts in place
                step.lengths[device] = Lengths(state.before, state.after, fed)
                return step.lengths[device]
            start = self._device_lens.get(device)
            if start is None:
                start = upload(before, device, np.int32)
            self._device_lens[device] = start + (step.length if fed is None else fed)
            step.lengths[device] = Lengths(start, self._device_lens[device], fed)
        return step.lengths[device]

    def real_columns(self, batch: int, columns: int) -> np.ndarray:
        """Which logical columns hold real tokens, bool ``[batch, columns]``."""
        real = np.ones((batch, columns), bool)
        chunks = list(self.padding)
        if self.step is not None and self.step.real is not None:
            chunks.append((self.step.start, self.step.real))
        for start, fresh in chunks:
            width = min(fresh.shape[1], columns - start)
            if width > 0:
                real[:, start : start + width] = fresh[:, :width]
        return real

    def _remember_padding(self) -> None:
        """The step is over: keep which of its columns are padding."""
        if self.step is not None and self.step.real is not None:
            self.padding.append((self.step.start, self.step.real))

    def flush(self) -> None:
        """Store chunks that were kept back for layers sharing keys."""
        for layer in self.paged_layers:
            layer.flush()

    def _settle(self) -> None:
        """Before the rows are changed from outside: everything stored, no step open."""
        self._check_finished()
        self._pull()
        self.flush()
        self._remember_padding()
        self.step, self.last_handle, self._device_lens = None, None, {}
