"""Running a batch in two parts: a context whose keys and values are computed once, and a suffix run many times.

The profiler asks hundreds of questions about the same contexts, so the context's KV is kept and each run costs only the
suffix. A `ContextCache` records during `prefill` and is read-only afterwards: a suffix run sees context + suffix and
leaves nothing behind. Gradients flow through the suffix and stop at the context.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..model_shape import text_config
from .intercept import Handler, intercept

__all__ = ["ContextCache", "gradients", "prefill", "run_suffix"]


class _ContextLayer(DynamicLayer):
    """Keeps all tokens while recording; afterwards returns context + new tokens and keeps only the context."""

    recording = True
    apart = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.recording:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.apart:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class ContextCache(Cache):
    """KV of a batch of contexts, all of the same length.

    Attention layers keep every token, also under a sliding window of the model's own (the handlers apply it). Layers of
    other kinds (linear attention, convolutions) are copied for every run, because they overwrite their state.
    """

    def __init__(self, config: Any) -> None:
        template = DynamicCache(config=text_config(config)).layers
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        super().__init__(layers=[_ContextLayer() if type(layer) in plain else layer for layer in template])

    def freeze(self) -> None:
        """Stop recording."""
        for layer in self.layers:
            if isinstance(layer, _ContextLayer):
                layer.recording = False

    def repeat(self, count: int) -> None:
        """Serve `count` runs with the one context that was recorded, nothing copied; only if `repeatable`."""
        for layer in self.layers:
            layer.keys, layer.values = (t.expand(count, -1, -1, -1) for t in (layer.keys, layer.values))

    @property
    def repeatable(self) -> bool:
        """Whether runs may be larger than the contexts' batch: only where every layer keeps tokens."""
        return all(isinstance(layer, _ContextLayer) for layer in self.layers)

    def for_run(self, apart: bool = False) -> Cache:
        """A cache for one suffix run: shares the context's tensors, copies other layers' states.

        Args:
            apart: attention sees only the suffix's keys and values; the handler reads the context's from `keys_of`. The
                run's batch may then be the contexts' several times over, with nothing copied.
        """
        run = copy.copy(self)
        run.layers = [copy.copy(layer) if isinstance(layer, _ContextLayer) else copy.deepcopy(layer)
                      for layer in self.layers]  # fmt: skip
        for layer in run.layers:
            if isinstance(layer, _ContextLayer):
                layer.apart = apart
        return run

    def keys_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention layer, each `[batch, kv_heads, tokens, dim]`."""
        return self.layers[layer].keys, self.layers[layer].values


def _keep_one_logit(model: Any) -> dict[str, int]:
    """Prefill needs no logits, which would be the largest tensor of the whole run."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def prefill(model: Any, context: Tensor, handler: Handler) -> ContextCache:
    """Compute the KV of a batch of contexts.

    Args:
        model: the decoder.
        context: int64 `[batch, tokens]`, no padding. Equal rows are computed once.
        handler: attention of the prefill; `visible_attention` for full attention.
    """
    cache = ContextCache(model.config)
    count = len(context)
    if count > 1 and cache.repeatable and bool((context == context[:1]).all()):
        context = context[:1]
    with intercept(model, handler):
        model(input_ids=context, past_key_values=cache, use_cache=True, **_keep_one_logit(model))
    cache.freeze()
    if len(context) < count:
        cache.repeat(count)
    return cache


def run_suffix(model: Any, cache: ContextCache, suffix: Tensor, handler: Handler) -> Tensor:
    """Logits of a batch of suffixes after their contexts.

    Args:
        model: the decoder.
        cache: from `prefill`; unchanged by the run.
        suffix: int64 `[batch, rows]`. Rows of shorter suffixes are padded on the right: causality keeps them apart.
        handler: attention of the suffix.

    Returns:
        `[batch, rows, vocabulary]`.
    """
    with intercept(model, handler):
        return model(input_ids=suffix, past_key_values=cache.for_run(), use_cache=True).logits


_HALF_SCALE = 2.0**12
"""Factor on what is sent backwards through a float16 model, whose smallest number is 6e-8."""


def gradients(
    output: Tensor,
    inputs: Sequence[Tensor],
    cotangent: Tensor | None = None,
    *,
    retain_graph: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`torch.autograd.grad` in fp32 as far as a float16 model allows: nothing vanishes on the way.

    Args:
        output: fp32, from the model's logits.
        inputs: tensors that require gradients.
        cotangent: of the output; None for a scalar output.
        retain_graph: for another call.
        dtype: of the model; None if that is the inputs'.

    Returns:
        One fp32 gradient per input.
    """
    scale = _HALF_SCALE if (dtype or inputs[0].dtype) == torch.float16 else 1.0
    start = torch.ones_like(output) if cotangent is None else cotangent
    found = torch.autograd.grad(output, list(inputs), start * scale, retain_graph=retain_graph)
    return [gradient.float() / scale for gradient in found]
