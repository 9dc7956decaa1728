"""What the two prefill kernels share: a tile of query rows against blocks of keys, and the walk over pages.

A tile sees a head's keys in at most four stretches: the sinks, the left edge of the window, blocks that all its rows
see in full (no mask, most of the work), and the right edge. Blocks outside them are never read, so a local head costs
O(T * window). Stretches may meet inside a block; each hides the keys outside itself, so no key counts twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import HIDDEN, cap_scores, load_pages, load_tile, slot_to_position


@triton.jit
def attend_block(
    b_q, b_k, b_v, b_m, b_l, b_acc, m_s, scale, softcap, MASK: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax. b_q [M, BD], b_k [N, BD], b_v [N, BDV], m_s [M, N] or anything where not MASK."""
    # [M, N]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASK or CAP:
        b_s = cap_scores(b_s, scale, softcap, CAP)
        if MASK:
            b_s = tl.where(m_s, b_s, HIDDEN)
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_top[:, None])
    else:  # the factor goes into one multiply-add with the subtraction
        b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_top[:, None])
    b_fade = tl.exp2(b_m - b_top)
    b_l = b_l * b_fade + tl.sum(b_p, 1)
    # [M, BDV]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_fade[:, None], input_precision=PRECISION)
    return b_top, b_l, b_acc


@triton.jit
def attend_causal(
    b_q, b_m, b_l, b_acc, p_k, p_v, i_b, i_h, row, end, scale,
    BD: tl.constexpr, BDV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows from `row` on against columns [0, end) of their own chunk, of which only the diagonal hides any.

    One loop for the full blocks and the diagonal, so that the memory pipeline runs dry once and not twice.
    """
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    for token in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        # [BLOCK_N, BD], [BLOCK_N, BDV]
        b_k = p_k.load([i_b, i_h, token, 0]).reshape(BLOCK_N, BD)
        b_v = p_v.load([i_b, i_h, token, 0]).reshape(BLOCK_N, BDV)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if token + BLOCK_N > row:
            b_s = tl.where((token + o_n)[None, :] <= o_m[:, None], b_s, HIDDEN)
        # every row sees column 0, so b_m is the score of a visible key from the first block on
        b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_top[:, None])
        b_fade = tl.exp2(b_m - b_top)
        b_l = b_l * b_fade + tl.sum(b_p, 1)
        # [BLOCK_M, BDV]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_fade[:, None], input_precision=PRECISION)
        b_m = b_top
    return b_m, b_l, b_acc


@triton.jit
def blocks_of(lo, hi, BLOCK_N: tl.constexpr):
    """Blocks that the stretch [lo, hi) touches."""
    return tl.where(hi > lo, (hi + BLOCK_N - 1) // BLOCK_N - lo // BLOCK_N, 0)


@triton.jit
def block_at(i, a_lo, a_hi, b_lo, b_hi, c_lo, c_hi, a_n, b_n, BLOCK_N: tl.constexpr):
    """The i-th block of three stretches laid end to end: where it starts, and the bounds of its stretch."""
    in_a = i < a_n
    in_b = i < a_n + b_n
    lo = tl.where(in_a, a_lo, tl.where(in_b, b_lo, c_lo))
    hi = tl.where(in_a, a_hi, tl.where(in_b, b_hi, c_hi))
    skipped = tl.where(in_a, 0, tl.where(in_b, a_n, a_n + b_n))
    return (lo // BLOCK_N + i - skipped) * BLOCK_N, lo, hi


@triton.jit
def attend_pages(
    b_q, b_m, b_l, b_acc, q_pos, p_k_pages, p_v_pages, p_row, seq_len, sink, window, ring, model_window, scale, softcap,
    full, full_end, a_lo, a_hi, b_lo, b_hi, c_lo, c_hi,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    CAP: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile against stored keys: blocks [full, full_end) without a mask, then three stretches of slots with one."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    n = tl.minimum(seq_len, sink + ring)
    last = tl.maximum(n - 1, 0)  # the first page id is loaded even where there is no block
    page = load_pages(p_row, tl.minimum(full * BLOCK_N, last), o_n, n, PAGE, BLOCK_N)
    for i_n in tl.range(full, full_end, num_stages=STAGES):
        token = i_n * BLOCK_N
        # [BLOCK_N, BD], [BLOCK_N, BDV]
        b_k = load_tile(p_k_pages, page, token, o_n, o_d, D, BD, PAGE, BLOCK_N, TMA)
        b_v = load_tile(p_v_pages, page, token, o_n, o_v, DV, BDV, PAGE, BLOCK_N, TMA)
        page = load_pages(p_row, tl.minimum(i_n + 1, full_end - 1) * BLOCK_N, o_n, n, PAGE, BLOCK_N)
        b_m, b_l, b_acc = attend_block(b_q, b_k, b_v, b_m, b_l, b_acc, 0, scale, softcap, False, CAP, PRECISION)
    a_n = blocks_of(a_lo, a_hi, BLOCK_N)
    b_n = blocks_of(b_lo, b_hi, BLOCK_N)
    blocks = a_n + b_n + blocks_of(c_lo, c_hi, BLOCK_N)
    newest = (seq_len - 1 - sink) % ring
    token, lo, hi = block_at(0, a_lo, a_hi, b_lo, b_hi, c_lo, c_hi, a_n, b_n, BLOCK_N)
    page = load_pages(p_row, tl.maximum(tl.minimum(token, last), 0), o_n, n, PAGE, BLOCK_N)
    for i_n in tl.range(0, blocks, num_stages=2):
        token, lo, hi = block_at(i_n, a_lo, a_hi, b_lo, b_hi, c_lo, c_hi, a_n, b_n, BLOCK_N)
        b_k = load_tile(p_k_pages, page, token, o_n, o_d, D, BD, PAGE, BLOCK_N, TMA)
        b_v = load_tile(p_v_pages, page, token, o_n, o_v, DV, BDV, PAGE, BLOCK_N, TMA)
        i_next = tl.minimum(i_n + 1, blocks - 1)
        next_token, _lo, _hi = block_at(i_next, a_lo, a_hi, b_lo, b_hi, c_lo, c_hi, a_n, b_n, BLOCK_N)
        page = load_pages(p_row, next_token, o_n, n, PAGE, BLOCK_N)
        o_slot = token + o_n
        # Slots outside of the stretch hold anything, and 0 times nan is nan.
        m_t = (o_slot >= lo) & (o_slot < hi)
        b_v = tl.where(m_t[:, None], b_v, 0.0)
        # [M, BLOCK_N]
        pos = slot_to_position(o_slot, seq_len, sink, ring, newest)[None, :]
        m_s = m_t[None, :] & (pos <= q_pos[:, None]) & (pos > q_pos[:, None] - model_window)
        m_s = m_s & ((pos < sink) | (pos > q_pos[:, None] - window))
        b_m, b_l, b_acc = attend_block(b_q, b_k, b_v, b_m, b_l, b_acc, m_s, scale, softcap, True, CAP, PRECISION)
    return b_m, b_l, b_acc
