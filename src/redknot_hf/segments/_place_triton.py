"""The Triton program behind `place_kernel`; imported on machines with a GPU only."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["place_kernel"]


@triton.jit(do_not_specialize=["layer"])
def place_kernel(
    p_tiles, p_cos, p_sin, p_k_out, p_v_out, layer, k_stride_h, k_stride_t, v_stride_h, v_stride_t,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    p_tile = p_tiles + tl.program_id(0) * 6
    i_h = tl.program_id(1).to(tl.int64)
    if QUANTISED:
        p_k = tl.load(p_tile).to(tl.pointer_type(tl.int8))
        p_v = tl.load(p_tile + 1).to(tl.pointer_type(tl.int8))
    else:
        p_k = tl.load(p_tile).to(tl.pointer_type(p_k_out.dtype.element_ty))
        p_v = tl.load(p_tile + 1).to(tl.pointer_type(p_v_out.dtype.element_ty))
    tokens = tl.load(p_tile + 3)
    start = tl.load(p_tile + 4)
    first = tl.load(p_tile + 5)
    # [BLOCK]
    o_t = first + tl.arange(0, BLOCK)
    m_t = o_t < tokens
    o_source = (layer.to(tl.int64) * HEADS + i_h) * tokens + o_t
    o_target = start + o_t
    if QUANTISED:
        p_s = tl.load(p_tile + 2).to(tl.pointer_type(tl.float32)) + 2 * o_source
        b_ks = tl.load(p_s, mask=m_t, other=0.0)[:, None]
        b_vs = tl.load(p_s + 1, mask=m_t, other=0.0)[:, None]
    # [BLOCK, 1]; addresses that were loaded carry no alignment, and without it every element would be loaded alone
    p_row = p_k + o_source[:, None] * D
    p_k_target = p_k_out + i_h * k_stride_h + o_target[:, None] * k_stride_t
    if ROTARY > 0 and not INTERLEAVED:
        HALF: tl.constexpr = ROTARY // 2
        o_r = tl.arange(0, BR)
        m_r = m_t[:, None] & (o_r < HALF)[None, :]
        # [BLOCK, BR]: the two coordinates of each plane
        b_cos = tl.load(p_cos + o_target[:, None] * HALF + o_r[None, :], mask=m_r, other=1.0)
        b_sin = tl.load(p_sin + o_target[:, None] * HALF + o_r[None, :], mask=m_r, other=0.0)
        b_a = tl.load(tl.multiple_of(p_row + o_r[None, :], (1, ALIGN)), mask=m_r, other=0).to(tl.float32)
        b_b = tl.load(tl.multiple_of(p_row + HALF + o_r[None, :], (1, ALIGN)), mask=m_r, other=0).to(tl.float32)
        if QUANTISED:
            b_a *= b_ks
            b_b *= b_ks
        b_new = (b_a * b_cos - b_b * b_sin).to(p_k_out.dtype.element_ty)
        tl.store(p_k_target + o_r[None, :], b_new, mask=m_r)
        b_new = (b_b * b_cos + b_a * b_sin).to(p_k_out.dtype.element_ty)
        tl.store(p_k_target + HALF + o_r[None, :], b_new, mask=m_r)
    if ROTARY < D or INTERLEAVED:
        o_d = tl.arange(0, BD)
        m_k = m_t[:, None] & ((o_d < D) & ((o_d >= ROTARY) | INTERLEAVED))[None, :]
        b_k = tl.load(tl.multiple_of(p_row + o_d[None, :], (1, ALIGN)), mask=m_k, other=0)
        if QUANTISED:
            b_k = b_k.to(tl.float32) * b_ks
        if ROTARY > 0 and INTERLEAVED:
            m_r = m_t[:, None] & (o_d < ROTARY)[None, :]
            o_table = o_target[:, None] * (ROTARY // 2) + (o_d // 2)[None, :]
            b_cos = tl.load(p_cos + o_table, mask=m_r, other=1.0)
            b_sin = tl.load(p_sin + o_table, mask=m_r, other=0.0)
            b_sin = tl.where((o_d % 2 == 0)[None, :], -b_sin, b_sin)
            b_partner = tl.load(p_row + (o_d ^ 1)[None, :], mask=m_r, other=0).to(tl.float32)
            if QUANTISED:
                b_partner *= b_ks
            b_k = b_k.to(tl.float32) * b_cos + b_partner * b_sin
        tl.store(p_k_target + o_d[None, :], b_k.to(p_k_out.dtype.element_ty), mask=m_k)
    # [BLOCK, BDV]
    o_v = tl.arange(0, BDV)
    m_v = m_t[:, None] & (o_v < DV)[None, :]
    b_v = tl.load(tl.multiple_of(p_v + o_source[:, None] * DV + o_v[None, :], (1, ALIGN)), mask=m_v, other=0)
    if QUANTISED:
        b_v = (b_v.to(tl.float32) * b_vs).to(p_v_out.dtype.element_ty)
    tl.store(p_v_out + i_h * v_stride_h + o_target[:, None] * v_stride_t + o_v[None, :], b_v, mask=m_v)
