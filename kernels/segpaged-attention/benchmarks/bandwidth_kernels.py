"""Kernels that read or copy memory and do next to nothing else: what a memory-bound kernel can reach at best."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(p_x, p_out, n, BLOCK: tl.constexpr, REPEAT: tl.constexpr):
    i_p = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(REPEAT):
        o = (i_p * REPEAT + i) * BLOCK + tl.arange(0, BLOCK)
        b_sum += tl.load(p_x + o, mask=o < n, other=0.0).to(tl.float32)
    tl.store(p_out + i_p, tl.sum(b_sum, 0))


@triton.jit
def copy_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n, other=0.0), mask=o < n)
