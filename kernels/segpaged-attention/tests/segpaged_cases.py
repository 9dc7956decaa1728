"""Random caches with a known content, and what attention over them must give.

The content is written here by a loop over positions that knows the slot rule and nothing else of the package, and what
attention must give is computed from the whole contiguous K and V under a dense mask. So a test compares a kernel with
something that shares neither its storage nor its arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from segpaged_attention import reference

KEEP_ALL = 1 << 30
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cases(on_cpu: int, on_gpu: int) -> list:
    """Parameters (seed, (device, dtype)): in the interpreter one dtype per seed, on a GPU bfloat16 and some others.

    The interpreter multiplies bfloat16 as integers, so the CPU does without it. Outside of it, without a GPU, there is
    nothing to run: what is returned then is marked `gpu`.
    """
    if INTERPRETED:
        return [(seed, ("cpu", (torch.float32, torch.float16)[seed % 2])) for seed in range(on_cpu)]
    return [
        pytest.param(seed, ("cuda", dtype), marks=pytest.mark.gpu, id=f"{seed}-cuda-{str(dtype)[6:]}")
        for seed in range(on_gpu)
        for dtype, every in ((torch.bfloat16, 1), (torch.float16, 3), (torch.float32, 4))
        if seed % every == 0
    ]


@dataclass
class Heads:
    """Per KV head of one layer, int32 [Hkv] each."""

    sink: torch.Tensor
    window: torch.Tensor
    ring: torch.Tensor


def heads(spec: list[tuple[int, int, int] | None], device: str = "cpu") -> Heads:
    """One entry per KV head: (sink, window, slack), or None for a head that keeps everything."""
    rows = [(0, KEEP_ALL, KEEP_ALL) if one is None else (one[0], one[1], one[1] + one[2]) for one in spec]
    sink, window, ring = torch.tensor(rows, dtype=torch.int32, device=device).T.contiguous()
    return Heads(sink, window, ring)


@dataclass
class Store:
    """K and V of whole sequences, and pages that hold what is left of them after `seq_lens` tokens."""

    k: torch.Tensor  # [B, Hkv, N, D]: every position, stored or not
    v: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    heads: Heads

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.k_pages, self.v_pages, self.block_table


def make_store(
    seed: int,
    lens: list[int],
    layer: Heads,
    *,
    total: int | None = None,
    head_dim: int = 64,
    v_dim: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shared: bool = False,
) -> Store:
    """Sequences of `total` tokens (default: the longest of `lens`), of which row b stored the first lens[b].

    Pages are handed out in random order, unused slots hold large numbers, and page 0 holds nothing. `shared`: all rows
    hold the same text and row 1 uses row 0's pages wherever their content agrees.
    """
    gen = torch.Generator().manual_seed(seed)
    batch, kv_heads, n = len(lens), layer.sink.numel(), total or max(*lens, 1)
    device = layer.sink.device
    v_dim = v_dim or head_dim
    k = torch.randn(1 if shared else batch, kv_heads, n, head_dim, generator=gen).expand(batch, -1, -1, -1)
    v = torch.randn(1 if shared else batch, kv_heads, n, v_dim, generator=gen).expand(batch, -1, -1, -1)
    k, v = k.to(dtype), v.to(dtype)
    sink, ring = layer.sink.tolist(), layer.ring.tolist()
    slots = [[min(n, sink[h] + ring[h]) for h in range(kv_heads)] for _ in range(batch)]
    max_pages = max(-(-s // page_size) for row in slots for s in row)
    order = (torch.randperm(batch * kv_heads * max_pages, generator=gen) + 1).tolist()
    k_pages = torch.full((len(order) + 1, page_size, head_dim), 77.0, dtype=dtype)
    v_pages = torch.full((len(order) + 1, page_size, v_dim), -99.0, dtype=dtype)
    table = torch.zeros(batch, kv_heads, max_pages, dtype=torch.int32)
    for b in range(batch):
        for h in range(kv_heads):
            for i in range(-(-slots[b][h] // page_size)):
                table[b, h, i] = order.pop()
            pos = torch.arange(lens[b])
            slot = torch.where(pos < sink[h] + ring[h], pos, sink[h] + (pos - sink[h]) % ring[h])
            newest = torch.full((slots[b][h],), -1)
            for p, s in enumerate(slot.tolist()):  # later positions overwrite earlier ones
                newest[s] = p
            used = torch.nonzero(newest >= 0).flatten()
            page = table[b, h, used // page_size].long()
            k_pages[page, used % page_size] = k[b, h, newest[used]]
            v_pages[page, used % page_size] = v[b, h, newest[used]]
    if shared:
        for h in range(kv_heads):
            for i in range(max_pages):
                mine, other = int(table[1, h, i]), int(table[0, h, i])
                if torch.equal(k_pages[mine], k_pages[other]):
                    table[1, h, i] = other
    on = {"device": device}
    seq_lens = torch.tensor(lens, dtype=torch.int32, **on)
    return Store(k.to(**on), v.to(**on), k_pages.to(**on), v_pages.to(**on), table.to(**on), seq_lens, layer)


def dense(
    store: Store,
    q: torch.Tensor,
    q_pos: torch.Tensor,
    scale: float,
    kv_lens: torch.Tensor | None = None,
    **scores: object,
) -> torch.Tensor:
    """Attention of queries at `q_pos` [B, T] over the whole K and V, float32."""
    batch, kv_heads, n, _ = store.k.shape
    key_pos = torch.arange(n, device=q.device).expand(batch, kv_heads, -1)
    if kv_lens is not None:
        key_pos = torch.where(key_pos < kv_lens[:, None, None], key_pos, -1)
    window = int(scores.get("model_window", 0))
    mask = reference.visible(q_pos, key_pos, store.heads.sink, store.heads.window, window)
    out = reference.attend(
        q.float(), store.k, store.v, mask, scale, float(scores.get("softcap", 0.0)), scores.get("s_aux")
    )
    return out


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to the rounding of got's dtype: of the output, and of the probabilities it was summed up from."""
    assert got.shape == want.shape
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[got.dtype]
    worst = ((got.float() - want.float()).abs() / (1 + want.float().abs())).max().item() if got.numel() else 0.0
    assert worst <= bound, f"largest difference {worst:.2e} of 1 + size, expected at most {bound:.1e}"
