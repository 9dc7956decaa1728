"""`append`: new keys and values into the pages of every head of a layer, in one launch.

One program takes BLOCK_T chunk columns of one KV head of one sequence. Tiles whose tokens are already evicted when the
chunk ends (after the sinks, before the last `ring` tokens) return at once, so a long chunk costs a local head nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launching import cdiv, launch, power_of_2
from .tiles import device_of, strides


@triton.jit(do_not_specialize=["table_stride_b", "table_stride_h", "num_columns"])
def _append_kernel(
    p_k, p_v, p_k_pages, p_v_pages, p_table, p_seq_lens, p_sink, p_ring, p_start, p_len, p_cos, p_sin,
    k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, table_stride_b, table_stride_h, num_columns,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    PADDED: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    past = tl.load(p_seq_lens + i_b)
    sink = tl.load(p_sink + i_h)
    ring = tl.load(p_ring + i_h)
    start = 0
    length = num_columns
    if PADDED:
        start = tl.load(p_start + i_b)
        length = tl.load(p_len + i_b)
    oldest = past + length - ring  # what is older than this and no sink is not kept
    column = i_t * BLOCK_T
    first = past + column - start  # position of the tile's first column
    if (first < sink) | (first + BLOCK_T > oldest):
        o_c = column + tl.arange(0, BLOCK_T)
        o_d = tl.arange(0, BD)
        o_v = tl.arange(0, BDV)
        # [BLOCK_T]
        o_pos = past + o_c - start
        m_t = (o_c >= start) & (o_c < start + length) & ((o_pos < sink) | (o_pos >= oldest))
        o_slot = tl.where(o_pos < sink + ring, o_pos, sink + (o_pos - sink) % ring)
        p_row = p_table + i_b * table_stride_b + i_h * table_stride_h
        page = tl.load(p_row + o_slot // PAGE, mask=m_t, other=0)
        o_row = page.to(tl.int64) * PAGE + o_slot % PAGE
        # [BLOCK_T, BD]
        p_k_row = p_k + i_b * k_stride_b + i_h.to(tl.int64) * k_stride_h + o_c[:, None].to(tl.int64) * k_stride_t
        m_k = m_t[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k_row + o_d[None, :], mask=m_k, other=0.0)
        if ROTARY > 0:
            HALF: tl.constexpr = ROTARY // 2
            if INTERLEAVED:
                o_partner = o_d ^ 1
                o_angle = o_d // 2
                is_first = o_d % 2 == 0
            else:
                is_first = o_d < HALF
                o_partner = tl.where(is_first, o_d + HALF, o_d - HALF)
                o_angle = o_d % HALF
            m_d = o_d < ROTARY
            # [BD]
            b_cos = tl.load(p_cos + i_b * HALF + o_angle, mask=m_d, other=1.0)
            b_sin = tl.load(p_sin + i_b * HALF + o_angle, mask=m_d, other=0.0)
            b_sin = tl.where(is_first, -b_sin, b_sin)
            # [BLOCK_T, BD]; the partner comes from the lines just read
            b_partner = tl.load(p_k_row + o_partner[None, :], mask=m_k & m_d[None, :], other=0.0)
            b_k = b_k.to(tl.float32) * b_cos[None, :] + b_partner.to(tl.float32) * b_sin[None, :]
        tl.store(p_k_pages + o_row[:, None] * D + o_d[None, :], b_k.to(p_k_pages.dtype.element_ty), mask=m_k)
        # [BLOCK_T, BDV]
        p_v_row = p_v + i_b * v_stride_b + i_h.to(tl.int64) * v_stride_h + o_c[:, None].to(tl.int64) * v_stride_t
        m_v = m_t[:, None] & (o_v < DV)[None, :]
        b_v = tl.load(p_v_row + o_v[None, :], mask=m_v, other=0.0)
        tl.store(p_v_pages + o_row[:, None] * DV + o_v[None, :], b_v.to(p_v_pages.dtype.element_ty), mask=m_v)


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sink: torch.Tensor,
    ring: torch.Tensor,
    q_start: torch.Tensor | None = None,
    q_len: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Launch; arguments as in `segpaged_attention.append`, already checked."""
    batch, kv_heads, columns, head_dim = k.shape
    if batch == 0 or columns == 0:
        return
    v_dim, page_size = v.shape[3], k_pages.shape[1]
    block_t = 1 if columns == 1 else 64  # a variant for decode, one for chunks
    hopper = device_of(k.device).hopper
    args = (
        k, v, k_pages, v_pages, block_table, seq_lens, sink, ring, q_start, q_len,
        None if cos is None else cos.contiguous(), None if sin is None else sin.contiguous(),
        *strides(k), *strides(v), block_table.stride(0), block_table.stride(1), columns,
    )  # fmt: skip
    constants = {
        "D": head_dim, "DV": v_dim, "BD": power_of_2(head_dim), "BDV": power_of_2(v_dim), "PAGE": page_size,
        "BLOCK_T": block_t, "PADDED": q_start is not None, "ROTARY": 0 if cos is None else 2 * cos.shape[1],
        "INTERLEAVED": interleaved, "PDL": hopper,
    }  # fmt: skip
    options = {"num_warps": 1 if block_t == 1 else 4} | ({"launch_pdl": True} if hopper else {})
    launch(_append_kernel, (cdiv(columns, block_t), kv_heads, batch), args, constants, options)
