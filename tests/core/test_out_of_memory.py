"""No memory in the middle of things: one clear error, the cache can be reset, other caches do not notice.

`ceiling` stands for a device: the slabs of all page pools together may not exceed it, and torch's own error is raised as
an allocator would raise it.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from core_models import assert_same, forward, generate, global_cache, mixed_cache, plain_cache, tiny, tokens

from redknot_hf.errors import PoolExhausted
from redknot_hf.paging.pool import PagePool

KINDS = {"global": global_cache, "mixed": mixed_cache}


@pytest.fixture
def llama():
    return tiny("llama")


@contextlib.contextmanager
def ceiling(monkeypatch, pools, spare_bytes):
    """From now on the slabs may take ``spare_bytes`` more than those of ``pools`` take now."""
    allowed = sum(pool.allocated_bytes for pool in pools) + spare_bytes
    make = PagePool._slab

    def slab(self, rows, dim, dtype, device):
        size = rows * self.page_size * dim * dtype.itemsize
        held = sum(pool.allocated_bytes for pool in pools if pool is not self)
        if held + 2 * size > allowed:
            raise torch.OutOfMemoryError(f"Tried to allocate {size} bytes")
        return make(self, rows, dim, dtype, device)

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "_slab", slab)
        yield


def pools_of(*caches):
    return list({id(pool): pool for cache in caches for pool in cache._pools.values()}.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["prompt", "chunk of a prompt", "decode"])
def test_memory_ends_in_the_middle(llama, kind, where, monkeypatch):
    make = KINDS[kind]
    other, cache = make(llama, page_size=4), make(llama, page_size=4)
    forward(llama, tokens(24, seed=9), other)
    text = tokens(60)
    if where == "decode":
        forward(llama, text[:, :40], cache)
    room = {"prompt": 0, "chunk of a prompt": 18_000, "decode": 0}[where]
    with ceiling(monkeypatch, pools_of(other, cache), room), pytest.raises(PoolExhausted) as caught:
        if where == "prompt":
            forward(llama, text, cache)
        elif where == "chunk of a prompt":
            for start in range(0, 60, 6):
                forward(llama, text[:, start : start + 6], cache)
        else:
            generate(llama, cache, text[:, :41], max_new_tokens=300)
    message = str(caught.value)
    assert "no memory on cpu" in message and "bytes" in message and "fewer global heads" in message
    assert where != "chunk of a prompt" or cache.get_seq_length() > 0, "the ceiling should be met later than that"

    # the cache serves again, and holds nothing of what failed
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same(generate(llama, cache, text[:, :20]), generate(llama, make(llama), text[:, :20]))
    # the other one goes on as if nothing had been
    beside = torch.cat([tokens(24, seed=9), tokens(1, seed=3)], 1)
    assert_same(generate(llama, other, beside), generate(llama, make(llama), beside))


def test_a_prompt_that_is_refused_leaves_its_past(llama, monkeypatch):
    """A second turn that does not fit: the first is still there, and a shorter one goes on from it."""
    cache, text = mixed_cache(llama, page_size=4), tokens(90)
    forward(llama, text[:, :20], cache)
    with ceiling(monkeypatch, pools_of(cache), 0), pytest.raises(PoolExhausted):
        forward(llama, text[:, 20:], cache)
    assert cache.get_seq_length() == 20
    want = forward(llama, text[:, :24], mixed_cache(llama))[:, 20:]
    torch.testing.assert_close(forward(llama, text[:, 20:24], cache), want, atol=1e-5, rtol=0)


def test_forks_that_share_the_pool_survive(llama, monkeypatch):
    root, text = global_cache(llama, page_size=4), tokens(40)
    forward(llama, text, root)
    child = root.fork()
    with ceiling(monkeypatch, pools_of(root), 0), pytest.raises(PoolExhausted):
        generate(llama, child, torch.cat([text, tokens(1, seed=3)], 1), max_new_tokens=300)
    child.reset()
    for layer in root.paged_layers:
        held = {int(page) for page in layer.pages.table[layer.pages.table > 0]}
        assert int((layer.pages.pool.refs[1:] > 0).sum()) == len(held), "pages of the failed fork are free again"
    both = torch.cat([text, tokens(1, seed=4)], 1)
    assert_same(generate(llama, root, both), generate(llama, plain_cache(llama), both))


def test_spare_pages_are_not_insisted_on(llama, monkeypatch):
    """A pool asks for some pages more than it needs; where only the needed ones fit, they are taken."""
    pool = PagePool(4, 16, 16, torch.float32, torch.device("cpu"))
    pool.alloc(64)
    with ceiling(monkeypatch, [pool], 4 * pool.page_bytes + pool.page_bytes // 2):
        pool.reserve(4, spare=8)
        assert pool.num_free == 4
        with pytest.raises(PoolExhausted, match="grow the page pool from 69 to 70 pages"):
            pool.reserve(5, spare=8)


def test_a_static_cache_that_does_not_fit(llama, monkeypatch):
    small = global_cache(llama, max_cache_len=32, page_size=4)
    forward(llama, tokens(20), small)
    with (
        ceiling(monkeypatch, [layer.pages.pool for layer in small.paged_layers], 10_000),
        pytest.raises(PoolExhausted, match="smaller max_cache_len") as caught,
    ):
        forward(llama, tokens(20), global_cache(llama, max_cache_len=4096, page_size=4))
    assert "bytes" in str(caught.value)
    again = generate(llama, small, torch.cat([tokens(20), tokens(1, seed=3)], 1))
    assert again.sequences.shape[1] == 30
