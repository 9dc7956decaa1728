"""`append`: the kernel writes what a loop over positions writes, bit for bit, and nothing else."""

from __future__ import annotations

import random

import pytest
import torch
from segpaged_attention import reference
from segpaged_cases import cases, heads, make_store


@pytest.mark.parametrize(("seed", "where"), cases(16, 16))
def test_append(seed: int, where: tuple[str, torch.dtype]) -> None:
    from segpaged_attention import append_kernel

    device, dtype = where
    r = random.Random(seed)
    spec = [None, *r.sample([(s, w, k) for s in (0, 4, 19) for w in (1, 9, 64, 100) for k in (0, 7)], 2)]
    layer = heads(spec, device)
    columns = r.choice([1, 1, 5, 70, 200])
    past = [r.choice([0, 3, 90]), 0, 150][: r.choice([1, 3])]
    length = [columns, columns // 2, 0][: len(past)] if r.random() < 0.5 else [columns] * len(past)
    padded = length != [columns] * len(past)
    start = [columns - n if r.random() < 0.5 else 0 for n in length]
    sizes = {
        "total": max(past) + columns,
        "head_dim": r.choice([64, 96, 128]),
        "v_dim": r.choice([64, 96, 128]),
        "page_size": r.choice([16, 32, 64, 128]),
        "dtype": dtype,
    }
    before = make_store(seed, past, layer, **sizes)
    after = make_store(seed, [p + n for p, n in zip(past, length, strict=True)], layer, **sizes)
    # the chunk's columns in one buffer for K and V, as a fused projection leaves them; nan where there is padding
    widths = (sizes["head_dim"], sizes["v_dim"])
    fused = torch.full((len(past), columns, len(spec), sum(widths)), float("nan"), dtype=dtype, device=device)
    k, v = fused.transpose(1, 2).split(widths, -1)
    for b, (p, n, c) in enumerate(zip(past, length, start, strict=True)):
        k[b, :, c : c + n], v[b, :, c : c + n] = before.k[b, :, p : p + n], before.v[b, :, p : p + n]
    columns_of = {}
    if padded:
        columns_of = {
            name: torch.tensor(x, dtype=torch.int32, device=device)
            for name, x in (("q_start", start), ("q_len", length))
        }
    append_kernel.append(k, v, *before.pages, before.seq_lens, layer.sink, layer.ring, **columns_of)
    assert torch.equal(before.k_pages, after.k_pages)
    assert torch.equal(before.v_pages, after.v_pages)


@pytest.mark.parametrize(("seed", "where"), cases(4, 8))
def test_relocation(seed: int, where: tuple[str, torch.dtype]) -> None:
    """Rotated in float32 and rounded once: equal to the reference up to one unit in the last place."""
    from segpaged_attention import append_kernel

    device, dtype = where
    rotary, interleaved = ((64, False), (64, True), (48, False), (128, True))[seed % 4]
    layer = heads([None, (4, 9, 0)], device)
    store = make_store(seed, [3, 40], layer, total=60, head_dim=128, page_size=16, dtype=dtype)
    angle = torch.randn(2, rotary // 2, generator=torch.Generator().manual_seed(seed)).to(device) * 100
    k, v = store.k[:, :, :20], store.v[:, :, :20]
    want = store.k_pages.clone()
    options = {"cos": angle.cos(), "sin": angle.sin(), "interleaved": interleaved}
    reference.append(
        k, v, want, store.v_pages.clone(), store.block_table, store.seq_lens, layer.sink, layer.ring, **options
    )
    append_kernel.append(k, v, *store.pages, store.seq_lens, layer.sink, layer.ring, **options)
    worst = (store.k_pages.float() - want.float()).abs().max().item()
    assert worst <= 8 * torch.finfo(dtype).eps  # values reach 8
    assert not torch.equal(
        want[1:], make_store(seed, [3, 40], layer, total=60, head_dim=128, dtype=dtype).k_pages.to(device)[1:]
    )
