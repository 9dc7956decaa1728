"""One forward as its layers see it: `Step` is what they have in common, `Handle` one layer's chunk on its way to attention."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import kernel_path
from .errors import CacheError, UnsupportedModel
from .masks import CacheLength, RedKnotMask

if TYPE_CHECKING:
    from .layer import RedKnotLayer

__all__ = ["Handle", "NoBackward", "Step"]


class Step:
    """One forward through the model.

    Args:
        start, length: logical tokens (padding counted) before the forward, and fed by it.
        batch: rows.

    Attributes:
        new: int64 ``[batch]``, real tokens of each row; None until the first layer has seen the mask.
        real: bool ``[batch, length]`` on the host, which columns are real tokens, or None without padding.
        order: int64 ``[batch, length]`` that moves each row's real tokens to the front, or None without padding.
        pattern: bool ``[batch, 1, length, keys]`` when the mask of the layer that attends now is not causal.
        lengths: the tokens stored, for each device with kernels.
        reserved: pools (by id) that have room for the step.
        stored: some layer has stored its chunk, so the step cannot be taken back any more.
    """

    def __init__(self, start: int, length: int, batch: int):
        self.start, self.length, self.batch = start, length, batch
        self.thread = threading.get_ident()
        self.new: np.ndarray | None = None
        self.real: np.ndarray | None = None
        self.order: torch.Tensor | None = None
        self._moves: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        self.pattern: torch.Tensor | None = None
        self.lengths: dict[torch.device, kernel_path.Lengths] = {}
        self.reserved: set[int] = set()
        self.stored = False

    def resolve(self, mask: Any, lens: np.ndarray) -> None:
        """Take the padding from the mask; the first layer of the forward calls this, the others share it.

        Raises:
            CacheError: the padding does not fit the tokens that are stored.
        """
        if self.new is not None:
            return
        everything = np.full(self.batch, self.length, np.int64)
        if not isinstance(mask, RedKnotMask):
            self.new = everything
            return
        padding = mask.padding
        if padding is None:
            self.new = everything
            return
        columns = self.start + self.length
        if padding.shape[1] < columns:
            raise CacheError(
                f"attention_mask has {padding.shape[1]} columns but the cache holds {self.start} tokens and {self.length} "
                f"more come: pass a mask of {columns} columns, for the past and the new tokens"
            )
        real = padding[:, :columns].cpu().numpy()
        known = mask.arguments["kv_length"]
        if isinstance(known, CacheLength) and known.past is not None:
            known.check_past(real[:, : self.start])
        elif (real[:, : self.start].sum(1) != lens).any():
            raise CacheError(
                "attention_mask disagrees with what the cache holds: it marks "
                f"{real[:, : self.start].sum(1).tolist()} past tokens per row as real, {lens.tolist()} are stored. The "
                "mask of past tokens must not change between calls"
            )
        new = real[:, self.start :]
        self.new = new.sum(1).astype(np.int64)
        if not new.all():
            self.real = new.copy()
            fresh = torch.from_numpy(self.real).to(padding.device)
            self.order = torch.argsort(~fresh, dim=1, stable=True)
            back = torch.argsort(self.order, dim=1)
            behind = ~fresh.gather(1, self.order)
            self._moves = {padding.device: (self.order, behind, back, ~fresh)}

    def pad_left(self, counts: np.ndarray) -> None:
        """Each row has so many real tokens and padding before them; instead of `resolve`, where no mask is at hand."""
        self.new = np.asarray(counts, np.int64)
        if (self.new < self.length).any():
            self.real = np.arange(self.length) >= self.length - self.new[:, None]
            self.order = torch.argsort(~torch.from_numpy(self.real), dim=1, stable=True)

    def _moves_on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Order, padding behind it, its inverse and the padding columns, on a layer's device: copied once per forward."""
        if device not in self._moves:
            self._moves[device] = tuple(part.to(device, non_blocking=True) for part in next(iter(self._moves.values())))
        return self._moves[device]

    def use_pattern(self, mask: Any, device: torch.device) -> None:
        """Set `pattern` for a layer with this mask: sliding and full layers of one forward have different ones.

        Args:
            device: of the layer.

        Raises:
            UnsupportedModel: the mask has a pattern that the stored past cannot follow.
        """
        if mask is None or (isinstance(mask, RedKnotMask) and mask.is_causal):
            self.pattern = None
            return
        if self.start:
            kind = "is not causal (packed sequences, a prefix or image blocks)"
            if not isinstance(mask, RedKnotMask):
                kind = f"is a {type(mask).__name__} of its own shape"
            raise UnsupportedModel(
                f"the attention mask {kind} and the cache already holds {self.start} tokens: feed such a prompt in one "
                "piece, pass a 2D padding mask, or use DynamicCache"
            )
        if isinstance(mask, RedKnotMask):
            self.pattern = mask.dense(device)
        else:
            self.pattern = (mask if mask.dtype == torch.bool else mask >= 0).to(device)

    @property
    def positions(self) -> np.ndarray:
        """Request position of every column of a first chunk, int64 ``[batch, length]``."""
        if self.real is None:
            return np.broadcast_to(np.arange(self.length), (self.batch, self.length))
        return np.maximum(self.real.cumsum(1) - 1, 0)

    def compact(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, length, dim]`` with each row's real tokens first and zeros behind them."""
        if self.order is None:
            return x
        order, behind, _, _ = self._moves_on(x.device)
        moved = x.gather(2, order[:, None, :, None].expand_as(x))
        return moved.masked_fill(behind[:, None, :, None], 0)

    def expand(self, out: torch.Tensor) -> torch.Tensor:
        """The inverse of `compact` for ``[batch, length, heads, dim]``; padding rows are zero."""
        if self.order is None:
            return out
        _, _, back, padding = self._moves_on(out.device)
        return out.gather(1, back[:, :, None, None].expand_as(out)).masked_fill(padding[:, :, None, None], 0)


class Handle:
    """What a returned key tensor carries to the attention function: the staged chunk of one layer in one forward."""

    __slots__ = ("__weakref__", "_value", "k", "layer", "step", "stored", "v")

    def __init__(self, layer: RedKnotLayer, step: Step, k: torch.Tensor, v: torch.Tensor):
        self.layer, self.step, self.stored = layer, step, False
        self.k: torch.Tensor | None = k
        self.v: torch.Tensor | None = v
        self._value = weakref.ref(v)

    @property
    def value(self) -> torch.Tensor | None:
        return self._value()

    def store(self) -> None:
        """Put a chunk without padding into the pages and attend to nothing: for tools that fill a cache with given keys."""
        layer, step = self.layer, self.step
        step.resolve(None, np.zeros(step.batch, np.int64))
        layer._ready(step)
        layer._append(self.k, self.v, step)  # type: ignore[arg-type]
        layer._stored(self)

    def release(self) -> None:
        """The chunk is in the pages: drop it, and with it the cycle from the key tensor to itself."""
        self.stored, self.k, self.v = True, None, None

    def abandon(self) -> None:
        """The forward was refused; take it back if nothing is stored yet."""
        if self.step is not None:
            self.layer.cache.abandon(self.step)


class NoBackward(torch.autograd.Function):
    """``out`` unchanged, in the graph of ``source``: a backward pass arrives here and is refused."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise CacheError(
            "a RedKnotCache stores keys and values without their gradients: train without a cache (use_cache=False)"
        )
