"""The Triton program behind `sha256_kernel`; imported on machines with a GPU only.

FIPS 180-4, one message per lane: SHA-256 is sequential within a message, so the lanes of a warp take different ones.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sha256_kernel"]


@triton.jit
def _turn(x, N: tl.constexpr):
    return (x >> N) | (x << (32 - N))


@triton.jit
def _step(a, b, c, d, e, f, g, h, w, p_round):
    """The new d and h, which the next step calls e and a."""
    t = h + (_turn(e, 6) ^ _turn(e, 11) ^ _turn(e, 25)) + (g ^ (e & (f ^ g))) + (w + tl.load(p_round))
    return d + t, t + (_turn(a, 2) ^ _turn(a, 13) ^ _turn(a, 22)) + ((a & b) | (c & (a | b)))


@triton.jit
def _steps(a, b, c, d, e, f, g, h, w0, w1, w2, w3, w4, w5, w6, w7, p_rounds):
    d, h = _step(a, b, c, d, e, f, g, h, w0, p_rounds)
    c, g = _step(h, a, b, c, d, e, f, g, w1, p_rounds + 1)
    b, f = _step(g, h, a, b, c, d, e, f, w2, p_rounds + 2)
    a, e = _step(f, g, h, a, b, c, d, e, w3, p_rounds + 3)
    h, d = _step(e, f, g, h, a, b, c, d, w4, p_rounds + 4)
    g, c = _step(d, e, f, g, h, a, b, c, w5, p_rounds + 5)
    f, b = _step(c, d, e, f, g, h, a, b, w6, p_rounds + 6)
    e, a = _step(b, c, d, e, f, g, h, a, w7, p_rounds + 7)
    return a, b, c, d, e, f, g, h


@triton.jit
def _next(w0, w1, w9, w14):
    small = _turn(w1, 7) ^ _turn(w1, 18) ^ (w1 >> 3)
    return w0 + small + w9 + (_turn(w14, 17) ^ _turn(w14, 19) ^ (w14 >> 10))


@triton.jit
def _schedule(w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15):
    """The sixteen words after these."""
    w0 = _next(w0, w1, w9, w14)
    w1 = _next(w1, w2, w10, w15)
    w2 = _next(w2, w3, w11, w0)
    w3 = _next(w3, w4, w12, w1)
    w4 = _next(w4, w5, w13, w2)
    w5 = _next(w5, w6, w14, w3)
    w6 = _next(w6, w7, w15, w4)
    w7 = _next(w7, w8, w0, w5)
    w8 = _next(w8, w9, w1, w6)
    w9 = _next(w9, w10, w2, w7)
    w10 = _next(w10, w11, w3, w8)
    w11 = _next(w11, w12, w4, w9)
    w12 = _next(w12, w13, w5, w10)
    w13 = _next(w13, w14, w6, w11)
    w14 = _next(w14, w15, w7, w12)
    w15 = _next(w15, w0, w8, w13)
    return w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15


@triton.jit
def _swapped(x):
    """Big-endian."""
    return (x << 24) | ((x & 0xFF00) << 8) | ((x >> 8) & 0xFF00) | (x >> 24)


@triton.jit
def _words(p_message, i, pairs, m_block):
    """Words ``2 i`` and ``2 i + 1`` of the padded message as numbers, without the length at its end."""
    x = tl.load(p_message + i, mask=m_block & (i < pairs), other=0)
    first, second = _swapped(x.to(tl.uint32)), _swapped((x >> 32).to(tl.uint32))
    return tl.where(i == pairs, tl.full([1], 0x80000000, tl.uint32), first), second


@triton.jit(do_not_specialize=["count", "most"])
def sha256_kernel(p_messages, p_rounds, p_out, count, most, LANES: tl.constexpr):
    # p_messages: [count, 2] address and bytes; p_rounds: the 64 constants; most: blocks of the longest message
    p_rounds = p_rounds.to(tl.pointer_type(tl.uint32))
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    m_lane = lane < count
    p_message = tl.load(p_messages + lane * 2, mask=m_lane, other=0).to(tl.pointer_type(tl.uint64))
    size = tl.load(p_messages + lane * 2 + 1, mask=m_lane, other=0)
    pairs = (size // 8).to(tl.int32)
    blocks = tl.where(m_lane, (size + 72) // 64, 0).to(tl.int32)
    zero = tl.full([LANES], 0, tl.uint32)
    a0 = zero + tl.full([1], 0x6A09E667, tl.uint32)
    b0 = zero + tl.full([1], 0xBB67AE85, tl.uint32)
    c0 = zero + tl.full([1], 0x3C6EF372, tl.uint32)
    d0 = zero + tl.full([1], 0xA54FF53A, tl.uint32)
    e0 = zero + tl.full([1], 0x510E527F, tl.uint32)
    f0 = zero + tl.full([1], 0x9B05688C, tl.uint32)
    g0 = zero + tl.full([1], 0x1F83D9AB, tl.uint32)
    h0 = zero + tl.full([1], 0x5BE0CD19, tl.uint32)
    for block in range(most):
        m = block < blocks
        i = block * 8
        final = block == blocks - 1
        w0, w1 = _words(p_message, i, pairs, m)
        w2, w3 = _words(p_message, i + 1, pairs, m)
        w4, w5 = _words(p_message, i + 2, pairs, m)
        w6, w7 = _words(p_message, i + 3, pairs, m)
        w8, w9 = _words(p_message, i + 4, pairs, m)
        w10, w11 = _words(p_message, i + 5, pairs, m)
        w12, w13 = _words(p_message, i + 6, pairs, m)
        w14, w15 = _words(p_message, i + 7, pairs, m)
        w14 = tl.where(final, zero, w14)  # a message is shorter than 2**29 bytes
        w15 = tl.where(final, (size * 8).to(tl.uint32), w15)
        a, b, c, d, e, f, g, h = a0, b0, c0, d0, e0, f0, g0, h0
        for sixteen in range(0, 64, 16):  # written out, all 64 rounds take a compiler half a minute
            p_sixteen = p_rounds + sixteen
            a, b, c, d, e, f, g, h = _steps(a, b, c, d, e, f, g, h, w0, w1, w2, w3, w4, w5, w6, w7, p_sixteen)
            a, b, c, d, e, f, g, h = _steps(a, b, c, d, e, f, g, h, w8, w9, w10, w11, w12, w13, w14, w15, p_sixteen + 8)
            w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _schedule(
                w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15
            )
        a0 = tl.where(m, a0 + a, a0)
        b0 = tl.where(m, b0 + b, b0)
        c0 = tl.where(m, c0 + c, c0)
        d0 = tl.where(m, d0 + d, d0)
        e0 = tl.where(m, e0 + e, e0)
        f0 = tl.where(m, f0 + f, f0)
        g0 = tl.where(m, g0 + g, g0)
        h0 = tl.where(m, h0 + h, h0)
    p_digest = p_out + lane * 8
    tl.store(p_digest, a0.to(tl.int32, bitcast=True), mask=m_lane)
    tl.store(p_digest + 1, b0.to(tl.int32, bitcast=True), mask=m_lane)
    tl.store(p_digest + 2, c0.to(tl.int32, bitcast=True), mask=m_lane)
    tl.store(p_digest + 3, d0.to(tl.int32, bitcast=True), mask=m_lane)
    tl.store(p_digest + 4, e0.to(tl.int32, bitcast=True), mask=m_lane)
    tl.store(p_digest + 5, f0.to(tl.int32, bitcast=True), mask=m_lane)
    tl.store(p_digest + 6, g0.to(tl.int32, bitcast=True), mask=m_lane)
    tl.store(p_digest + 7, h0.to(tl.int32, bitcast=True), mask=m_lane)
