"""The attention mask as a recipe instead of a tensor.

transformers asks the function registered under ``"redknot"`` for a mask and hands whatever it returns to the attention
function untouched. For a `RedKnotCache` that is a `RedKnotMask`: the padding of the rows and the kind of pattern, no
``[batch, 1, queries, keys]`` tensor (16 GiB at 128K tokens). For every other cache, or none, it is sdpa's own mask.

This module knows nothing of pages or heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from . import compat
from .errors import CacheError

__all__ = ["CacheLength", "RedKnotMask", "redknot_mask"]

STATIC_LENGTH = -1  # the kv_length that a static cache reports while it is compiled: no mask is wanted


class CacheLength(int):
    """The key length that a `RedKnotCache` reports: tells the mask function which cache it is building for.

    Attributes:
        decoding: every row holds at least one real token.
        past: gives which columns of the past are real, bool ``[batch, columns]``; None where nobody keeps account.
    """

    decoding: bool = False
    past: Callable[[], np.ndarray] | None = None

    @classmethod
    def of(cls, length: int, decoding: bool, past: Callable[[], np.ndarray] | None = None) -> CacheLength:
        self = cls(length)
        self.decoding, self.past = decoding, past
        return self

    def check_past(self, real: np.ndarray) -> None:
        """Compare the past columns of a mask, bool ``[batch, past columns]``, with what was fed.

        Raises:
            CacheError: they differ; what is stored cannot be hidden or shown any more.
        """
        if self.past is None or not real.shape[1]:
            return
        known = self.past()
        if len(known) != len(real):
            return  # another number of rows: the cache's update() says so, and what to do
        if (known != real).any():
            raise CacheError(
                f"attention_mask disagrees with what the cache holds: it marks {real.sum(1).tolist()} past tokens per row as "
                f"real, {known.sum(1).tolist()} are stored, or others. The mask of past tokens must not change between "
                "calls"
            )


def _is_sliding_overlay(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is causal-and-sliding-window, told by the code objects that its closure combines.

    ``local_size`` does not tell: chunked attention passes it too.
    """
    parts: list[Any] = [cell.cell_contents for cell in (getattr(function, "__closure__", None) or ())]
    if len(parts) == 1 and isinstance(parts[0], tuple):
        parts = list(parts[0])
    sliding = masking_utils.sliding_window_overlay(1).__code__
    return (
        len(parts) == 2
        and causal_mask_function in parts
        and any(getattr(part, "__code__", None) is sliding for part in parts)
    )


class RedKnotMask:
    """What the mask function was asked for; lives for one forward and is shared by its layers.

    Args:
        arguments: the keyword arguments of the mask function.

    Attributes:
        padding: bool ``[batch, columns]``, True for real tokens, or None.
        window: the sliding window of a pattern that is causal within one; 0 for plain causal and for any other pattern.
        is_causal: the pattern is causal, or causal within a sliding window. Any other (packed sequences, prefix-LM,
            image blocks, chunks) has to be materialised with `dense`.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.padding: torch.Tensor | None = arguments.get("attention_mask")
        function = arguments.get("mask_function", causal_mask_function)
        sliding = _is_sliding_overlay(function)
        self.window = int(arguments.get("local_size") or 0) if sliding else 0
        self.is_causal = function is causal_mask_function or sliding
        self._dense: dict[torch.device | None, torch.Tensor] = {}

    def dense(self, device: torch.device | None = None) -> torch.Tensor:
        """The mask as bool ``[batch, 1, queries, keys]``, True where seen; built once, and copied once per device."""
        if None not in self._dense:
            arguments = dict(self.arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
            arguments["kv_length"] = int(arguments["kv_length"])
            self._dense[None] = sdpa_mask(**arguments)
        if device not in self._dense:
            self._dense[device] = self._dense[None].to(device)
        return self._dense[device]

    # generate() calls contiguous() on masks it prepares for compileable caches, accelerate and the model call to()
    def contiguous(self) -> RedKnotMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> RedKnotMask:
        return self

    @property
    def ndim(self) -> int:
        return 2

    # GPT-2 flattens what it takes for a padding mask
    def view(self, *shape: Any) -> Any:
        return self if shape == (self.arguments["batch_size"], -1) else self.dense().view(*shape)

    # Model code that indexes the mask on its way to the attention function gets the real tensor, which the attention
    # function then refuses; arithmetic on it would be silently wrong (a bool mask is not an additive one).
    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("arguments", "padding", "window"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(
            f"the model computes with the attention mask itself ({getattr(func, '__name__', func)}), so a RedKnotCache "
            "cannot serve it; use DynamicCache"
        )


def redknot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | RedKnotMask | None = None,
    **kwargs: Any,
) -> RedKnotMask | torch.Tensor | None:
    """The function registered with transformers' ``AttentionMaskInterface``.

    Returns:
        For an ordinary cache what the family's default implementation gets, sdpa's or eager's mask; for a
        `RedKnotCache` a `RedKnotMask`, or None when each row gets exactly one more real token (a decode step needs no
        mask: lengths live in the cache).
    """
    if isinstance(attention_mask, RedKnotMask):  # prepared by generate() ahead of the call
        return attention_mask
    if isinstance(kv_length, int) and kv_length == STATIC_LENGTH:
        return None
    arguments = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    if not isinstance(kv_length, CacheLength):
        # a family that transformers does not run with sdpa may do arithmetic with its mask
        return sdpa_mask(**arguments) if compat.runs_sdpa(kwargs.get("config")) else eager_mask(**arguments)
    if q_length == 1 and kv_length.decoding and _last_column_is_real(attention_mask):
        if attention_mask is not None and kv_length.past is not None and attention_mask.shape[1] < kv_length:
            raise CacheError(
                f"attention_mask has {attention_mask.shape[1]} columns but the cache holds {kv_length - 1} tokens and 1 more "
                f"comes: pass a mask of {int(kv_length)} columns, for the past and the new token"
            )
        if attention_mask is not None and not attention_mask.is_cuda and attention_mask.shape[1] >= kv_length:
            kv_length.check_past(attention_mask[:, : kv_length - 1].numpy())
        return None
    return RedKnotMask(arguments)


def _last_column_is_real(padding: torch.Tensor | None) -> bool:
    # looking at a mask on a GPU would stall every decode step; there a step's token counts as real, as generate() has it
    return padding is None or padding.is_cuda or bool(padding[:, -1].all())
