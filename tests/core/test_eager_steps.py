"""Eager decode steps: what is done once per forward, once per page, and never. The kernels' operators run on the CPU here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from core_models import assert_same, forward, generate, global_cache, mixed_cache, padded, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from redknot_hf import kernel_path

LAYERS = 3


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(kernel_path, "unavailable", lambda *_: None)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(model, cache) -> Counter[str]:
    with Count() as count:
        forward(model, tokens(1), cache)
    return count.calls


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("make", [mixed_cache, global_cache])
def test_many_steps_equal_the_torch_path(llama, make, rows, monkeypatch):
    """Over several pages, with padded rows, and with forks that share pages on the way."""
    ids, mask = padded([20, 7, 13][:rows])
    runs = []
    for by_kernels in (False, True):
        with monkeypatch.context() as patch:
            if by_kernels:
                patch.setattr(kernel_path, "unavailable", lambda *_: None)
            cache = make(llama, page_size=16)
            parts = [forward(llama, ids, cache, mask)]
            twin, seen = None, mask
            for step in range(50):
                if step == 11:
                    twin = cache.fork()
                more = tokens(1, rows, seed=step)
                seen = torch.cat([seen, torch.ones(rows, 1, dtype=seen.dtype)], 1)
                parts.append(forward(llama, more, cache, seen))
                if step == 30:
                    parts.append(forward(llama, more, twin, seen[:, : mask.shape[1] + 12]))
                    twin.reset()
            runs.append(parts)
            assert (cache.paged_layers[0].kernel is not None) == by_kernels
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


def test_generate_takes_the_same_steps(llama, kernels):
    ids = tokens(37)
    cache = global_cache(llama, page_size=16)
    assert_same(generate(llama, cache, ids), generate(llama, DynamicCache(config=llama.config), ids), 2e-6)


def test_a_layer_runs_one_append_and_one_decode_and_no_more_than_a_dynamic_cache(llama, kernels):
    ours, plain = mixed_cache(llama, page_size=16), DynamicCache(config=llama.config)
    for cache in (ours, plain):
        forward(llama, tokens(20), cache)
        forward(llama, tokens(1), cache)
    calls, others = counted(llama, ours), counted(llama, plain)
    assert calls["append"] == calls["decode"] == LAYERS
    # three detached views instead of two concatenations and sdpa; lengths are added up once
    assert calls.total() <= others.total() + 2 * LAYERS + 2


def test_the_table_goes_up_once_per_page(llama, kernels, monkeypatch):
    uploads = 0
    upload = kernel_path.KernelLayer._upload

    def counting(self, values):
        nonlocal uploads
        uploads += values.ndim == 3
        return upload(self, values)

    monkeypatch.setattr(kernel_path.KernelLayer, "_upload", counting)
    cache = global_cache(llama, page_size=16)
    forward(llama, tokens(32), cache)
    uploads = 0
    for step in range(48):
        forward(llama, tokens(1, seed=step), cache)
    assert uploads == 3 * LAYERS


def test_steps_inside_a_page_do_not_look_at_the_table(llama, kernels, monkeypatch):
    cache = mixed_cache(llama, page_size=16)
    forward(llama, tokens(32), cache)
    cache.fork()  # a fork that is gone again, too
    for _ in range(2):
        forward(llama, tokens(1), cache)
    prepared = 0
    for layer in cache.paged_layers:

        def prepare(new, own=layer.pages.prepare):
            nonlocal prepared
            prepared += 1
            return own(new)

        monkeypatch.setattr(layer.pages, "prepare", prepare)
    for _ in range(13):
        forward(llama, tokens(1), cache)
    assert prepared == 0


@pytest.mark.parametrize("make", [mixed_cache, global_cache])
def test_after_a_fork_is_gone_global_heads_are_read_in_place_again(llama, make):
    cache = make(llama, page_size=4)
    forward(llama, tokens(20), cache)
    fork = cache.fork()
    forward(llama, tokens(6), fork)
    forward(llama, tokens(6), cache)
    assert any(layer.pages.shared for layer in cache.paged_layers)
    fork.reset()
    for step in range(9):
        forward(llama, tokens(1, seed=step), cache)
    for layer in cache.paged_layers:
        assert not layer.pages.shared
        assert layer.pages.full_views() is not None or not len(layer.pages.full_heads)
