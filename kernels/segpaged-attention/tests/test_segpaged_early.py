"""`decode` plans before the kernel ahead of it has ended: what it reads then may be old, or nonsense."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from segpaged_cases import assert_close, dense, heads, make_store

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter knows no dependent launches", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # noqa: E402


@triton.jit
def _write_late(p_lens, p_new_lens, p_table, p_new_table, p_sum, num_lens, num_entries, BLOCK: tl.constexpr):
    """Lets the next kernel start at once, works for a while, and only then writes what that kernel needs."""
    gdc_launch_dependents()
    gdc_wait()
    o = tl.arange(0, BLOCK)
    b = o.to(tl.float32)
    for _ in range(20000):
        b = b * 0.999 + 1.0
    tl.store(p_sum + o, b)
    tl.store(p_lens + o, tl.load(p_new_lens + o, mask=o < num_lens), mask=o < num_lens)
    tl.store(p_table + o, tl.load(p_new_table + o, mask=o < num_entries), mask=o < num_entries)


@pytest.mark.gpu
@pytest.mark.parametrize("rubbish", [0, 1, 700, -7, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("early", [True, False])
def test_lengths_and_table_written_at_the_last_moment(early: bool, rubbish: int) -> None:
    """Whatever lies in the lengths and the page table until the kernel before ends, the result is that of their end."""
    from segpaged_attention import decode_kernel

    device, dtype, head_dim, group = torch.device("cuda"), torch.bfloat16, 128, 4
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launches need compute capability 9.0")
    layer = heads([None, (4, 64, 0), (64, 256, 0)], "cuda")
    store = make_store(1, [1500, 70, 411], layer, head_dim=head_dim, page_size=64, dtype=dtype)
    q = torch.randn(3, group * 3, 1, head_dim, device=device, dtype=dtype)
    args = (device, dtype, head_dim, head_dim, 64, 1, group, store.k_pages.shape[0])
    config = replace(decode_kernel.choose_config(*args), early=early)
    lens, table = torch.empty_like(store.seq_lens), torch.empty_like(store.block_table)
    work = torch.empty(512, device=device)
    assert max(lens.numel(), table.numel()) <= work.numel()
    per_head, outs = (layer.sink, layer.window, layer.ring), []
    for _ in range(4):
        lens.fill_(rubbish)
        table.fill_(rubbish)
        _write_late[(1,)](
            lens, store.seq_lens, table, store.block_table, work, lens.numel(), table.numel(), BLOCK=512, num_warps=4,
            launch_pdl=True,
        )  # fmt: skip
        pages = (store.k_pages, store.v_pages, table)
        outs.append(decode_kernel.decode(q, *pages, lens, *per_head, 0.09, exact_positions=False, config=config))
    for out in outs:
        assert_close(out, dense(store, q, store.seq_lens[:, None] - 1, 0.09, store.seq_lens))
