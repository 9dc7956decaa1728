"""Plain tensors of a paged layer: for other attention implementations while nothing is evicted, and for tools that look
inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .attention import NAME
from .errors import CacheError
from .paging.pages import LayerPages
from .step import NoBackward, Step

if TYPE_CHECKING:
    from .cache import RedKnotCache


class DenseViews:
    """The part of a `RedKnotLayer` that makes ``[batch, kv_heads, tokens, dim]`` of pages."""

    cache: RedKnotCache
    index: int
    seen: int
    batch_size: int
    num_heads: int
    sink: np.ndarray
    window: np.ndarray
    pages: LayerPages | None

    def _ready(self, step: Step) -> LayerPages:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def _update_dense(self, k: torch.Tensor, v: torch.Tensor, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Another attention implementation runs: give it plain tensors while nothing is evicted."""
        total = self.seen + k.shape[2]
        shortest = int((self.sink.astype(np.int64) + self.window).min())
        if total > shortest:
            raise CacheError(
                f"the model runs attn_implementation={implementation!r}, which sees every token, but a head of layer "
                f"{self.index} keeps only {shortest} of {total} tokens. Call model.set_attn_implementation('{NAME}') or load "
                f"the model with attn_implementation='{NAME}'"
            )
        if self.cache.tier is not None:
            raise CacheError(
                f"the model runs attn_implementation={implementation!r}, which cannot read cold pages "
                f"(cold={self.cache.cold!r}): call model.set_attn_implementation('{NAME}')"
            )
        step = self.cache.join_step(self, k.shape[2])  # type: ignore[arg-type]
        step.resolve(None, np.zeros(step.batch, np.int64))
        pages = self._ready(step)
        pages.write(k.detach(), v.detach(), step.new)  # type: ignore[arg-type]
        pages.advance(step.new)  # type: ignore[arg-type]
        step.stored = True
        keys, values = self.dense()
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return NoBackward.apply(keys, k), NoBackward.apply(values, v)
        return keys, values

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values as ``[batch, kv_heads, seen, dim]``; evicted tokens and padding are zero."""
        assert self.pages is not None
        pages = self.pages
        column = np.arange(self.seen)
        real = self.cache.real_columns(self.batch_size, self.seen)
        position = np.cumsum(real, 1) - 1
        keep = real[:, None] & (
            (position[:, None] < pages.sink[:, None]) | (position[:, None] >= pages.oldest[..., None])
        )
        keep &= position[:, None] < pages.lens[:, None, None]
        k, v = pages.gather(np.maximum(position, 0), np.arange(self.num_heads))
        gone = torch.from_numpy(~keep[:, :, : len(column)]).to(k.device)[..., None]
        return k.masked_fill_(gone, 0), v.masked_fill_(gone, 0)

    @property
    def keys(self) -> torch.Tensor | None:
        """A dense copy of the keys, ``[batch, kv_heads, seen, dim]``, for tools that look inside; None when empty."""
        return self._dense_half(0)

    @keys.setter
    def keys(self, given: Any) -> None:
        self._refuse_tensor(given)

    @property
    def values(self) -> torch.Tensor | None:
        """A dense copy of the values, like `keys`."""
        return self._dense_half(1)

    @values.setter
    def values(self, given: Any) -> None:
        self._refuse_tensor(given)

    def _dense_half(self, half: int) -> torch.Tensor | None:
        self.flush()
        return None if self.pages is None else self.dense()[half]

    @staticmethod
    def _refuse_tensor(given: Any) -> None:
        if given is not None:
            raise CacheError("keys and values of a RedKnotCache live in pages; feed them with update()")
