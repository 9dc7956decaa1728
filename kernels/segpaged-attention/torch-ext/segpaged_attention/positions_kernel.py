"""`prefill_positions`: rows at given, increasing positions over pages in which slot and position are the same.

This is how a splice recomputes some rows of a prompt: the rows' own keys are already in the pages, and each row sees
what its position sees. One program takes BLOCK_M rows of one query head; rows that are neighbours in the call may be
far apart in the prompt, so a tile reads from the first key that its first row sees to the last key that its last row
sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .prefill_kernel import PrefillConfig, choose_config
from .prefill_tiles import attend_pages
from .support import KEEP_ALL
from .tiles import HIDDEN, LOG2E, model_window_of, output_factor, page_descriptor, strides

_KEEP_ALL = tl.constexpr(KEEP_ALL)


@triton.jit(
    do_not_specialize=[
        "pos_stride_b",
        "table_stride_b",
        "table_stride_h",
        "model_window",
        "num_rows",
        "num_tiles",
        "batch",
    ]
)
def _positions_kernel(
    p_q, p_pos, p_k_pages, p_v_pages, p_table, p_kv_lens, p_sink, p_window, p_aux, p_out,
    q_stride_b, q_stride_h, q_stride_t, pos_stride_b, table_stride_b, table_stride_h,
    scale, softcap, model_window, num_rows, num_tiles, batch,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAP: tl.constexpr, AUX: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    # tiles of one KV head are neighbours, its query heads innermost; late rows, which see most, come first
    per_item = num_tiles * GROUP
    i_item = i_p // per_item
    i_m = num_tiles - 1 - i_p % per_item // GROUP
    i_b = (i_item % batch).to(tl.int64)
    i_h = i_item // batch
    head = i_h * GROUP + i_p % GROUP
    kv_len = tl.load(p_kv_lens + i_b)
    sink = tl.load(p_sink + i_h)
    window = tl.load(p_window + i_h)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    m_m = o_m < num_rows
    # [BLOCK_M]; padding rows are at -1
    q_pos = tl.load(p_pos + i_b * pos_stride_b + o_m, mask=m_m, other=-1)
    oldest = tl.min(tl.where(q_pos >= 0, q_pos, _KEEP_ALL), 0)
    newest = tl.max(q_pos, 0)
    # [BLOCK_M, BD]
    p_q_row = p_q + i_b * q_stride_b + head.to(tl.int64) * q_stride_h + o_m[:, None].to(tl.int64) * q_stride_t
    b_q = tl.load(p_q_row + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    b_m = tl.full([BLOCK_M], HIDDEN, tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BDV], tl.float32)

    reach = tl.minimum(window, model_window)  # how far back a row sees anything but sinks
    end = tl.minimum(newest + 1, kv_len)  # 0 where all rows are padding
    edge = tl.maximum(oldest - reach + 1, 0)
    sink_edge = tl.maximum(oldest - model_window + 1, 0)
    full_end = tl.minimum(oldest + 1, end) // BLOCK_N
    full = tl.minimum((tl.maximum(newest - reach + 1, 0) + BLOCK_N - 1) // BLOCK_N, full_end)
    p_row = p_table + i_b * table_stride_b + i_h * table_stride_h
    sinks_end = tl.minimum(tl.minimum(sink, edge), end)
    tail = tl.maximum(full_end * BLOCK_N, edge)
    b_m, b_l, b_acc = attend_pages(
        b_q, b_m, b_l, b_acc, q_pos, p_k_pages, p_v_pages, p_row, kv_len, sink, window, _KEEP_ALL, model_window, scale,
        softcap, full, full_end, sink_edge, sinks_end, edge, full * BLOCK_N, tail, end,
        D, DV, BD, BDV, PAGE, BLOCK_N, CAP, TMA, STAGES, PRECISION,
    )  # fmt: skip
    b_f = tl.where(q_pos >= 0, output_factor(b_m, b_l, p_aux, head, True, AUX), 0.0)
    o_out = ((i_b * num_rows + o_m) * (KV_HEADS * GROUP) + head) * DV
    b_o = (b_acc * b_f[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_out[:, None] + o_v[None, :], b_o, mask=m_m[:, None] & (o_v < DV)[None, :])


def prefill_positions(
    q: torch.Tensor,
    q_pos: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    sink: torch.Tensor,
    window: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    model_window: int = 0,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Launch; arguments as in `segpaged_attention.prefill_positions`, checked. `config` is for tuning and tests."""
    batch, q_heads, rows, head_dim = q.shape
    kv_heads, page_size, v_dim = block_table.shape[1], k_pages.shape[1], v_pages.shape[2]
    out = q.new_empty(batch, rows, q_heads, v_dim)
    if out.numel() == 0:
        return out
    group = q_heads // kv_heads
    chosen = config or choose_config(q.device, q.dtype, head_dim, v_dim, page_size, rows, True)
    tma = chosen.past_tma and k_pages.shape[0] * page_size < 1 << 31  # TMA counts rows in int32
    pool = (k_pages, v_pages)
    if tma:
        pool = (page_descriptor(k_pages, chosen.past_n), page_descriptor(v_pages, chosen.past_n))
    q_pos = q_pos.contiguous()
    tiles = triton.cdiv(rows, chosen.block_m)
    _positions_kernel[(tiles * group * batch * kv_heads,)](
        q, q_pos, *pool, block_table, kv_lens, sink, window, s_aux, out,
        *strides(q), q_pos.stride(0), block_table.stride(0), block_table.stride(1),
        scale if softcap else scale * LOG2E, softcap, model_window_of(model_window), rows, tiles, batch,
        KV_HEADS=kv_heads, GROUP=group, D=head_dim, DV=v_dim, BD=triton.next_power_of_2(head_dim),
        BDV=triton.next_power_of_2(v_dim), PAGE=page_size, BLOCK_M=chosen.block_m, BLOCK_N=chosen.past_n, CAP=softcap !=
        0, AUX=s_aux is not None, TMA=tma, STAGES=chosen.stages,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=chosen.warps,
    )  # fmt: skip
    return out
