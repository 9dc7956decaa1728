"""Many head maps on the same prompts, in one forward pass where eviction comes after the prefill.

A search asks what dozens of maps cost that differ in a few heads. Their suffixes run as one batch over shared contexts:
launches and weights are paid once. On a CPU, heads of all maps that share a window are attended together, each reading
only the keys it can see; elsewhere one masked call serves all heads of all maps. With windows during prefill every map
needs its own prefill: no sharing, and far more work per map.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import ContextCache, prefill
from .intercept import AttentionCall, Handler, intercept
from .objective import prompt_terms
from .validation import Prompts, Row, compare
from .visibility import HeadMap, attend, visible_attention, windowed_handler

__all__ = ["map_costs", "map_rows", "maps_handler"]

_ROWS = 24_576
"""Suffix rows per forward pass: enough to fill a large GPU, and little memory."""


def maps_handler(maps: Sequence[HeadMap], cache: ContextCache) -> Handler:
    """A handler for a run of `cache.for_run(apart=True)` that holds the same prompts once per map, map-major.

    Args:
        maps: head maps.
        cache: the contexts.
    """
    device = cache.keys_of(0)[0].device
    plan, indices = _plan(maps, device)
    # [layers, 2, maps, heads]: sinks and windows, one copy for the whole model.
    visible = torch.tensor([[m.sink for m in maps], [m.window for m in maps]]).permute(2, 0, 1, 3).to(device)

    def handler(call: AttentionCall) -> Tensor:
        context = cache.keys_of(call.layer)
        if _one_call(call):
            return _masked(call, context, visible[call.layer], len(maps))
        if call.sink_logits is None:
            return _grouped(call, context, plan[call.layer], indices, len(maps))
        size = call.query.shape[0] // len(maps)
        parts = []
        for i, one_map in enumerate(maps):
            part = slice(i * size, (i + 1) * size)
            key, value = (
                torch.cat([old, new[part]], dim=2) for old, new in zip(context, (call.key, call.value), strict=True)
            )
            one = AttentionCall(
                call.layer, call.query[part], key, value, call.scaling, call.model_window, call.softcap,
                call.sink_logits,
            )  # fmt: skip
            parts.append(visible_attention(one, one_map.sink[call.layer], one_map.window[call.layer]))
        return torch.cat(parts)

    return handler


def _one_call(call: AttentionCall) -> bool:
    return call.sink_logits is None and call.softcap is None and call.query.device.type != "cpu"


def _masked(call: AttentionCall, context: tuple[Tensor, Tensor], visible: Tensor, count: int) -> Tensor:
    """Attention of all maps and heads in one masked call.

    Local heads read keys that they cannot see, but a GPU spends less on that than on dozens of gathers and launches per
    layer; on a CPU it is the other way round (`_grouped`).

    Args:
        call: queries, keys and values of the suffixes, map-major.
        context: keys and values of the contexts, `[batch, kv_heads, tokens, dim]`.
        visible: int64 `[2, maps, kv_heads]`: sinks and windows.
        count: maps.
    """
    total_batch, query_heads, rows, dim = call.query.shape
    heads, size, offset = call.key.shape[1], call.groups, context[0].shape[2]
    batch, device = total_batch // count, call.query.device
    keys, positions = torch.arange(offset + rows, device=device), torch.arange(offset, offset + rows, device=device)
    age = positions[:, None] - keys
    sink, window = visible.flatten(1)[..., None, None]  # [maps * heads, 1, 1]
    if call.model_window:
        window = window.clamp_max(call.model_window)
    seen = (age >= 0) & ((keys < sink) | (age < window))
    if call.model_window:
        seen &= age < call.model_window

    def joined(old: Tensor, new: Tensor) -> Tensor:  # [batch, maps * heads, keys, dim]
        new = new.unflatten(0, (count, batch)).transpose(0, 1)
        return torch.cat([old[:, None].expand(-1, count, -1, -1, -1), new], dim=3).flatten(1, 2)

    # Maps become heads and query heads of a group rows, so that the mask is the same for every prompt.
    query = call.query.reshape(count, batch, heads, size * rows, dim).transpose(0, 1).flatten(1, 2)
    # Added, not boolean: a boolean mask would be converted once per prompt.
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=device).masked_fill_(~seen, float("-inf"))
    mask = mask[:, None].expand(-1, size, -1, -1).flatten(1, 2)[None]
    key, value = (joined(old, new) for old, new in zip(context, (call.key, call.value), strict=True))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scaling)
    out = out.reshape(batch, count, heads, size, rows, -1).transpose(0, 1)
    return out.reshape(total_batch, query_heads, rows, -1)


Groups = list[tuple[int, int, int, int]]
"""(sink, window, first, last): the slice of the index list that holds the pairs with this sink and window."""


def _plan(maps: Sequence[HeadMap], device: Any) -> tuple[list[Groups], Tensor]:
    """Which (map, head) pairs of every layer share a window, and all pairs as one `[2, pairs]` index on the device:
    one copy for the whole model, because a copy per layer would make the device wait for Python every time."""
    layers: list[Groups] = []
    flat: list[tuple[int, int]] = []
    for layer in range(len(maps[0].window)):
        pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for m, visible in enumerate(maps):
            for h, key in enumerate(zip(visible.sink[layer], visible.window[layer], strict=True)):
                pairs.setdefault(key, []).append((m, h))
        groups: Groups = []
        for (sink, window), members in pairs.items():
            groups.append((sink, window, len(flat), len(flat) + len(members)))
            flat += members
        layers.append(groups)
    return layers, torch.tensor(flat).T.contiguous().to(device)


def _grouped(
    call: AttentionCall, context: tuple[Tensor, Tensor], groups: Groups, indices: Tensor, count: int
) -> Tensor:
    """Attention of every (map, head) pair, pairs of one window together."""
    total_batch, query_heads, rows, dim = call.query.shape
    heads, size, offset = call.key.shape[1], call.groups, context[0].shape[2]
    batch, device = total_batch // count, call.query.device
    query = call.query.reshape(count, batch, heads, size, rows, dim)
    out = torch.empty(*query.shape[:-1], call.value.shape[-1], dtype=call.value.dtype, device=device)
    positions = torch.arange(offset, offset + rows, device=device)[:, None]
    for sink, window, first, last in groups:
        m, h = indices[0, first:last], indices[1, first:last]
        span = min(window, call.model_window) if call.model_window else window
        low = min(offset, max(0, offset - span + 1))
        low, kept = (0, 0) if low <= sink else (low, sink)
        keys = torch.cat([torch.arange(kept, device=device), torch.arange(low, offset + rows, device=device)])
        visible = (keys <= positions) & ((keys < sink) | (keys > positions - span))
        if call.model_window:
            visible &= keys > positions - call.model_window

        def gather(
            old: Tensor, new: Tensor, m: Tensor = m, h: Tensor = h, low: int = low, kept: int = kept
        ) -> Tensor:  # [batch, heads, context, dim], [maps * batch, heads, rows, dim] -> [pairs * batch, 1, keys, dim]
            found = torch.empty(
                len(m), batch, kept + old.shape[2] - low + rows, old.shape[3], dtype=old.dtype, device=old.device
            )
            by_head = old.transpose(0, 1)
            if kept:
                found[:, :, :kept] = by_head[:, :, :kept][h]
            found[:, :, kept : found.shape[2] - rows] = by_head[:, :, low:][h]
            found[:, :, found.shape[2] - rows :] = new.unflatten(0, (count, batch))[m, :, h]
            return found.flatten(0, 1)[:, None]

        key, value = (gather(old, new) for old, new in zip(context, (call.key, call.value), strict=True))
        part = attend(call, query[m, :, h].flatten(0, 1), key, value, visible)
        out[m, :, h] = part.reshape(last - first, batch, size, rows, -1)
    return out.reshape(total_batch, query_heads, rows, -1)


def _target_logits(model: Any, cache: ContextCache, suffix: Tensor, keep: Tensor, maps: Sequence[HeadMap]) -> Any:
    """Logits `[maps * batch, kept rows, vocabulary]`; `keep` are the rows that are wanted."""
    some = "logits_to_keep" in inspect.signature(model.forward).parameters
    apart = cache.repeatable
    assert apart or len(maps) == 1
    with intercept(model, maps_handler(maps, cache) if apart else windowed_handler(maps[0])):
        logits = model(
            input_ids=suffix.repeat(len(maps), 1),
            past_key_values=cache.for_run(apart),
            use_cache=True,
            **({"logits_to_keep": keep} if some else {}),
        ).logits
    return logits if some else logits[:, keep]


@torch.no_grad()
def map_costs(
    model: Any, prompts: Sequence[Prompts], maps: Sequence[HeadMap], mode: str = "full", rows: int = _ROWS
) -> Tensor:
    """What each map costs.

    Args:
        model: the decoder.
        prompts: batches, each of one kind (text, or needles).
        maps: head maps.
        mode: "full" evicts after the prefill, "windowed" applies the windows while prefilling.
        rows: suffix rows per forward pass.

    Returns:
        fp64 `[maps, 3]` on the CPU, in the order of `objective.TERMS`: means over prompts; 0 for a kind without any.
    """
    device = prompts[0].log_probs.device if prompts else None
    sums = torch.zeros(len(maps), 3, dtype=torch.float64, device=device)  # there: no copy per map
    counts = [0, 0]
    for prompt in prompts:
        text = prompt.batch.kinds[0] == "text"
        counts[0 if text else 1] += len(prompt.batch)
        for i, log_probs in _each(model, prompt, maps, mode, rows):
            kl, miss = prompt_terms(log_probs, prompt.log_probs.float(), prompt.batch)
            sums[i, 0 if text else 1] += kl.sum()
            if not text:
                sums[i, 2] += miss.sum()
    return sums.cpu() / torch.tensor([max(counts[0], 1), max(counts[1], 1), max(counts[1], 1)])


@torch.no_grad()
def map_rows(
    model: Any, prompts: Sequence[Prompts], maps: Sequence[HeadMap], mode: str = "full", rows: int = _ROWS
) -> list[list[Row]]:
    """`validation.measure` for several maps at once: one list of rows per map, prompts in order; arguments as above."""
    found: list[list[Row]] = [[] for _ in maps]
    for prompt in prompts:
        for i, log_probs in _each(model, prompt, maps, mode, rows):
            found[i] += compare(log_probs, prompt)
    return found


def _each(model: Any, prompt: Prompts, maps: Sequence[HeadMap], mode: str, rows: int) -> Iterator[tuple[int, Tensor]]:
    """The number of every map and its log-probabilities `[targets, vocabulary]` on one batch."""
    batch = prompt.batch
    keep = batch.target.any(0).nonzero()[:, 0]
    chosen = batch.target[:, keep]
    shared = mode == "full" and prompt.cache.repeatable
    copies = max(1, rows // batch.suffix.numel()) if shared else 1
    for start in range(0, len(maps), copies):
        some = maps[start : start + copies]
        cache = prompt.cache if mode == "full" else prefill(model, batch.context, windowed_handler(some[0]))
        logits = _target_logits(model, cache, batch.suffix, keep, some)
        for i, part in enumerate(logits.split(len(batch))):
            yield start + i, part[chosen].float().log_softmax(-1)
