"""The attention function registered as ``attn_implementation="redknot"``.

A key tensor that a `RedKnotCache` returned carries a handle to the layer that stored it; then attention runs over that
layer's pages. Any other key tensor gets ordinary attention: sdpa, or the model family's own function where sdpa cannot
express what the family does (softcap, attention sinks, position bias).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .errors import UnsupportedModel
from .masks import RedKnotMask, redknot_mask

NAME = "redknot"
HANDLE = "_redknot_handle"  # attribute of a key tensor

# keyword arguments with which a family changes the scores or the choice of keys in a way that pages do not follow
_FOREIGN = frozenset({"position_bias", "sinks", "indices", "block_indices", "topk_indices", "head_mask"})

# Who looks at a call before it runs: called with module, query, key, attention_mask, scaling, sliding_window, softcap and
# s_aux as the forward got them, and its other keyword arguments as one dict. It must not change or keep them. Called in
# the thread of the forward; the tuple is replaced as a whole, so a running call sees the old one or the new one.
Observer = Callable[..., None]
observers: tuple[Observer, ...] = ()
_observers_lock = threading.Lock()


def observe(observer: Observer, wanted: bool = True) -> None:
    """Add an observer of every call of the attention function, or with ``wanted=False`` remove it again."""
    global observers
    with _observers_lock:
        rest = tuple(other for other in observers if other != observer)
        observers = (*rest, observer) if wanted else rest


def redknot_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | RedKnotMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for one layer, with the signature that transformers calls.

    Args:
        module: the attention module; its ``scaling`` and ``is_causal`` are used where the arguments are None.
        query: ``[batch, q_heads, queries, head_dim]``.
        key, value: ``[batch, kv_heads, keys, head_dim]``, as the cache's ``update`` returned them.
        attention_mask: what the mask function returned.
        scaling, sliding_window, softcap, s_aux: as the model family passes them.

    Returns:
        ``[batch, queries, q_heads, head_dim]``, contiguous, and None (no attention weights).

    Raises:
        UnsupportedModel: the family changes keys, values or scores in a way that the cache cannot serve.
    """
    for look in observers:
        look(module, query, key, attention_mask, scaling, sliding_window, softcap, s_aux, kwargs)
    handle = getattr(key, HANDLE, None)
    if handle is None:
        return _ordinary_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            sliding_window,
            softcap,
            s_aux,
            is_causal,
            kwargs,
        )
    try:
        _refuse_foreign(module, handle, value, dropout, is_causal, kwargs)
        if scaling is None:
            scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
        out = handle.layer.attend(handle, query, attention_mask, float(scaling), sliding_window, softcap, s_aux)
    except Exception:
        if hasattr(handle, "abandon"):  # as if this forward had not been tried, where that is still possible
            handle.abandon()
        raise
    return out, None


def _refuse_foreign(
    module: torch.nn.Module, handle: Any, value: torch.Tensor, dropout: float, is_causal: bool | None, kwargs: dict
) -> None:
    """Raise `UnsupportedModel` where a family does what pages do not follow."""
    if handle.value is not value:
        raise UnsupportedModel(
            f"{type(module).__name__} changes the values between the cache and the attention call, so a RedKnotCache "
            "cannot serve it; use DynamicCache"
        )
    for word in () if _FOREIGN.isdisjoint(kwargs) else _FOREIGN.intersection(kwargs):
        if kwargs[word] is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} passes {word} to attention, which a RedKnotCache does not serve; use DynamicCache"
            )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal:
        raise UnsupportedModel(
            f"{type(module).__name__} attends in both directions, which a RedKnotCache does not serve; use DynamicCache"
        )
    step = getattr(handle, "step", None)  # the static form has none
    if step is not None and step.new is None and 0 < step.start < step.length and _starts_over(kwargs):
        raise UnsupportedModel(
            f"{step.length} tokens are fed from position 0 into a cache that holds {step.start} of them: generate(..., "
            "use_cache=False) feeds the whole text at every step. Leave out use_cache=False, or the cache"
        )
    if dropout and module.training:
        raise UnsupportedModel("a RedKnotCache serves inference only: call model.eval() or train without a cache")


def _starts_over(kwargs: dict) -> bool:
    """Whether a forward with more tokens than the cache holds says that they are the whole text."""
    position = kwargs.get("position_ids")
    return kwargs.get("use_cache") is False or (position is not None and not bool(position[..., 0].any()))


def _ordinary_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | RedKnotMask | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    if isinstance(attention_mask, RedKnotMask):  # a layer that a RedKnotCache left to transformers
        attention_mask = attention_mask.dense()
    if softcap is None and s_aux is None and kwargs.get("sinks") is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    # sdpa refuses softcap and ignores s_aux without a word; the family's own function does what the family means
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise UnsupportedModel(
            f"{type(module).__name__} needs softcap or attention sinks and brings no eager attention; load it with "
            "attn_implementation='eager'"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and queries > 1:
        # as sdpa's is_causal means it: aligned at the start, for a static cache is longer than what it holds
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, lowest)
    extra = {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window}
    kwargs = {**kwargs, **{word: given for word, given in extra.items() if given is not None}}
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out, _ = own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return out, None


def register() -> None:
    """Make ``"redknot"`` known to transformers as an attention implementation and as a mask. Changes nothing else."""
    AttentionInterface.register(NAME, redknot_attention_forward)
    AttentionMaskInterface.register(NAME, redknot_mask)
