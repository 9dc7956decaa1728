"""What a row does not see never reaches it, not even as nan: 0 times nan is nan, and hidden slots hold anything."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from segpaged_attention import reference
from segpaged_cases import KEEP_ALL, Heads, Store, assert_close, cases, dense, heads, make_store

NAN, INF = float("nan"), float("inf")


def poison(store: Store, k_value: float, v_value: float) -> None:
    """Every slot that holds no token, and every token that no row at or after the newest position sees."""
    sink, window, ring = (x.long()[None, :, None] for x in (store.heads.sink, store.heads.window, store.heads.ring))
    batch, kv_heads, max_pages = store.block_table.shape
    page_size = store.k_pages.shape[1]
    slot = torch.arange(max_pages * page_size, device=sink.device)[None, None]
    n = store.seq_lens.long()[:, None, None]
    pos = torch.where((n <= sink + ring) | (slot < sink), slot, n - 1 - (n - 1 - slot) % ring)
    hidden = (slot >= torch.minimum(n, sink + ring)) | ((pos >= sink) & (pos <= n - 1 - window))
    page = store.block_table.long().repeat_interleave(page_size, 2)
    at = (page[hidden], (slot % page_size).expand(batch, kv_heads, -1)[hidden])
    store.k_pages[at] = k_value
    store.v_pages[at] = v_value
    store.k_pages[0], store.v_pages[0] = k_value, v_value


def draw(seed: int) -> dict:
    r = random.Random(seed)
    return {
        "page_size": r.choice([16, 64, 128]),
        "spec": [None, (4, 33, 7), (19, 100, 9)],
        "lens": [r.choice([5, 70, 150]), 0, 201],
        "values": [(NAN, NAN), (INF, -INF), (0.0, NAN), (0.0, INF)][seed % 4],
        "group": r.choice([1, 4]),
        "head_dim": r.choice([64, 96]),
    }


@pytest.mark.parametrize(("seed", "where"), cases(6, 8))
def test_decode(seed: int, where: tuple[str, torch.dtype]) -> None:
    from segpaged_attention import decode_kernel

    device, dtype = where
    case = draw(seed)
    rows = (1, 3)[seed % 2]
    spec = case["spec"] if rows > 1 or seed % 3 else [None, (4, 33, 0), (19, 100, 0)]
    layer = heads(spec, device)
    store = make_store(seed, case["lens"], layer, head_dim=case["head_dim"], page_size=case["page_size"], dtype=dtype)
    gen = torch.Generator().manual_seed(seed)
    size = (len(case["lens"]), rows, len(spec) * case["group"], case["head_dim"])
    q = torch.randn(size, generator=gen).to(device, dtype).transpose(1, 2)
    q_pos = store.seq_lens[:, None] - rows + torch.arange(rows, device=device)[None, :]
    want = dense(store, q, q_pos, 0.2, store.seq_lens)
    # what the oldest row sees is not hidden
    poison(replace(store, heads=Heads(layer.sink, layer.window + rows - 1, layer.ring)), *case["values"])
    chosen = decode_kernel.choose_config(
        torch.device(device), dtype, case["head_dim"], case["head_dim"], case["page_size"], rows, case["group"], 100
    )
    if device == "cpu":
        chosen = replace(chosen, programs=(1, 5)[seed % 2], early=seed % 3 == 0)
    args = (q, *store.pages, store.seq_lens, layer.sink, layer.window, layer.ring, 0.2)
    exact = rows > 1 or bool(seed % 3)
    assert_close(decode_kernel.decode(*args, exact_positions=exact, config=chosen), want)
    assert_close(reference.decode(*args), want)


def chunk(seed: int, where: tuple[str, torch.dtype], columns: int, spec: list, past: list[int]) -> tuple:
    """A store of `past` tokens, and the next `columns` tokens as a chunk; queries of two heads per KV head."""
    device, dtype = where
    case = draw(seed)
    layer = heads(spec, device)
    store = make_store(
        seed, past, layer, total=max(past) + columns, head_dim=64, page_size=case["page_size"], dtype=dtype
    )
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(len(past), columns, 2 * len(spec), 64, generator=gen).to(*where).transpose(1, 2)
    text = torch.stack([torch.arange(n, n + columns, device=device) for n in past])
    k, v = (
        x[torch.arange(len(past))[:, None], :, text].transpose(1, 2).contiguous().transpose(1, 2).contiguous()
        for x in (store.k.transpose(1, 2).transpose(1, 2), store.v)
    )
    return case, layer, store, q, text, k.transpose(1, 2), v.transpose(1, 2)


@pytest.mark.parametrize(("seed", "where"), cases(6, 8))
def test_prefill_over_poisoned_pages(seed: int, where: tuple[str, torch.dtype]) -> None:
    from segpaged_attention import prefill_kernel

    device, dtype = where
    case, layer, store, q, text, k, v = chunk(seed, where, 70, [None, (4, 33, 7), (19, 100, 9)], [150, 61])
    want = dense(store, q, text, 0.2)
    poison(store, *case["values"])
    config = []
    for big in (True, False):
        chosen = prefill_kernel.choose_config(torch.device(device), dtype, 64, 64, case["page_size"], 70, big)
        if device == "cpu":
            tma = seed % 2 == 0
            chosen = replace(
                chosen, block_m=64, block_n=32, past_n=32, tma=tma, past_tma=tma and case["page_size"] >= 32
            )
        config.append(replace(chosen, splits=(1, 3)[seed % 3 == 0] if big else 1))
    args = (q, k, v, *store.pages, store.seq_lens, layer.sink, layer.window, layer.ring, 0.2)
    order = torch.arange(3, dtype=torch.int32, device=device)
    got = prefill_kernel.prefill(*args, head_order=order, num_global=1, past_len_hint=150, config=tuple(config))
    assert_close(got, want)
    assert_close(reference.prefill(*args), want)


@pytest.mark.parametrize(("seed", "where"), cases(3, 6))
def test_positions(seed: int, where: tuple[str, torch.dtype]) -> None:
    """A splice's rows see no token that comes after them, nor one beyond their window, whatever it holds."""
    from segpaged_attention import positions_kernel

    device, dtype = where
    layer, everything = heads([None, (4, 33, 0)], device), heads([None, None], device)
    store = make_store(seed, [150], everything, head_dim=64, page_size=(16, 64)[seed % 2], dtype=dtype)
    store.heads = layer
    gen = torch.Generator().manual_seed(seed)
    q_pos = torch.randperm(60, generator=gen)[:20].sort().values.int()[None].to(device) + 60
    q = torch.randn(1, 20, 4, 64, generator=gen).to(*where).transpose(1, 2)
    want = dense(store, q, q_pos, 0.2, store.seq_lens)
    store.heads = Heads(layer.sink, torch.full_like(layer.window, KEEP_ALL), torch.full_like(layer.ring, KEEP_ALL))
    kept, store.seq_lens = store.seq_lens, q_pos.max(1).values + 1
    poison(store, NAN, INF)
    args = (q, q_pos, *store.pages, kept, layer.sink, layer.window, 0.2)
    assert_close(positions_kernel.prefill_positions(*args), want)
    assert_close(reference.prefill_positions(*args), want)


def test_the_reference_spoils_only_rows_that_see_a_bad_token() -> None:
    """Token by token, which the prefill kernels do not: there a bad token of a chunk may reach its tile's other rows."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    v[:, :, 9, 3] = NAN
    v[:, :, 30, 5] = INF
    pos = torch.arange(40)
    seen = ((pos[None] <= pos[:, None]) & (pos[None] > pos[:, None] - 12)).expand(1, 2, -1, -1)
    out = reference.attend(q, k, v, seen, 0.25, 0.0, None)
    spoilt = torch.zeros_like(out, dtype=torch.bool)
    spoilt[:, 9:21, :, 3] = True
    spoilt[:, 30:, :, 5] = True
    assert torch.equal(~torch.isfinite(out), spoilt)
