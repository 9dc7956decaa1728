"""Causal attention of a chunk over itself, heads that keep everything: the largest part of a long prompt, on Hopper.

Written in Gluon, triton's language for kernels that say themselves when the matrix unit starts and when it is waited for.
In `prefill_kernel` a warp waits for its scores before it goes on, and all warps of a program wait at the same time, so
the matrix unit stands still while exponentials are computed. Here the scores of a block are under way together with the
values of the block before, and the exponentials are computed while the latter is still being multiplied (the order of
FlashAttention-3, arXiv 2407.08608, inside a warp group).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .tiles import strides

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # triton 3.6 knows it as the former

_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
BLOCK = 128  # query rows of a program, and keys per step
STAGES = 3
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@gluon.jit
def _load(p_k, p_v, i_b, i_h, block, b_k, b_v, bars, step, m):
    """Start loading what step `step` multiplies: the keys of its block, and the values of the step before."""
    # after the last step only values are left; its keys are those of some block again, which nobody reads
    row = gl.maximum(block, 0) * p_k.block_shape[2]
    bar = bars.index(step % b_k.shape[0])
    mbarrier.expect(bar, p_k.block_type.nbytes + p_v.block_type.nbytes, pred=m)
    _copy(p_k, [i_b, i_h, row, 0], bar, b_k.index(step % b_k.shape[0]), pred=m)
    row = (block + 1) * p_k.block_shape[2]
    _copy(p_v, [i_b, i_h, row, 0], bar, b_v.index((step - 1) % b_k.shape[0]), pred=m)


@gluon.jit(do_not_specialize=["num_columns", "num_tiles", "batch"])
def _causal_kernel(
    p_q, p_k, p_v, p_order, p_out, q_stride_b, q_stride_h, q_stride_t, scale, num_columns, num_tiles, batch,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = p_k.dtype
    i_p = gl.program_id(0)
    # tiles of one KV head are neighbours, its query heads innermost; late rows, which see most, come first
    per_item = num_tiles * GROUP
    i_item = i_p // per_item
    i_m = num_tiles - 1 - i_p % per_item // GROUP
    i_b = i_item % batch
    i_h = gl.load(p_order + i_item // batch)
    head = i_h * GROUP + i_p % GROUP
    row = i_m * BLOCK

    b_k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, D], p_k.layout)
    b_v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, D], p_v.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    b_order = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    _barrier()
    # step i multiplies block i_m - i: the diagonal comes first, the others hide nothing
    mbarrier.expect(bars.index(0), p_k.block_type.nbytes)
    _copy(p_k, [i_b, i_h, row, 0], bars.index(0), b_k.index(0))
    _load(p_k, p_v, i_b, i_h, i_m - 1, b_k, b_v, bars, 1, True)
    _load(p_k, p_v, i_b, i_h, i_m - 2, b_k, b_v, bars, 2, i_m >= 1)

    o_m = row + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LOADED))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, LOADED))
    p_q_row = (
        p_q + i_b.to(gl.int64) * q_stride_b + head.to(gl.int64) * q_stride_h + o_m.to(gl.int64)[:, None] * q_stride_t
    )
    b_loaded = gl.load(p_q_row + o_d[None, :], mask=(o_m < num_columns)[:, None], other=0.0)
    b_q = gl.allocate_shared_memory(dtype, [BLOCK, D], TILE, b_loaded)
    fence_async_shared()
    _barrier()

    b_zero = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
    b_acc = gl.zeros([BLOCK, D], gl.float32, SUMS)
    mbarrier.wait(bars.index(0), 0)
    b_s = warpgroup_mma(b_q, b_k.index(0).reshape([BLOCK, D]).permute([1, 0]), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    o_row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, SCORES))
    o_col = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
    b_s = gl.where(o_col[None, :] <= o_row[:, None], b_s, -1.0e30)
    # [BLOCK]; every row sees itself, so the maximum is a score from the first step on
    b_m = gl.max(b_s, 1) * scale
    b_p = gl.exp2(b_s * scale - b_m[:, None])
    b_l = gl.sum(b_p, 1)
    b_w = gl.convert_layout(b_p.to(dtype), WEIGHTS)
    for i in range(1, i_m + 1):
        place = i % STAGES
        before = (i - 1) % STAGES
        # all warps have done with the keys of the step before, and with the values of the one before that
        _barrier()
        _load(p_k, p_v, i_b, i_h, i_m - i - 2, b_k, b_v, bars, i + 2, i + 1 <= i_m)
        mbarrier.wait(bars.index(place), i // STAGES & 1)
        b_s = warpgroup_mma(
            b_q, b_k.index(place).reshape([BLOCK, D]).permute([1, 0]), b_zero, use_acc=False, is_async=True
        )
        b_acc = warpgroup_mma(b_w, b_v.index(before).reshape([BLOCK, D]), b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        b_top = gl.maximum(b_m, gl.max(b_s, 1) * scale)
        b_p = gl.exp2(b_s * scale - b_top[:, None])
        b_fade = gl.exp2(b_m - b_top)
        b_l = b_l * b_fade + gl.sum(b_p, 1)
        b_m = b_top
        b_next = gl.convert_layout(b_p.to(dtype), WEIGHTS)
        # A store that needs the sums: the compiler may move the wait before what is computed, but not before a store.
        b_order.store(b_l)
        b_acc, b_w, b_next = warpgroup_mma_wait(0, deps=[b_acc, b_w, b_next])
        b_acc = b_acc * gl.convert_layout(b_fade, gl.SliceLayout(1, SUMS))[:, None]
        b_w = b_next
    step = i_m + 1
    mbarrier.wait(bars.index(step % STAGES), step // STAGES & 1)
    b_acc = warpgroup_mma(b_w, b_v.index(i_m % STAGES).reshape([BLOCK, D]), b_acc, is_async=True)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))

    b_o = b_acc * gl.convert_layout(1.0 / b_l, gl.SliceLayout(1, SUMS))[:, None]
    o_m = row + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, SUMS))
    o_v = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    p_o = p_out + ((i_b.to(gl.int64) * num_columns + o_m) * (KV_HEADS * GROUP) + head)[:, None] * D + o_v[None, :]
    gl.store(p_o, b_o.to(dtype), mask=(o_m < num_columns)[:, None])


def _descriptor(x: torch.Tensor) -> TensorDescriptor:
    step = [max(stride, x.shape[3]) if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*step[:3], 1], [1, 1, BLOCK, x.shape[3]], LAYOUT)


def causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    num_heads: int,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Fill in the rows of `out` that belong to the first `num_heads` of the KV heads in `order`.

    Args:
        q: ``[B, Hq, T, D]``. k, v: ``[B, Hkv, T, D]``, strides as TMA takes them. D is 64 or 128; float16 or bfloat16.
        order: int32 ``[Hkv]``.
        out: ``[B, T, Hq, D]``, contiguous.
        scale: of the scores, in base 2.
    """
    batch, q_heads, columns, head_dim = q.shape
    kv_heads = k.shape[1]
    group, tiles = q_heads // kv_heads, -(-columns // BLOCK)
    _causal_kernel[(tiles * group * batch * num_heads,)](
        q, _descriptor(k), _descriptor(v), order, out, *strides(q), scale, columns, tiles, batch,
        KV_HEADS=kv_heads, GROUP=group, D=head_dim, BLOCK=BLOCK, STAGES=STAGES, num_warps=8,
    )  # fmt: skip
