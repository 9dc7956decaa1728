"""Attention written out: what a head profile means, with no cache, page or ring anywhere.

`dense_reference(profile)` makes a model's attention compute every score, take the model's own mask as transformers
builds it for sdpa, and hide from each KV head what the visibility rule hides:

    a query at position p sees  {j <= p} & ({j < sink} | {j > p - window})

Positions count the real tokens of a row. It is slow on purpose and shares no code with the package under test: it is
what the tests compare with. It does not know score modifications other than softcap and attention sinks and refuses
them, so that a family it does not understand is never reported as equal.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "dense_reference"
_now = threading.local()


class NotUnderstood(Exception):
    """The family does something to its scores that the reference does not model."""


def _mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs):
    """sdpa's mask, always materialised; the padding is kept aside for the positions."""
    if attention_mask is not None and attention_mask.shape[1] < kv_length:
        raise NotUnderstood("a padding mask narrower than the keys")
    if "allow_is_bidirectional_skip" not in kwargs:  # masks of encoders and of cross-attention say nothing of positions
        _now.padding = attention_mask
    kwargs = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )


def _attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, dropout=0.0, **kwargs
):
    for word in ("position_bias", "sinks", "indices", "block_indices", "topk_indices", "head_mask"):
        if kwargs.get(word) is not None:
            raise NotUnderstood(word)
    batch, q_heads, queries, dim = query.shape
    heads, columns = key.shape[1], key.shape[2]
    scaling = scaling if scaling is not None else getattr(module, "scaling", None) or dim**-0.5
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    seen = torch.ones(batch, 1, queries, columns, dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        given = attention_mask[..., :columns]
        seen &= given if given.dtype == torch.bool else given >= 0
    elif causal:
        seen = seen.tril(columns - queries)
    profile = None if _is_chunked(module) else getattr(_now, "profile", None)
    if profile is not None and causal and hasattr(module, "layer_idx") and not getattr(module, "is_cross_attention", 0):
        seen = seen & _visible(profile, module.layer_idx, batch, heads, queries, columns).to(query.device)
    group = q_heads // heads
    seen = seen.expand(batch, seen.shape[1], queries, columns)
    seen = seen.repeat_interleave(group, 1) if seen.shape[1] == heads else seen
    scores = query.double() @ key.double().repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf"))
    if s_aux is not None:
        weights = torch.cat([weights, s_aux.double().reshape(1, -1, 1, 1).expand(batch, q_heads, queries, 1)], -1)
    weights = torch.softmax(weights, -1).nan_to_num(0.0)[..., :columns]  # a padding row sees nothing
    out = weights @ value.double().repeat_interleave(group, 1)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _is_chunked(module) -> bool:
    """A head profile does not reach into chunked attention: those layers keep what their model keeps."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or []
    layer = getattr(module, "layer_idx", None)
    return layer is not None and layer < len(types) and types[layer] == "chunked_attention"


def _visible(profile, layer: int, batch: int, heads: int, queries: int, columns: int) -> torch.Tensor:
    """bool ``[batch, heads, queries, columns]``: the per-head part of the rule."""
    padding = getattr(_now, "padding", None)
    real = torch.ones(batch, columns) if padding is None else padding[:, :columns].float()
    position = real.cumsum(-1) - 1
    row, column = position[:, columns - queries :, None], position[:, None, :]
    parts = []
    for head in range(heads):
        if profile.head_class[layer][head] != "local":
            parts.append(torch.ones(batch, queries, columns, dtype=torch.bool, device=position.device))
            continue
        sink, window = profile.sink[layer][head], profile.window[layer][head]
        parts.append((column < sink) | (column > row - window))
    return torch.stack(parts, 1)


def full_cache(config: Any) -> DynamicCache:
    """An ordinary cache that keeps every token: the model's own windows are in the mask, not in the storage."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    for index, layer in enumerate(cache.layers):
        chunked = index < len(types) and types[index] == "chunked_attention"
        if type(layer) is DynamicSlidingWindowLayer and not chunked:
            cache.layers[index] = DynamicLayer()
    return cache


@contextlib.contextmanager
def dense_reference(model: Any, profile: Any = None) -> Iterator[None]:
    """Let ``model`` run the reference under ``profile`` (None: every head sees everything)."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    _now.profile, _now.padding = profile, None
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _now.profile = None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
