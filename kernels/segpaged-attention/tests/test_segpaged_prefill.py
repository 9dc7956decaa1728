"""`prefill` and `prefill_positions`: the kernels against dense attention, over grids drawn from seeds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from segpaged_cases import assert_close, cases, dense, heads, make_store


def draw(seed: int) -> dict:
    """One problem for both functions."""
    r = random.Random(seed)
    slack = r.choice([0, 0, 5])
    local = [(s, w, slack) for s in (0, 4, 19) for w in (1, 9, 33, 64, 100, 300)]
    past = r.choice([0, 30, 70, 150, 260])
    batch = r.choice([1, 2, 3])
    return {
        "page_size": r.choice([16, 32, 64, 128]),
        "head_dim": r.choice([64, 64, 96, 128]),
        "group": r.choice([1, 1, 2, 3, 4]),
        "spec": [None, *r.sample(local, r.choice([1, 2]))],
        "past": [past, 0, r.randint(0, past)][:batch],
        "columns": r.choice([5, 40, 70, 130]),
        "padding": r.choice(["none", "left", "right"]),
        "scores": r.choice([{}, {}, {"softcap": 4.0}, {"s_aux": True}, {"model_window": r.choice([1, 20, 90])}]),
        "splits": r.choice([1, 1, 3]),
        "split_heads": r.choice([True, False]),
        "tile": r.choice([(32, 32), (64, 32), (64, 64)]),
        "order": r.random() < 0.5,
        "tma": r.random() < 0.5,
    }


def queries(gen: torch.Generator, shape: tuple[int, int, int, int], where: tuple[str, torch.dtype]) -> torch.Tensor:
    """[B, H, T, D] as a model makes it: a view of [B, T, H, D]."""
    batch, heads_, columns, head_dim = shape
    return torch.randn(batch, columns, heads_, head_dim, generator=gen).to(*where).transpose(1, 2)


def score_options(case: dict, gen: torch.Generator, q_heads: int, device: str) -> dict:
    scores = dict(case["scores"])
    if "s_aux" in scores:
        scores["s_aux"] = torch.randn(q_heads, generator=gen).to(device)
    return scores


@pytest.mark.parametrize(("seed", "where"), cases(12, 20))
def test_prefill(seed: int, where: tuple[str, torch.dtype]) -> None:
    from segpaged_attention import prefill_kernel

    device, dtype = where
    case = draw(seed)
    layer = heads(case["spec"], device)
    columns, batch, kv_heads = case["columns"], len(case["past"]), len(case["spec"])
    total = max(case["past"]) + columns
    store = make_store(
        seed, case["past"], layer, total=total, head_dim=case["head_dim"], page_size=case["page_size"], dtype=dtype
    )
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, kv_heads * case["group"], columns, case["head_dim"])
    q = queries(gen, shape, where)
    scores = score_options(case, gen, shape[1], device)
    # the chunk's keys and values; padding holds nan, which must not reach any output
    length = torch.tensor([columns, 3 * columns // 5, 0][:batch], dtype=torch.int32)
    start = torch.zeros_like(length)
    if case["padding"] == "none":
        length[:] = columns
    elif case["padding"] == "left":
        start = columns - length
    k, v = (queries(gen, (batch, kv_heads, *shape[2:]), where).fill_(float("nan")) for _ in range(2))
    q_pos = torch.full((batch, columns), -1, device=device)
    for b in range(batch):
        own = slice(int(start[b]), int(start[b] + length[b]))
        text = slice(case["past"][b], case["past"][b] + int(length[b]))
        k[b, :, own], v[b, :, own] = store.k[b, :, text], store.v[b, :, text]
        q_pos[b, own] = torch.arange(text.start, text.stop, device=device)
    padding = {} if case["padding"] == "none" else {"q_start": start.to(device), "q_len": length.to(device)}

    order = torch.arange(kv_heads, dtype=torch.int32, device=device) if case["order"] else None
    num_global = 1 if case["order"] else -1
    config = []
    for big in (True, False):
        chosen = prefill_kernel.choose_config(
            torch.device(device), dtype, case["head_dim"], case["head_dim"], case["page_size"], columns, big
        )
        splits = case["splits"] if big or case["split_heads"] else 1
        if device == "cpu":
            m, n = case["tile"]
            tma = case["tma"]  # of the chunk: through a descriptor, as on Hopper
            chosen = replace(chosen, block_m=m, block_n=n, past_n=n, tma=tma, past_tma=tma and case["page_size"] >= n)
        config.append(replace(chosen, splits=splits))
    got = prefill_kernel.prefill(
        q, k, v, *store.pages, store.seq_lens, layer.sink, layer.window, layer.ring, 0.2, **scores, **padding,
        head_order=order, num_global=num_global, past_len_hint=0 if max(case["past"]) == 0 else -1,
        config=tuple(config),
    )  # fmt: skip
    assert_close(got, dense(store, q, q_pos, 0.2, **scores))


@pytest.mark.parametrize(("seed", "where"), cases(6, 8))
def test_prefill_where_only_the_diagonal_hides_keys(seed: int, where: tuple[str, torch.dtype]) -> None:
    """Global heads, no padding, no softcap, no model window: these have a loop of their own, over descriptors."""
    from segpaged_attention import prefill_kernel

    device, dtype = where
    r = random.Random(seed)
    columns, past, head_dim = r.choice([5, 64, 130, 200]), r.choice([0, 70, 150]), r.choice([64, 96])
    layer = heads([None, None], device)
    store = make_store(
        seed, [past, past // 2], layer, total=past + columns, head_dim=head_dim, page_size=32, dtype=dtype
    )
    gen = torch.Generator().manual_seed(seed)
    q = queries(gen, (2, 4, columns, head_dim), where)
    text = torch.stack([torch.arange(n, n + columns, device=device) for n in (past, past // 2)])
    k, v = (x[torch.arange(2)[:, None], :, text].transpose(1, 2) for x in (store.k, store.v))
    args = (torch.device(device), dtype, head_dim, head_dim, 32, columns, True)
    chosen = replace(prefill_kernel.choose_config(*args), splits=r.choice([1, 3]))
    if device == "cpu":
        m, n = r.choice([(64, 32), (64, 64), (32, 32)])
        chosen = replace(chosen, block_m=m, block_n=n, past_n=32, tma=True, past_tma=r.random() < 0.5)
    order = torch.arange(2, dtype=torch.int32, device=device)
    got = prefill_kernel.prefill(
        q, k, v, *store.pages, store.seq_lens, layer.sink, layer.window, layer.ring, 0.2, head_order=order,
        num_global=2, past_len_hint=past, config=(chosen, chosen),
    )  # fmt: skip
    assert_close(got, dense(store, q, text, 0.2))


@pytest.mark.parametrize(("seed", "where"), cases(8, 12))
def test_prefill_positions(seed: int, where: tuple[str, torch.dtype]) -> None:
    from segpaged_attention import positions_kernel

    device, dtype = where
    case = draw(1000 + seed)
    lens = [length + case["columns"] for length in case["past"]]
    # slot == position: everything is stored, whatever the heads' windows are
    layer = heads(case["spec"], device)
    everything = heads([None] * len(case["spec"]), device)
    store = make_store(seed, lens, everything, head_dim=case["head_dim"], page_size=case["page_size"], dtype=dtype)
    store.heads = layer
    rows, batch = case["columns"], len(lens)
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, len(case["spec"]) * case["group"], rows, case["head_dim"])
    q = queries(gen, shape, where)
    scores = score_options(case, gen, shape[1], device)
    q_pos = torch.full((batch, rows), -1, dtype=torch.int32)
    for b, length in enumerate(lens):
        count = rows if case["padding"] == "none" else [rows, rows // 2, 0][b]
        chosen_rows = torch.randperm(length, generator=gen)[:count].sort().values.int()
        first = rows - count if case["padding"] == "left" else 0
        q_pos[b, first : first + count] = chosen_rows
    config = positions_kernel.choose_config(
        torch.device(device), dtype, case["head_dim"], case["head_dim"], case["page_size"], rows, True
    )
    if device == "cpu":
        m, n = case["tile"]
        config = replace(config, block_m=m, block_n=n, past_n=n)
    q_pos = q_pos.to(device)
    got = positions_kernel.prefill_positions(
        q, q_pos, *store.pages, store.seq_lens, layer.sink, layer.window, 0.2, **scores, config=config
    )
    assert_close(got, dense(store, q, q_pos, 0.2, store.seq_lens, **scores))
