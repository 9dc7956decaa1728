"""The overlapping kernel of long prompts: what the compiler made of it, and on a GPU what comes out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from segpaged_cases import assert_close

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton's interpreter knows no Gluon", allow_module_level=True)

from segpaged_attention import causal_kernel, prefill_kernel, reference
from segpaged_offline import SM90, Problem, catch, machine_code, resources

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=pytest.mark.slow)])
def test_exponentials_while_values_are_multiplied(
    head_dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the loop the exponentials stand between the wait for the scores and the wait for the values."""
    choose = prefill_kernel.choose_config
    monkeypatch.setattr(prefill_kernel, "choose_config", lambda *args: replace(choose(*args), overlap=True))
    launches = catch(monkeypatch, SM90, lambda: Problem(head_dim=head_dim).prefill(4096, 0))
    launch = next(x for x in launches if x.kernel.__name__ == "_causal_kernel")
    kernel = launch.compile(90)
    registers, stack = resources(kernel, tmp_path)
    assert kernel.metadata.shared <= (SM90.shared_memory if head_dim == 128 else SM90.shared_memory // 2)
    assert registers <= 255 and stack <= 32
    code = machine_code(kernel, tmp_path)
    waits = [i for i, line in enumerate(code) if "WARPGROUP.DEPBAR" in line]
    scores = next(i for i in waits if "0x1" in code[i].split("DEPBAR")[1])
    values = next(i for i in waits if i > scores)
    assert sum("MUFU.EX2" in line for line in code[scores:values]) >= 64
    # and nothing that was kept in local memory is fetched in there
    assert not any("LDL" in line or "STL" in line for line in code[scores:values])


def chunk(seed: int, batch: int, columns: int, head_dim: int, dtype: torch.dtype, strided: bool) -> list[torch.Tensor]:
    """q, k, v of a model: 8 query heads and 2 KV heads."""
    gen = torch.Generator("cuda").manual_seed(seed)
    size = (batch, columns, 12, head_dim)
    packed = torch.randn(size, generator=gen, device="cuda").to(dtype).transpose(1, 2)
    parts = packed.split([8, 2, 2], 1)
    return list(parts) if strided else [x.contiguous() for x in parts]


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, overlap: bool = True) -> torch.Tensor:
    """`prefill` with nothing stored, all heads global."""
    batch, page_size = q.shape[0], 64
    pages = [torch.zeros(1, page_size, q.shape[3], dtype=q.dtype, device=q.device) for _ in range(2)]
    table = torch.zeros(batch, 2, 1, dtype=torch.int32, device=q.device)
    lens, sink = table[:, 0, 0].clone(), torch.zeros(2, dtype=torch.int32, device=q.device)
    window = torch.full_like(sink, 1 << 30)
    args = (q.device, q.dtype, q.shape[3], q.shape[3], page_size, max(q.shape[2], 65), True)
    config = replace(prefill_kernel.choose_config(*args), overlap=overlap)
    order = torch.tensor([1, 0], dtype=torch.int32, device=q.device)
    return prefill_kernel.prefill(
        q, k, v, *pages, table, lens, sink, window, window, 0.11, head_order=order, num_global=2, past_len_hint=0,
        config=(config, config),
    )  # fmt: skip


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    columns = q.shape[2]
    seen = torch.ones(columns, columns, dtype=torch.bool, device=q.device).tril().expand(q.shape[0], 2, -1, -1)
    return reference.attend(q.float(), k, v, seen, 0.11, 0.0, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("batch", "columns"), [(1, 1), (2, 128), (3, 129), (1, 500), (2, 1000), (1, 2049)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("strided", [False, True])
def test_causal(batch: int, columns: int, head_dim: int, dtype: torch.dtype, strided: bool) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    q, k, v = chunk(columns, batch, columns, head_dim, dtype, strided)
    assert_close(run(q, k, v), dense(q, k, v))


@pytest.mark.gpu
def test_causal_is_what_prefill_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where launch parameters say so, and else not."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    called = []
    kept = causal_kernel.causal
    monkeypatch.setattr(causal_kernel, "causal", lambda *args, **more: called.append(1) or kept(*args, **more))
    q, k, v = chunk(0, 1, 300, 128, BF16, False)
    for overlap in (False, True):
        called.clear()
        run(q, k, v, overlap)
        assert called == [1] * overlap
