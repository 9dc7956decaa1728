"""Any order of appending, evicting, forking, cropping, moving and recalling gives what dense attention gives.

The oracle keeps every key and value of every session in plain tensors and masks them with the visibility rule; nothing
of it knows pages. Keys are random, so a token in the wrong slot, a stale page or a lost one changes the result.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from session_helpers import tiny_config

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.attention import redknot_attention_forward
from redknot_hf.errors import CacheError, RollbackExceeded
from redknot_hf.layer import RedKnotLayer

LAYERS, HEADS, GROUP, DIM = 2, 3, 2, 8
SCALE = 0.7
MODULE = SimpleNamespace(is_causal=True, training=False, scaling=SCALE)

PROFILES = [
    HeadProfile(LAYERS, HEADS, classes, sink, window)
    for classes, sink, window in (
        ([["global", "local", "retrieval"], ["local", "retrieval", "local"]], 2, 5),
        ([["local", "local", "local"], ["global", "local", "global"]], 0, 11),
        ([["retrieval", "retrieval", "retrieval"], ["local", "local", "local"]], 3, 7),
        ([["global", "global", "global"], ["retrieval", "local", "retrieval"]], 1, 1),
        ([["local", "global", "local"], ["local", "local", "retrieval"]], 5, 24),
    )
]


class Session:
    """A cache and the truth about it."""

    def __init__(self, cache: RedKnotCache, profile: HeadProfile, rows: int):
        self.cache, self.profile = cache, profile
        self.shortened = False  # cropped or re-profiled before, so that rings may have less slack than rollback
        self.k = [torch.zeros(rows, HEADS, 0, DIM) for _ in range(LAYERS)]
        self.v = [torch.zeros(rows, HEADS, 0, DIM) for _ in range(LAYERS)]

    def copy(self, cache: RedKnotCache) -> Session:
        twin = Session(cache, self.profile, 1)
        twin.k, twin.v, twin.shortened = list(self.k), list(self.v), self.shortened
        return twin

    @property
    def rows(self) -> int:
        return len(self.k[0])

    @property
    def length(self) -> int:
        return self.k[0].shape[2]

    def feed(self, count: int, generator: torch.Generator) -> None:
        """Append ``count`` tokens and compare every layer's attention with the oracle's."""
        for layer in range(LAYERS):
            shape = (self.rows, HEADS, count, DIM)
            k, v = (torch.randn(shape, generator=generator) for _ in range(2))
            q = torch.randn(self.rows, HEADS * GROUP, count, DIM, generator=generator)
            self.k[layer], self.v[layer] = torch.cat([self.k[layer], k], 2), torch.cat([self.v[layer], v], 2)
            keys, values = self.cache.update(k, v, layer)
            found, _ = redknot_attention_forward(MODULE, q, keys, values, None, scaling=SCALE)
            wanted = self.oracle(layer, q)
            assert (found - wanted).abs().max() < 2e-5

    def oracle(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        count, length = q.shape[2], self.length
        key, query = torch.arange(length), torch.arange(length - count, length)[:, None]
        outs = []
        for head in range(HEADS):
            seen = key <= query
            if self.profile.head_class[layer][head] == "local":
                sink, window = self.profile.sink[layer][head], self.profile.window[layer][head]
                seen = seen & ((key < sink) | (key > query - window))
            mine = q[:, head * GROUP : (head + 1) * GROUP].double()
            scores = mine @ self.k[layer][:, head, None].double().transpose(2, 3) * SCALE
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outs.append(weights @ self.v[layer][:, head, None].double())
        return torch.cat(outs, 1).float().transpose(1, 2)

    def freeze(self) -> None:
        """What is kept changes by what quantising rounds and no more; from then on it is the truth."""
        self.cache.freeze()
        kv_dtype = self.cache.kv_dtype
        for layer in range(LAYERS):
            pages = self.cache.layers[layer].pages
            position = np.arange(self.length)
            kept = (position < pages.sink[:, None]) | (position >= pages.oldest[..., None])
            kept = torch.from_numpy(kept)[..., None]
            for mine, theirs in zip((self.k, self.v), self.cache.layers[layer].dense(), strict=True):
                change = ((mine[layer] - theirs) * kept).abs()
                most = mine[layer].abs().amax((2, 3), keepdim=True)
                if kv_dtype is None:
                    bound = torch.zeros(1)
                elif kv_dtype == torch.int8:
                    bound = most / 127 * 0.5 * 1.001
                else:  # half of the last of three bits, or of the smallest number
                    bound = mine[layer].abs() * 2**-4 * 1.07 + most / 448 * 2**-9
                assert (change <= bound).all()
                mine[layer] = torch.where(kept, theirs, mine[layer])

    def select(self, rows: np.ndarray) -> None:
        index = torch.from_numpy(rows)
        self.k, self.v = [k[index] for k in self.k], [v[index] for v in self.v]

    def crop(self, count: int) -> None:
        keep = self.length - count
        self.k, self.v = [k[:, :, :keep] for k in self.k], [v[:, :, :keep] for v in self.v]


# a program that fails is short already, and shrinking it would take longer than the test
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
OPERATIONS = (
    "decode", "decode", "chunk", "long", "fork", "drop", "crop", "offload", "prefetch", "save", "reorder", "repeat",
    "profile", "layer", "freeze", "freeze", "record",
)  # fmt: skip
program = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**16)), min_size=3, max_size=14)


def run(program, cold: str, page_size: int, rollback: int, near: int, folder: Path, kv_dtype=None) -> None:
    generator = torch.Generator().manual_seed(0)
    config = tiny_config(
        num_hidden_layers=LAYERS,
        num_key_value_heads=HEADS,
        num_attention_heads=HEADS * GROUP,
        hidden_size=48,
        head_dim=DIM,
    )
    config._attn_implementation = "redknot"
    first = PROFILES[len(program) % len(PROFILES)]
    options = {"kv_dtype": kv_dtype} if cold == "drop" else {"cold": cold, "near_tokens": near}
    if cold == "resident":  # every far page is picked, by number: it stays on the device from one step to the next
        options = {"cold": "cpu", "near_tokens": near, "retrieve": 1 << 20, "resident_pages": near}
    cache = RedKnotCache(config, first, page_size=page_size, rollback=rollback, **options)
    sessions = [Session(cache, first, 2)]
    sessions[0].feed(10, generator)
    for operation, number in program:
        which = number % len(sessions)
        session = sessions[which]
        cache = session.cache
        amount = number // 7
        if operation == "decode":
            session.feed(1, generator)
        elif operation == "chunk":
            session.feed(2 + amount % 9, generator)
        elif operation == "long":
            session.feed(20 + amount % 30, generator)
        elif operation == "fork" and len(sessions) < 4:
            sessions.append(session.copy(cache.fork()))
        elif operation == "drop" and len(sessions) > 1:
            cache.reset()
            sessions.pop(which)
        elif operation == "crop" and session.length > 1:
            count = 1 + amount % (session.length - 1)
            try:
                cache.crop(-count)
            except RollbackExceeded:
                # earlier crops and changes of profile use up slack as well
                assert cold == "drop" and (count > rollback or session.shortened)
            else:
                session.crop(count)
                session.shortened = True
        elif operation == "record" and amount % 3 == 0:
            cache.activate_past_recording()
            session.shortened = True  # the rings are longer from now on, not from the start
        elif operation == "freeze" and cold == "drop":
            session.freeze()
        elif operation == "offload":
            cache.offload()
        elif operation == "layer":
            cache.offload(amount % LAYERS)
        elif operation == "prefetch":
            cache.prefetch()
        elif operation == "save":
            cache.save(folder / "session")
            session.cache = RedKnotCache.load(folder / "session", config)
            cache.reset()
        elif operation == "reorder":
            rows = np.random.default_rng(amount).integers(0, session.rows, session.rows)
            cache.reorder_cache(torch.from_numpy(rows))
            session.select(rows)
        elif operation == "repeat" and session.rows < 4:
            cache.batch_repeat_interleave(2)
            session.select(np.repeat(np.arange(session.rows), 2))
        elif operation == "profile":
            wanted = PROFILES[amount % len(PROFILES)]
            try:
                cache.set_profile(wanted)
            except CacheError as error:
                assert cold == "drop" and "has dropped" in str(error)
            else:
                session.profile, session.shortened = wanted, True
    for session in sessions:  # whatever was moved and not used since
        session.feed(1, generator)
        session.feed(5, generator)
    pools = {id(pool): pool for session in sessions for pool in session.cache._pools.values()}
    for session in sessions:
        session.cache.reset()
    for pool in pools.values():  # every page came back, exactly once
        assert pool.num_free == pool.num_pages - 1 and pool.refs.min() >= 0


KINDS = [("drop", None), ("drop", "int8"), ("drop", "fp8"), ("cpu", None), ("disk", None), ("resident", None)]


@pytest.fixture(autouse=True)
def freeze_only_when_asked(monkeypatch):
    monkeypatch.setattr("redknot_hf.cache.FREEZE_TOKENS", 1 << 40)


@pytest.fixture
def pool_only(monkeypatch):
    """As on a GPU, where the kernels read the pool alone and packed pages are thawed for them."""
    kernel_for = RedKnotLayer.kernel_for

    def marked(self, pages):
        kernel = kernel_for(self, pages)
        pages.needs_pool = not pages.quantised
        return kernel

    monkeypatch.setattr(RedKnotLayer, "kernel_for", marked)


@pytest.mark.parametrize(("cold", "kv_dtype"), KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(
    program=program,
    page_size=st.sampled_from([1, 4, 8, 16]),
    rollback=st.sampled_from([0, 3, 12]),
    near=st.sampled_from([1, 6, 20]),
)
def test_any_program(cold, kv_dtype, program, page_size, rollback, near):
    with tempfile.TemporaryDirectory() as folder:
        run(program, cold, page_size, rollback, near, Path(folder), kv_dtype)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(program=program, page_size=st.sampled_from([4, 8, 16]), rollback=st.sampled_from([0, 3]))
def test_any_program_over_the_pool_alone(pool_only, program, page_size, rollback):
    with tempfile.TemporaryDirectory() as folder:
        run(program, "drop", page_size, rollback, 1, Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("cold", "kv_dtype"), KINDS)
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(
    program=program,
    page_size=st.sampled_from([1, 2, 4, 8, 16, 64]),
    rollback=st.integers(0, 20),
    near=st.integers(1, 40),
)
def test_any_program_at_length(cold, kv_dtype, program, page_size, rollback, near):
    with tempfile.TemporaryDirectory() as folder:
        run(program, cold, page_size, rollback, near, Path(folder), kv_dtype)
