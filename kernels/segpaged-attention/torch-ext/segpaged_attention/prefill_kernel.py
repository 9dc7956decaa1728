"""`prefill`: a chunk of new tokens over the pages of its past and over its own K and V, which are not in pages yet.

One program takes BLOCK_M rows of one query head of one sequence; rows, like keys, are counted from the first token of
the chunk, so padding costs nothing. Heads that keep everything and heads that do not are launched apart, because their
best tiles differ. A small chunk on few global heads gives too few programs to fill a device: then several programs
share a tile, each taking a stretch of the past, and a second kernel combines what they leave ("split-KV").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .prefill_tiles import attend_block, attend_causal, attend_pages, block_at, blocks_of
from .tiles import (
    HIDDEN,
    LOG2E,
    device_of,
    model_window_of,
    output_factor,
    page_descriptor,
    strides,
)


@triton.jit
def _load_chunk(
    p_x, i_b, i_h, column, o_t, o_d, stride_t, length, D: tl.constexpr, BD: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BD] of the chunk's K or V: tokens ``o_t``, the first of which is in column ``column``."""
    if TMA:  # rows beyond the last column come as zeros
        b = p_x.load([i_b, i_h, column, 0]).reshape(BLOCK_N, BD)
    else:
        p_t = p_x + (column + tl.arange(0, BLOCK_N))[:, None].to(tl.int64) * stride_t + o_d[None, :]
        if MASK:
            b = tl.load(p_t, mask=(o_t < length)[:, None] & (o_d < D)[None, :], other=0.0)
        elif BD == D:
            b = tl.load(p_t)
        else:
            b = tl.load(p_t, mask=(o_d < D)[None, :], other=0.0)
    return b


@triton.jit(
    do_not_specialize=[
        "table_stride_b", "table_stride_h", "model_window",
        "num_columns", "num_tiles", "batch", "first_head", "num_splits",
    ]
)  # fmt: skip
def _prefill_kernel(
    p_q, p_k, p_v, p_k_pages, p_v_pages, p_table, p_seq_lens, p_sink, p_window, p_ring, p_aux, p_start, p_len, p_order,
    p_out, p_acc, p_max, p_sum,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    table_stride_b, table_stride_h, scale, softcap, model_window, num_columns, num_tiles, batch, first_head, num_splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAST_N: tl.constexpr, PAST: tl.constexpr,
    PADDED: tl.constexpr, SPLIT: tl.constexpr, CAP: tl.constexpr, AUX: tl.constexpr, TMA: tl.constexpr,
    PAST_TMA: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    i_s = 0
    if SPLIT:
        i_s = i_p % num_splits
        i_p = i_p // num_splits
    # tiles of one KV head are neighbours, its query heads innermost; late rows, which see most, come first
    per_item = num_tiles * GROUP
    i_item = i_p // per_item
    i_m = num_tiles - 1 - i_p % per_item // GROUP
    i_b = i_item % batch
    i_h = tl.load(p_order + first_head + i_item // batch)
    head = i_h * GROUP + i_p % GROUP
    past = tl.load(p_seq_lens + i_b)
    sink = tl.load(p_sink + i_h)
    window = tl.load(p_window + i_h)
    ring = tl.load(p_ring + i_h)
    start = 0
    length = num_columns
    if PADDED:
        start = tl.load(p_start + i_b)
        length = tl.load(p_len + i_b)
    row = i_m * BLOCK_M
    if row >= length:
        return
    row_end = tl.minimum(row + BLOCK_M, length)
    i_b64 = i_b.to(tl.int64)
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    m_m = o_m < length
    # [BLOCK_M, BD]
    p_q_head = p_q + i_b64 * q_stride_b + head.to(tl.int64) * q_stride_h
    p_q_row = p_q_head + (start + o_m)[:, None].to(tl.int64) * q_stride_t
    b_q = tl.load(p_q_row + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    b_m = tl.full([BLOCK_M], HIDDEN, tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BDV], tl.float32)
    reach = tl.minimum(window, model_window)  # how far back a row sees anything but sinks

    if PAST:
        # no wrap: slot and position are the same
        straight = past <= sink + ring
        edge = tl.maximum(past + row - reach + 1, 0)  # the first row's oldest key that is no sink
        sink_edge = tl.maximum(past + row - model_window + 1, 0)
        full_end = tl.where(straight, past // PAST_N, 0)
        full = tl.minimum((tl.maximum(past + row_end - reach, 0) + PAST_N - 1) // PAST_N, full_end)
        # straight: sinks, the window's left edge, what the last full block leaves
        c_lo = tl.maximum(full_end * PAST_N, edge)
        # wrapped: sinks, and the newest `count` places of the ring, which may run over its end
        newest = (past - 1 - sink) % ring
        count = tl.minimum(past - edge, ring)
        over = count - newest - 1
        a_hi = tl.where(straight, tl.minimum(tl.minimum(sink, edge), past), sink)
        b_lo = tl.where(straight, edge, sink + tl.maximum(-over, 0))
        b_hi = tl.where(straight, full * PAST_N, tl.where(count > 0, sink + newest + 1, 0))
        c_lo = tl.where(straight, c_lo, sink + ring - over)
        c_hi = tl.where(straight, past, sink + ring)
        if SPLIT:
            # The first program also does all that follows: give it less of the past.
            own = tl.minimum((row + BLOCK_M) // PAST_N, (full_end - full) // num_splits)
            share = full_end - full + own
            full_end = full + tl.maximum((i_s + 1) * share // num_splits - own, 0)
            full = full + tl.maximum(i_s * share // num_splits - own, 0)
            a_hi = tl.where(i_s == 0, a_hi, 0)
            b_hi = tl.where(i_s == 0, b_hi, 0)
            c_hi = tl.where(i_s == 0, c_hi, 0)
        b_m, b_l, b_acc = attend_pages(
            b_q, b_m, b_l, b_acc, past + o_m, p_k_pages, p_v_pages,
            p_table + i_b64 * table_stride_b + i_h * table_stride_h,
            past, sink, window, ring, model_window, scale, softcap,
            full, full_end, sink_edge, a_hi, b_lo, b_hi, c_lo, c_hi,
            D, DV, BD, BDV, PAGE, PAST_N, CAP, PAST_TMA, STAGES, PRECISION,
        )  # fmt: skip

    # the chunk itself; BLOCK_N divides BLOCK_M, so the diagonal starts at a block
    if CAUSAL:
        end = row_end
        if SPLIT:
            end = tl.where(i_s == 0, row_end, 0)
        b_m, b_l, b_acc = attend_causal(
            b_q,
            b_m,
            b_l,
            b_acc,
            p_k,
            p_v,
            i_b,
            i_h,
            row,
            end,
            scale,
            BD,
            BDV,
            BLOCK_M,
            BLOCK_N,
            STAGES,
            PRECISION,
        )
    else:
        p_k_head = p_k
        p_v_head = p_v
        if not TMA:
            p_k_head = p_k + i_b64 * k_stride_b + i_h.to(tl.int64) * k_stride_h
            p_v_head = p_v + i_b64 * v_stride_b + i_h.to(tl.int64) * v_stride_h
        edge = tl.maximum(row - reach + 1, 0)
        full_end = row
        full = tl.minimum((tl.maximum(row_end - reach, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, full_end)
        a_lo = tl.maximum(row - model_window + 1, 0)
        a_hi = tl.minimum(sink - past, edge)
        b_hi = full
        c_hi = row_end
        if SPLIT:
            full_end = tl.where(i_s == 0, full_end, full)
            a_hi = tl.where(i_s == 0, a_hi, 0)
            b_hi = tl.where(i_s == 0, b_hi, 0)
            c_hi = tl.where(i_s == 0, c_hi, 0)
        for token in tl.range(full, full_end, BLOCK_N, num_stages=STAGES):
            o_t = token + o_n
            # [BLOCK_N, BD], [BLOCK_N, BDV]
            b_k = _load_chunk(
                p_k_head, i_b, i_h, start + token, o_t, o_d, k_stride_t, length, D, BD, BLOCK_N, TMA, False
            )
            b_v = _load_chunk(
                p_v_head, i_b, i_h, start + token, o_t, o_v, v_stride_t, length, DV, BDV, BLOCK_N, TMA, False
            )
            b_m, b_l, b_acc = attend_block(b_q, b_k, b_v, b_m, b_l, b_acc, 0, scale, softcap, False, CAP, PRECISION)
        a_n = blocks_of(a_lo, a_hi, BLOCK_N)
        b_n = blocks_of(edge, b_hi, BLOCK_N)
        for i_n in tl.range(0, a_n + b_n + blocks_of(row, c_hi, BLOCK_N), num_stages=2):
            token, lo, hi = block_at(i_n, a_lo, a_hi, edge, b_hi, row, c_hi, a_n, b_n, BLOCK_N)
            o_t = token + o_n
            b_k = _load_chunk(
                p_k_head, i_b, i_h, start + token, o_t, o_d, k_stride_t, length, D, BD, BLOCK_N, TMA, True
            )
            b_v = _load_chunk(
                p_v_head, i_b, i_h, start + token, o_t, o_v, v_stride_t, length, DV, BDV, BLOCK_N, TMA, True
            )
            if PADDED and TMA:
                b_v = tl.where((o_t < length)[:, None], b_v, 0.0)  # padding may hold nan, and 0 * nan is nan
            # [BLOCK_M, BLOCK_N]
            m_s = ((o_t >= lo) & (o_t < hi))[None, :] & (o_t[None, :] <= o_m[:, None])
            m_s = m_s & (o_t[None, :] > o_m[:, None] - model_window)
            m_s = m_s & ((past + o_t < sink)[None, :] | (o_t[None, :] > o_m[:, None] - window))
            b_m, b_l, b_acc = attend_block(b_q, b_k, b_v, b_m, b_l, b_acc, m_s, scale, softcap, True, CAP, PRECISION)

    m_o = m_m[:, None] & (o_v < DV)[None, :]
    if SPLIT:
        i_q = i_item.to(tl.int64) * GROUP + i_p % GROUP
        o_p = (i_q * num_splits + i_s) * num_columns + o_m
        tl.store(p_acc + o_p[:, None] * DV + o_v[None, :], b_acc, mask=m_o)
        tl.store(p_max + o_p, b_m, mask=m_m)
        tl.store(p_sum + o_p, b_l, mask=m_m)
    else:
        b_f = output_factor(b_m, b_l, p_aux, head, True, AUX)
        o_out = ((i_b64 * num_columns + start + o_m) * (KV_HEADS * GROUP) + head) * DV
        b_o = (b_acc * b_f[:, None]).to(p_out.dtype.element_ty)
        tl.store(p_out + o_out[:, None] + o_v[None, :], b_o, mask=m_o)


@triton.jit(do_not_specialize=["num_columns", "batch", "first_head", "num_splits"])
def _combine_kernel(
    p_aux, p_start, p_len, p_order, p_out, p_acc, p_max, p_sum, num_columns, batch, first_head, num_splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BLOCK_T: tl.constexpr,
    PADDED: tl.constexpr, AUX: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of one query head: adds up what the programs that shared their tiles left."""
    i_q, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_item = i_q // GROUP
    i_b = i_item % batch
    head = tl.load(p_order + first_head + i_item // batch) * GROUP + (i_q % GROUP).to(tl.int32)
    start = 0
    length = num_columns
    if PADDED:
        start = tl.load(p_start + i_b)
        length = tl.load(p_len + i_b)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BDV)
    m_t = o_t < length
    m_o = m_t[:, None] & (o_v < DV)[None, :]
    b_top = tl.full([BLOCK_T], HIDDEN, tl.float32)
    b_l = tl.zeros([BLOCK_T], tl.float32)
    b_acc = tl.zeros([BLOCK_T, BDV], tl.float32)
    for i_s in range(0, num_splits):
        o_p = (i_q * num_splits + i_s) * num_columns + o_t
        b_m = tl.load(p_max + o_p, mask=m_t, other=HIDDEN)
        # [BLOCK_T, BDV]
        b_a = tl.load(p_acc + o_p[:, None] * DV + o_v[None, :], mask=m_o, other=0.0)
        b_new = tl.maximum(b_top, b_m)
        b_fade, b_c = tl.exp2(b_top - b_new), tl.exp2(b_m - b_new)
        b_l = b_l * b_fade + tl.load(p_sum + o_p, mask=m_t, other=0.0) * b_c
        b_acc = b_acc * b_fade[:, None] + b_a * b_c[:, None]
        b_top = b_new
    b_f = output_factor(b_top, b_l, p_aux, head, True, AUX)
    o_out = ((i_b * num_columns + start + o_t) * (KV_HEADS * GROUP) + head) * DV
    tl.store(p_out + o_out[:, None] + o_v[None, :], (b_acc * b_f[:, None]).to(p_out.dtype.element_ty), mask=m_o)


@dataclass(frozen=True)
class PrefillConfig:
    """Launch parameters of one class of heads."""

    block_m: int  # query rows
    block_n: int  # keys of the chunk per step; divides block_m
    past_n: int  # keys in pages per step
    stages: int
    warps: int
    tma: bool  # for the chunk's K and V
    past_tma: bool  # for pages
    splits: int = 1


def choose_config(
    device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int, page_size: int, columns: int, big: bool
) -> PrefillConfig:
    """Launch parameters of a head class; `big`: heads that keep everything. Not yet split.

    On an H200 with head_dim 128 in bfloat16, 128 x 128 tiles with 3 stages and 8 warps reach 560 to 580 TFLOP/s on global
    heads (they fill shared memory to 2 KB), and 64 x 64 with 4 warps are best for windows of a few hundred tokens and no
    worse than others for 4096. Tried there without gain: 128 x 64 with two programs on a processor, scaling down what was
    summed up only when the maximum has grown much (a branch in the loop, 15 % slower), and a kernel in Gluon that computes
    exponentials while the matrix unit multiplies the block before (9 % slower).
    """
    facts = device_of(device)
    bd = max(triton.next_power_of_2(head_dim), triton.next_power_of_2(v_dim))
    if dtype == torch.float32:  # multiplied without tensor cores: small tiles
        block_m, block_n, warps = 32, 16, 8
    elif big and columns > 64:
        block_m, block_n, warps = 128, (128 if bd <= 128 else 64) if facts.hopper else 32, 8
    else:
        block_m, block_n, warps = 64, 64 if facts.hopper else 32, 4
    tma = facts.hopper and dtype != torch.float32
    past_n = min(block_n, page_size) if tma and page_size >= 64 else block_n
    stage = 2 * block_n * bd * dtype.itemsize
    buffers = max(1, min(3 if tma else 2, (facts.shared_memory - block_m * bd * dtype.itemsize - (2 << 10)) // stage))
    stages = buffers if facts.hopper else buffers + 1  # before Hopper a pipeline of n stages has n - 1 buffers
    return PrefillConfig(block_m, block_n, past_n, stages, warps, tma, tma and page_size >= 64)


def choose_splits(device: torch.device, programs: int, past_len: int, block_n: int) -> int:
    """Programs that share a tile: as many as fill the device, each with four blocks of the past or more; at most 16."""
    return max(1, min(device_of(device).processors // max(programs, 1), past_len // (4 * block_n), 16))


def _chunk_descriptor(x: torch.Tensor, block_n: int) -> TensorDescriptor | None:
    """TMA descriptor of ``[B, Hkv, T, D]`` with any strides TMA can express, else None."""
    step = [max(stride, x.shape[3]) if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    if x.data_ptr() % 16 or any(s <= 0 or s * x.itemsize % 16 for s in step[:3]):
        return None
    return TensorDescriptor(x, list(x.shape), [*step[:3], 1], [1, 1, block_n, triton.next_power_of_2(x.shape[3])])


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sink: torch.Tensor,
    window: torch.Tensor,
    ring: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    model_window: int = 0,
    q_start: torch.Tensor | None = None,
    q_len: torch.Tensor | None = None,
    head_order: torch.Tensor | None = None,
    num_global: int = -1,
    past_len_hint: int = -1,
    config: tuple[PrefillConfig, PrefillConfig] | None = None,
) -> torch.Tensor:
    """Launch; arguments as in `segpaged_attention.prefill`, already checked.

    `config` is for tuning and tests: of the global heads and of the others, splits included.
    """
    batch, q_heads, columns, head_dim = q.shape
    kv_heads, page_size, v_dim = k.shape[1], k_pages.shape[1], v_pages.shape[2]
    group = q_heads // kv_heads
    shape = (batch, columns, q_heads, v_dim)
    out = q.new_empty(shape) if q_start is None else q.new_zeros(shape)  # padding is written by nobody
    if batch == 0 or columns == 0:
        return out
    if head_order is None:
        head_order = torch.arange(kv_heads, dtype=torch.int32, device=q.device)
    num_global = max(num_global, 0)
    # where nothing is known about the past, the page table says how much there can be
    past_len = past_len_hint if past_len_hint >= 0 else block_table.shape[2] * page_size
    limit = model_window_of(model_window)
    for big, first_head, num_heads in ((True, 0, num_global), (False, num_global, kv_heads - num_global)):
        if num_heads == 0:
            continue
        if config is not None:
            chosen = config[0 if big else 1]
        else:
            chosen = choose_config(q.device, q.dtype, head_dim, v_dim, page_size, columns, big)
            if big:
                programs = num_heads * group * batch * triton.cdiv(columns, chosen.block_m)
                chosen = replace(chosen, splits=choose_splits(q.device, programs, past_len, chosen.past_n))
        new = tuple(_chunk_descriptor(x, chosen.block_n) if chosen.tma else None for x in (k, v))
        tma = None not in new
        past_tma = chosen.past_tma and k_pages.shape[0] * page_size < 1 << 31  # TMA counts rows in int32
        old = (k_pages, v_pages)
        if past_tma:
            old = (page_descriptor(k_pages, chosen.past_n), page_descriptor(v_pages, chosen.past_n))
        # heads that keep everything, and nothing else that hides keys: the common case has a loop of its own
        causal = big and tma and model_window == 0 and softcap == 0 and q_start is None
        split = chosen.splits > 1
        tiles = triton.cdiv(columns, chosen.block_m)
        scratch = (None, None, None)
        if split:
            partials = triton.cdiv(batch * num_heads * group * chosen.splits * columns, 4) * 4
            storage = torch.empty(partials * (v_dim + 2), dtype=torch.float32, device=q.device)
            scratch = storage.split([partials * v_dim, partials, partials])
        _prefill_kernel[(tiles * group * batch * num_heads * chosen.splits,)](
            q, *(new if tma else (k, v)), *old, block_table, seq_lens, sink, window, ring, s_aux, q_start, q_len,
            head_order, out, *scratch, *strides(q), *strides(k), *strides(v), block_table.stride(0),
            block_table.stride(1), scale if softcap else scale * LOG2E, softcap, limit, columns, tiles, batch,
            first_head, chosen.splits, KV_HEADS=kv_heads, GROUP=group, D=head_dim, DV=v_dim,
            BD=triton.next_power_of_2(head_dim), BDV=triton.next_power_of_2(v_dim), PAGE=page_size,
            BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, PAST_N=chosen.past_n, PAST=past_len > 0, PADDED=q_start is
            not None, SPLIT=split, CAP=softcap != 0, AUX=s_aux is not None, TMA=tma, PAST_TMA=past_tma,
            STAGES=chosen.stages, CAUSAL=causal,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=chosen.warps,
        )  # fmt: skip
        if split:
            block_t = 16
            _combine_kernel[(batch * num_heads * group, triton.cdiv(columns, block_t))](
                s_aux, q_start, q_len, head_order, out, *scratch, columns, batch, first_head, chosen.splits,
                KV_HEADS=kv_heads, GROUP=group, DV=v_dim, BDV=triton.next_power_of_2(v_dim), BLOCK_T=block_t,
                PADDED=q_start is not None, AUX=s_aux is not None, num_warps=4,
            )  # fmt: skip
    return out
