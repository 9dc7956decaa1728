"""A forward over the static form that is interrupted: it counts, or the next one says so and reset() cures it.

The device counts a step's token in its first layer; every layer stores it for itself, in eager mode on a GPU not before its
attention. What a test breaks is broken in the model, in the attention function, or in the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import CONFIGS, SHAPE, mixed, prompt
from transformers import AutoModelForCausalLM, LlamaConfig

import redknot_hf.attention
from redknot_hf import RedKnotCache
from redknot_hf.errors import CacheError
from redknot_hf.static import StaticState

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
)


class Interruption(Exception):
    pass


@pytest.fixture(scope="module", params=["cpu", CUDA])
def llama(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = CONFIGS["llama"]() if request.param == "cpu" else LlamaConfig(**{**SHAPE, "head_dim": 64})
    return AutoModelForCausalLM.from_config(config, attn_implementation="redknot").to(request.param).eval()


def feed(model: Any, cache: RedKnotCache, count: int, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        ids = prompt(1, count, seed, str(model.device))[0]
        return model(ids, past_key_values=cache, use_cache=True).logits


def static(model: Any) -> RedKnotCache:
    return RedKnotCache(model.config, mixed(model.config), page_size=16, max_cache_len=64)


@contextlib.contextmanager
def failing_module(module: Any) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise Interruption

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def failing_attention(layer: int) -> Iterator[None]:
    """Between the cache's update and the attention of a layer: where a GPU has counted a token and not stored it."""

    def fail(module: Any, *_: Any) -> None:
        if module.layer_idx == layer:
            raise Interruption

    redknot_hf.attention.observe(fail, True)
    try:
        yield
    finally:
        redknot_hf.attention.observe(fail, False)


PLACES: dict[str, Any] = {
    "before the first layer": lambda m: failing_module(m.model.layers[0]),
    "before the first attention": lambda m: failing_attention(0),
    "in the first layer": lambda m: failing_module(m.model.layers[0].mlp),
    "before the second attention": lambda m: failing_attention(1),
    "in the second layer": lambda m: failing_module(m.model.layers[1].mlp),
    "in the last layer": lambda m: failing_module(m.model.layers[2].mlp),
    "after the layers": lambda m: failing_module(m.lm_head),
}
WHOLE = {"in the last layer": 1, "after the layers": 1, "before the first layer": 0}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["prompt", "first token", "token", "chunk"])
def test_whole_layers_or_none(llama: Any, place: str, when: str) -> None:
    cache, twin = static(llama), static(llama)
    if when != "prompt":
        feed(llama, cache, 20)
        feed(llama, twin, 20)
    if when == "token":  # later ones repeat the launches of the first
        for seed in range(3):
            feed(llama, cache, 1, seed)
            feed(llama, twin, 1, seed)
    count = {"prompt": 20, "chunk": 6}.get(when, 1)
    before = int(cache.get_seq_length())
    with pytest.raises(Interruption), PLACES[place](llama):
        feed(llama, cache, count, 3)
    if place in WHOLE:
        if WHOLE[place]:
            feed(llama, twin, count, 3)
        assert int(cache.get_seq_length()) == before + WHOLE[place] * count
        for seed in range(4, 7):
            assert torch.equal(
                feed(llama, cache, 1 if before else 5, seed), feed(llama, twin, 1 if before else 5, seed)
            )
        return
    uses = [lambda: feed(llama, cache, 1), lambda: feed(llama, cache, 4), lambda: feed(llama, cache, 1)]
    if when != "prompt":
        uses += [lambda: cache.crop(-1), cache.fork]
    for use in (*uses, *uses):
        with pytest.raises(CacheError, match=r"reset\(\)"):
            use()
    cache.memory_report()
    with pytest.raises(CacheError, match=r"reset\(\)"):
        feed(llama, cache, 1)
    cache.reset()
    twin.reset()
    for length in (20, 1, 1, 5, 1):
        assert torch.equal(feed(llama, cache, length, length), feed(llama, twin, length, length))


@pytest.mark.parametrize("place", ["in the first layer", "in the second layer"])
def test_between_two_devices(llama: Any, place: str) -> None:
    """A layer that counts for a device of its own: the first device has counted, the second one perhaps not."""
    cache, twin = static(llama), static(llama)
    for one in (cache, twin):
        feed(llama, one, 20)
    last = cache.layers[2]
    state = StaticState(llama.device, 1, 64)
    lens = last.pages.lens
    state.push(20, lens, lens)
    state.started = state.decoding = True
    state.unfinished, state.leader = False, last.state.leader
    cache._states[torch.device("meta")] = last.state = state
    last.first = True
    for seed in range(3):
        assert torch.equal(feed(llama, cache, 1, seed), feed(llama, twin, 1, seed))
    with pytest.raises(Interruption), PLACES[place](llama):
        feed(llama, cache, 1)
    for _ in range(2):
        with pytest.raises(CacheError, match=r"reset\(\)"):
            feed(llama, cache, 1)


def test_compiled_steps_are_told_too(llama: Any) -> None:
    """An eager step is interrupted, the next one is compiled code."""
    if llama.device.type == "cpu":
        import shutil

        if shutil.which("g++") is None:
            pytest.skip("compiling on the CPU needs a C++ compiler")
    cache = static(llama)
    feed(llama, cache, 20)
    step = torch.compile(llama, backend="eager")
    ids = torch.tensor([[5]], device=llama.device)
    with torch.no_grad():
        step(ids, past_key_values=cache, use_cache=True)
        step(ids, past_key_values=cache, use_cache=True)
        assert int(cache.get_seq_length()) == 22
        with pytest.raises(Interruption), failing_attention(1):
            feed(llama, cache, 1)
        with pytest.raises(CacheError, match=r"reset\(\)"):
            step(ids, past_key_values=cache, use_cache=True)
        cache.reset()
        feed(llama, cache, 20)
        step(ids, past_key_values=cache, use_cache=True)
    assert int(cache.get_seq_length()) == 21
