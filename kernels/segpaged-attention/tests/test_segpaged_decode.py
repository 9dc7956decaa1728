"""`decode`: the kernel against dense attention, over a grid that is drawn once from a seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from segpaged_cases import Heads, assert_close, cases, dense, heads, make_store


def draw(seed: int) -> dict:
    """One problem. Together they cover every page size, head size, group and row count, alone and mixed."""
    r = random.Random(seed)
    page = r.choice([16, 32, 64, 128])
    rows = r.choice([1, 1, 1, 2, 3, 5, 8])
    slack = r.choice([0, 0, 7]) if rows == 1 else rows - 1 + r.choice([0, 3])
    longest = r.choice([40, 150, 260])
    local = [(s, w, slack) for s in (0, 4, 19) for w in (1, 9, 33, 64, 100, 300)]
    return {
        "page_size": page,
        "head_dim": r.choice([64, 64, 96, 128]),
        "group": r.choice([1, 3, 4, 8, 16]) if rows < 5 else r.choice([1, 3, 4]),
        "rows": rows,
        "spec": [None, *r.sample(local, r.choice([1, 2]))],
        "lens": [longest, 0, r.randint(1, longest)][: r.choice([1, 2, 3])],
        "scores": r.choice([{}, {}, {"softcap": 4.0}, {"s_aux": True}, {"model_window": r.choice([1, 20, 90])}]),
        "programs": r.choice([1, 2, 5, 9]),
        "exact": rows > 1 or slack > 0 or r.random() < 0.3,
        "shared": False,
    }


@pytest.mark.parametrize(("seed", "where"), cases(12, 24))
def test_decode(seed: int, where: tuple[str, torch.dtype]) -> None:
    from segpaged_attention import decode_kernel

    device, dtype = where
    case = draw(seed)
    layer: Heads = heads(case["spec"], device)
    store = make_store(seed, case["lens"], layer, head_dim=case["head_dim"], page_size=case["page_size"], dtype=dtype)
    batch, kv_heads, rows = len(case["lens"]), len(case["spec"]), case["rows"]
    gen = torch.Generator().manual_seed(seed)
    q = (
        torch.randn(batch, rows, kv_heads * case["group"], case["head_dim"], generator=gen)
        .to(device, dtype)
        .transpose(1, 2)
    )
    scores = dict(case["scores"])
    if "s_aux" in scores:
        scores["s_aux"] = torch.randn(q.shape[1], generator=gen).to(device)
    group = case["group"]
    config = decode_kernel.choose_config(
        torch.device(device), dtype, case["head_dim"], case["head_dim"], case["page_size"], rows, group, 100
    )
    if device == "cpu":
        fold = 2 if group in (4, 16) and seed % 3 == 0 else config.fold
        config = replace(config, programs=case["programs"], fold=fold)
    got = decode_kernel.decode(
        q, *store.pages, store.seq_lens, layer.sink, layer.window, layer.ring, 0.2, **scores,
        exact_positions=case["exact"], config=config,
    )  # fmt: skip
    q_pos = store.seq_lens[:, None] - rows + torch.arange(rows, device=device)[None, :]
    assert_close(got, dense(store, q, q_pos, 0.2, store.seq_lens, **scores))
