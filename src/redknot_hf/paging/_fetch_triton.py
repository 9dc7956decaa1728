"""The Triton program that reads pages from page-locked host memory; imported on machines with a GPU only."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = ["fetch"]

BLOCK = 2048


@triton.jit(do_not_specialize=["count"])
def fetch_kernel(
    k_host, v_host, p_moves, k_out, v_out, count,
    K: tl.constexpr, V: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_page = tl.program_id(0)
    number = tl.load(p_moves + i_page)
    slot = tl.load(p_moves + count + i_page)
    p_k = k_host.to(tl.int64).to(tl.pointer_type(k_out.dtype.element_ty))
    p_v = v_host.to(tl.int64).to(tl.pointer_type(v_out.dtype.element_ty))
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # pages begin at multiples of ALIGN bytes; without that said, every element would be loaded alone
    b_k = tl.load(tl.multiple_of(p_k + number * K, ALIGN) + o_x, mask=o_x < K, other=0.0)
    b_v = tl.load(tl.multiple_of(p_v + number * V, ALIGN) + o_x, mask=o_x < V, other=0.0)
    tl.store(k_out + slot * K + o_x, b_k, mask=o_x < K)
    tl.store(v_out + slot * V + o_x, b_v, mask=o_x < V)


def fetch(
    k_host: torch.Tensor, v_host: torch.Tensor, moves: torch.Tensor, k_out: torch.Tensor, v_out: torch.Tensor
) -> None:
    """Copy pages of page-locked slabs into slots of slabs on the device, on its current stream.

    Args:
        k_host, v_host: ``[pages, page_size, dim]``, page-locked; they must live until the copy has run.
        moves: int64 ``[2, n]`` on the device: page numbers and slots.
        k_out, v_out: ``[slots, page_size, dim]``, contiguous, of the same dtypes.
    """
    K, V = k_host[0].numel(), v_host[0].numel()
    grid = (moves.shape[1], triton.cdiv(max(K, V), BLOCK))
    first = k_host.data_ptr(), v_host.data_ptr()
    align = math.gcd(16, K * k_host.element_size(), V * v_host.element_size(), *first)
    with torch.cuda.device_of(k_out):
        fetch_kernel[grid](*first, moves, k_out, v_out, moves.shape[1], K=K, V=V, ALIGN=align, BLOCK=BLOCK)
