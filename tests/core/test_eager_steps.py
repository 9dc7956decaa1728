"""Eager decode steps: what is done once per forward, once per page, and never. The kernels' operators run on the CPU here."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import numpy as np
import pytest
import segpaged_attention.replay
import torch
from core_models import assert_same, forward, generate, global_cache, mixed_cache, padded, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from redknot_hf import kernel_path
from redknot_hf.layer import Step
from redknot_hf.masks import RedKnotMask
from redknot_hf.paging import torch_attention
from redknot_hf.paging.pages import LayerPages
from redknot_hf.paging.pool import PagePool
from redknot_hf.paging.torch_attention import AttentionSpec

LAYERS = 3


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(kernel_path, "unavailable", lambda *_: None)


@pytest.fixture
def replays(kernels, monkeypatch):
    """Layers repeat their steps as on a GPU; what stands for the repeated launches reads memory at the addresses it gets."""
    made = Counter()

    def record(k, v, q, k_pages, v_pages, table, before, after, sink, window, ring, *scores):
        def run(k, v, q, before, after):
            torch.ops.segpaged_attention.append(k, v, k_pages, v_pages, table, before, sink, ring)
            return torch.ops.segpaged_attention.decode(q, k_pages, v_pages, table, after, sink, window, ring, *scores)

        class Replay:
            observed = staticmethod(lambda: False)

            def __call__(self, addresses, like, scratch):
                made["repeated"] += 1
                return run(*map(at, addresses, (k, v, q, before, after)))

        made["recorded"] += 1
        return run(k, v, q, before, after), Replay()

    setup = kernel_path.KernelLayer.__init__
    monkeypatch.setattr(
        kernel_path.KernelLayer,
        "__init__",
        lambda self, pages: (setup(self, pages), vars(self).update(replays=True))[0],
    )
    monkeypatch.setattr(segpaged_attention.replay, "record", record)
    return made


def at(address: int, like: torch.Tensor) -> torch.Tensor:
    """The tensor of the layout of ``like`` that begins at ``address``."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_byte * (count * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


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


def many_steps(llama, make, rows):
    """Logits over several pages, with padded rows, and with forks that share pages on the way."""
    ids, mask = padded([20, 7, 13][:rows])
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
    return parts, cache


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("make", [mixed_cache, global_cache])
@pytest.mark.parametrize("way", ["kernels", "replays"])
def test_many_steps_equal_the_torch_path(llama, make, rows, way, request):
    want, cache = many_steps(llama, make, rows)
    assert cache.paged_layers[0].kernel is None
    made = request.getfixturevalue(way)
    got, cache = many_steps(llama, make, rows)
    assert cache.paged_layers[0].kernel is not None
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
    if way == "replays":
        assert made["repeated"] > 60 and made["recorded"] < 80, made


def eventful_steps(llama):
    """Logits while pages come, rows are selected, rollback is asked for, tokens are taken back, and a fork grows the pool."""
    cache = mixed_cache(llama, page_size=16)
    parts = [forward(llama, tokens(20, 3), cache)]
    for step in range(16):
        parts.append(forward(llama, tokens(1, cache.paged_layers[0].batch_size, seed=step), cache))
        if step == 4:
            cache.batch_select_indices(torch.tensor([2, 0]))
        if step == 6:
            cache.activate_past_recording()
        if step == 8:
            cache.crop(-3)
        if step == 9:
            twin = cache.fork()
        if step == 12:  # what the cache writes to is its own again
            forward(llama, tokens(400, 2), twin)
    return parts


def test_a_step_is_recorded_again_when_what_it_was_made_from_changes(llama, request):
    want = eventful_steps(llama)
    made = request.getfixturevalue("replays")
    for one, other in zip(eventful_steps(llama), want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
    assert made["repeated"] and made["recorded"] > 3 * LAYERS, made


def one_step(layer, moved="", s_aux=None):
    """The output of a token behind three others; ``moved``: which of k, v and q does not begin at a multiple of 16 bytes."""
    lengths = kernel_path.Lengths(torch.tensor([3], dtype=torch.int32), torch.tensor([4], dtype=torch.int32), None)
    generator = torch.Generator().manual_seed(1)
    parts = []
    for name, heads in (("k", 2), ("v", 2), ("q", 4)):
        memory = torch.zeros(heads * 16 + 8)
        first = -memory.data_ptr() % 16 // 4 + (name in moved)
        parts.append(memory[first : first + heads * 16].view(1, heads, 1, 16))
        parts[-1].copy_(torch.randn(parts[-1].shape, generator=generator))
    return layer.step_one(*parts, 0.3, 0.0, s_aux, 0, lengths)


@pytest.mark.parametrize(
    "first, then",
    [
        ({"moved": "k"}, {"moved": "v"}),  # the bits that addresses have together are the same
        ({"moved": "kv"}, {"moved": "vq"}),
        ({}, {"s_aux": torch.tensor([3.0, 1.0, 0.0, 2.0])}),
        ({"s_aux": torch.tensor([3.0, 1.0, 0.0, 2.0])}, {}),
    ],
)
def test_launches_for_other_alignment_or_sinks_are_not_repeated(replays, first, then):
    pool = PagePool(16, 16, 16, torch.float32, torch.device("cpu"))
    pages = LayerPages(pool, np.zeros(2, np.int64), np.full(2, 1 << 30), 1, 0)
    pages.prepare(np.full(1, 8))
    layer = kernel_path.KernelLayer(pages)
    one_step(layer)  # arguments are checked
    one_step(layer, **first)
    assert (replays["recorded"], replays["repeated"]) == (1, 0)
    one_step(layer, **first)
    assert (replays["recorded"], replays["repeated"]) == (1, 1)
    got = one_step(layer, **then)
    assert (replays["recorded"], replays["repeated"]) == (2, 1)
    fresh = kernel_path.KernelLayer(pages)
    torch.testing.assert_close(got, one_step(fresh, **then), atol=0, rtol=0)


def test_the_static_form_repeats_its_steps_too(llama, replays):
    """Uncompiled; after a reset, too. What the growing form gives, without the kernels, is right."""
    cache = mixed_cache(llama, page_size=16, max_cache_len=80)
    for turn in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel_path, "unavailable", lambda *_: "not here")
            plain = mixed_cache(llama, page_size=16)
            want = [forward(llama, tokens(n, seed=n + turn), plain) for n in [20, *[1] * 30]]
        replays.clear()
        got = [forward(llama, tokens(n, seed=n + turn), cache) for n in [20, *[1] * 30]]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
        assert replays["recorded"] == (0 if turn else LAYERS)
        assert replays["repeated"] == LAYERS * (30 if turn else 28)
        cache.reset()


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
    upload = kernel_path.upload

    def counting(values, *more):
        nonlocal uploads
        uploads += values.ndim == 3
        return upload(values, *more)

    monkeypatch.setattr(kernel_path, "upload", counting)
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


@pytest.mark.parametrize("model_window", [0, 6])
def test_nan_kept_for_a_rollback_alone_reaches_nobody(model_window):
    """What has left the window but not the ring is stored, and a weight of zero would not keep a NaN out."""
    outs = []
    for poison in (False, True):
        pool = PagePool(4, 8, 8, torch.float32, torch.device("cpu"))
        pages = LayerPages(pool, np.array([2, 2]), np.array([5, 8]), 1, rollback=9)
        data = torch.randn(3, 1, 2, 30, 8, generator=torch.Generator().manual_seed(0))
        data[1:, :, :, 12] = float("nan") if poison else 0.0
        one = np.ones(1, np.int64)
        for i in range(22):  # 12 is out of both windows, and in both rings
            pages.prepare(one)
            pages.write(data[1, :, :, i : i + 1], data[2, :, :, i : i + 1], one)
            pages.advance(one)
        outs.append(torch_attention.decode(pages, data[0, :, :, 21:22], AttentionSpec(0.3, model_window=model_window)))
    assert outs[1].isfinite().all()
    torch.testing.assert_close(outs[1], outs[0], atol=0, rtol=0)


def test_padding_is_moved_on_the_device_of_the_layer():
    """Layers of one model may be on several devices; the padding comes on that of the mask."""
    step = Step(0, 4, 2)
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    mask = RedKnotMask({"batch_size": 2, "q_length": 4, "kv_length": 4, "attention_mask": padding})
    step.resolve(mask, np.zeros(2, np.int64))
    x = torch.arange(2 * 4.0).view(2, 1, 4, 1)
    assert step.compact(x)[0].flatten().tolist() == [2, 3, 0, 0]
    assert torch.equal(step.expand(step.compact(x).transpose(1, 2))[0].flatten(), torch.tensor([0.0, 0, 2, 3]))
    elsewhere = torch.empty(2, 1, 4, 1, device="meta")
    assert step.expand(step.compact(elsewhere).transpose(1, 2)).device.type == "meta"
    assert mask.dense(torch.device("meta")).device.type == "meta" and mask.dense().device.type == "cpu"
