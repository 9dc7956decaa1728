"""The same attention by other means. Each returns a list of calls, one per layer; one that raises is left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import DEVICE, Layer, Shape
from torch.nn.attention import SDPBackend, sdpa_kernel

Calls = list[Callable[[], object]]


def dense_kv(shape: Shape, batch: int, tokens: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random contiguous K and V [B, Hkv, N, D]: what a cache without eviction holds."""
    gen = torch.Generator(device=DEVICE).manual_seed(layer)
    size = (batch, shape.kv_heads, tokens, shape.head_dim)
    k, v = (torch.empty(size, dtype=shape.dtype, device=DEVICE).normal_(generator=gen) for _ in range(2))
    return k, v


def sdpa(backend: str, q: list[torch.Tensor], kv: list[tuple[torch.Tensor, torch.Tensor]], causal: bool) -> Calls:
    """SDPA on the full context; backend cudnn, flash or default."""
    backends = {"cudnn": [SDPBackend.CUDNN_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}.get(backend)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backends is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return [lambda q=q_, k=k_, v=v_: call(q, k, v) for q_, (k_, v_) in zip(q, kv, strict=True)]


def sdpa_masked(
    q: list[torch.Tensor],
    kv: list[tuple[torch.Tensor, torch.Tensor]],
    first: int | torch.Tensor,
    sink: torch.Tensor,
    window: torch.Tensor,
) -> Calls:
    """SDPA with a boolean mask per head: what a mask can do for a full cache. Queries are at `first` and on, or there."""
    group = q[0].shape[1] // sink.numel()
    p = (first if isinstance(first, torch.Tensor) else first + torch.arange(q[0].shape[2], device=DEVICE))[:, None]
    j = torch.arange(kv[0][0].shape[2], device=DEVICE)[None]
    s, w = (x.repeat_interleave(group)[:, None, None] for x in (sink, window))
    mask = ((j <= p) & ((j < s) | (j > p - w)))[None]
    return [
        lambda q=q_, k=k_, v=v_: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        for q_, (k_, v_) in zip(q, kv, strict=True)
    ]


def sdpa_lower_right(q: list[torch.Tensor], kv: list[tuple[torch.Tensor, torch.Tensor]]) -> Calls:
    """A chunk over its past, causal: K and V of the group repeated beforehand, which is not timed."""
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(q[0].shape[2], kv[0][0].shape[2])
    group = q[0].shape[1] // kv[0][0].shape[1]
    wide = [tuple(x.repeat_interleave(group, 1) for x in pair) for pair in kv]
    return [
        lambda q=q_, k=k_, v=v_: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        for q_, (k_, v_) in zip(q, wide, strict=True)
    ]


def flex(
    q: list[torch.Tensor], kv: list[tuple[torch.Tensor, torch.Tensor]], sink: torch.Tensor, window: torch.Tensor
) -> Calls:
    """flex_attention with a per-head block mask, prefill from nothing; making the mask is not timed.

    The mask is put together block by block: `create_block_mask` looks at every pair of tokens, for tens of seconds at 32K.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    group, columns, size = q[0].shape[1] // sink.numel(), q[0].shape[2], 128

    def seen(b, h, p, j):
        return (j <= p) & ((j < sink[h // group]) | (j > p - window[h // group]))

    first = torch.arange(0, columns, size, device=DEVICE)
    p, j = first[:, None], first[None]
    s, w = (x.repeat_interleave(group)[:, None, None] for x in (sink, window))
    # of a block's pairs: the newest query sees the newest key it can, the oldest query the oldest
    some = (j <= p) & ((j < s) | (j + size - 1 > p - w))
    full = (j + size - 1 <= p) & ((j + size <= s) | (j > p + size - 1 - w))
    blocks = []
    for part in (some & ~full, full):
        order = torch.argsort((~part).int(), dim=-1, stable=True)
        blocks += [part.sum(-1).int()[None].contiguous(), order.int()[None].contiguous()]
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=size, mask_mod=seen)
    attend = torch.compile(flex_attention)
    calls = [
        lambda q=q_, k=k_, v=v_: attend(q, k, v, block_mask=mask, enable_gqa=True)
        for q_, (k_, v_) in zip(q, kv, strict=True)
    ]
    rows = torch.linspace(0, columns - 1, 16, device=DEVICE).long()
    got, want = calls[0]()[:, :, rows], sdpa_masked([q[0][:, :, rows]], kv[:1], rows, sink, window)[0]()
    if (got.float() - want.float()).norm() > 0.02 * want.float().norm():
        raise ValueError("flex_attention under this mask gives something else than SDPA under it")
    return calls


def flashinfer_decode(layers: list[Layer], scale: float) -> Calls:
    """flashinfer's paged decode with every (sequence, head) as a sequence of its own; its plan() is not timed."""
    import flashinfer

    calls: Calls = []
    for layer in layers:
        batch, kv_heads = layer.slots.shape
        page_size, head_dim = layer.k_pages.shape[1:]
        group = layer.q.shape[1] // kv_heads
        used = layer.slots.flatten()
        pages = -(-used // page_size)
        indptr = torch.zeros(batch * kv_heads + 1, dtype=torch.int32, device=DEVICE)
        indptr[1:] = pages.cumsum(0)
        table = layer.block_table.flatten(0, 1)
        indices = table[torch.arange(table.shape[1], device=DEVICE) < pages[:, None]]
        last = (used - (pages - 1) * page_size).int()
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(
            indptr, indices, last, group, 1, head_dim, page_size, q_data_type=layer.q.dtype, kv_data_type=layer.q.dtype,
            sm_scale=scale,
        )  # fmt: skip
        q = layer.q[:, :, 0].reshape(batch * kv_heads, group, head_dim).contiguous()
        pool = (layer.k_pages[:, :, None], layer.v_pages[:, :, None])
        calls.append(lambda wrapper=wrapper, q=q, pool=pool: wrapper.run(q, pool))
    return calls
