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
def _step(a, b, c, d, e, f, g, h, w, K: tl.constexpr):
    """The new d and h, which the next step calls e and a."""
    t = h + (_turn(e, 6) ^ _turn(e, 11) ^ _turn(e, 25)) + (g ^ (e & (f ^ g))) + w + tl.full([1], K, tl.uint32)
    return d + t, t + (_turn(a, 2) ^ _turn(a, 13) ^ _turn(a, 22)) + ((a & b) | (c & (a | b)))


@triton.jit
def _steps(
    a, b, c, d, e, f, g, h, w0, w1, w2, w3, w4, w5, w6, w7,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr,
    K4: tl.constexpr, K5: tl.constexpr, K6: tl.constexpr, K7: tl.constexpr,
):  # fmt: skip
    d, h = _step(a, b, c, d, e, f, g, h, w0, K0)
    c, g = _step(h, a, b, c, d, e, f, g, w1, K1)
    b, f = _step(g, h, a, b, c, d, e, f, w2, K2)
    a, e = _step(f, g, h, a, b, c, d, e, w3, K3)
    h, d = _step(e, f, g, h, a, b, c, d, w4, K4)
    g, c = _step(d, e, f, g, h, a, b, c, w5, K5)
    f, b = _step(c, d, e, f, g, h, a, b, w6, K6)
    e, a = _step(b, c, d, e, f, g, h, a, w7, K7)
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
def _word(p_message, i, words, m_block):
    """Word ``i`` of the padded message as a big-endian number, without the length at its end."""
    x = tl.load(p_message + i, mask=m_block & (i < words), other=0)
    x = (x << 24) | ((x & 0xFF00) << 8) | ((x >> 8) & 0xFF00) | (x >> 24)
    return tl.where(i == words, tl.full([1], 0x80000000, tl.uint32), x)


@triton.jit
def sha256_kernel(p_messages, p_out, count, most, LANES: tl.constexpr):  # most: blocks of the longest message
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    m_lane = lane < count
    p_message = tl.load(p_messages + lane * 2, mask=m_lane, other=0).to(tl.pointer_type(tl.uint32))
    size = tl.load(p_messages + lane * 2 + 1, mask=m_lane, other=0)
    words = (size // 4).to(tl.int32)
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
        i = block * 16
        final = block == blocks - 1
        w0 = _word(p_message, i, words, m)
        w1 = _word(p_message, i + 1, words, m)
        w2 = _word(p_message, i + 2, words, m)
        w3 = _word(p_message, i + 3, words, m)
        w4 = _word(p_message, i + 4, words, m)
        w5 = _word(p_message, i + 5, words, m)
        w6 = _word(p_message, i + 6, words, m)
        w7 = _word(p_message, i + 7, words, m)
        w8 = _word(p_message, i + 8, words, m)
        w9 = _word(p_message, i + 9, words, m)
        w10 = _word(p_message, i + 10, words, m)
        w11 = _word(p_message, i + 11, words, m)
        w12 = _word(p_message, i + 12, words, m)
        w13 = _word(p_message, i + 13, words, m)
        w14 = tl.where(final, zero, _word(p_message, i + 14, words, m))  # a message is shorter than 2**29 bytes
        w15 = tl.where(final, (size * 8).to(tl.uint32), _word(p_message, i + 15, words, m))
        a, b, c, d, e, f, g, h = _steps(
            a0, b0, c0, d0, e0, f0, g0, h0, w0, w1, w2, w3, w4, w5, w6, w7,
            0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
        )  # fmt: skip
        a, b, c, d, e, f, g, h = _steps(
            a, b, c, d, e, f, g, h, w8, w9, w10, w11, w12, w13, w14, w15,
            0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
        )  # fmt: skip
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _schedule(
            w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15
        )
        a, b, c, d, e, f, g, h = _steps(
            a, b, c, d, e, f, g, h, w0, w1, w2, w3, w4, w5, w6, w7,
            0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
        )  # fmt: skip
        a, b, c, d, e, f, g, h = _steps(
            a, b, c, d, e, f, g, h, w8, w9, w10, w11, w12, w13, w14, w15,
            0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
        )  # fmt: skip
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _schedule(
            w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15
        )
        a, b, c, d, e, f, g, h = _steps(
            a, b, c, d, e, f, g, h, w0, w1, w2, w3, w4, w5, w6, w7,
            0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
        )  # fmt: skip
        a, b, c, d, e, f, g, h = _steps(
            a, b, c, d, e, f, g, h, w8, w9, w10, w11, w12, w13, w14, w15,
            0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
        )  # fmt: skip
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _schedule(
            w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15
        )
        a, b, c, d, e, f, g, h = _steps(
            a, b, c, d, e, f, g, h, w0, w1, w2, w3, w4, w5, w6, w7,
            0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
        )  # fmt: skip
        a, b, c, d, e, f, g, h = _steps(
            a, b, c, d, e, f, g, h, w8, w9, w10, w11, w12, w13, w14, w15,
            0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
        )  # fmt: skip
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
