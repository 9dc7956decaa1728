"""Run somebody else's test suite against RedKnot: make it what ``generate()`` uses when nobody asked for anything.

As a pytest plugin, in a checkout of transformers:

    pytest -p redknot_hf.testing tests/models/llama -k "generate or beam or assisted or past_key_values"

As a context manager:

    with redknot_by_default() as made:
        model = AutoModelForCausalLM.from_config(config)   # attn_implementation="redknot"
        model.generate(**inputs)                           # RedKnotCache, all heads global
    print(made)

While it lasts, models that ask for no attention implementation get "redknot", and `generate` calls that bring no cache get
a `RedKnotCache` whose heads are all global: exact, so every test that passes with `DynamicCache` has to pass. An
implementation asked for by name is left alone. Families whose attention transformers cannot change keep it, and configs
that a RedKnotCache refuses get the `DynamicCache` they would have had; both are counted, and pytest's summary shows them.

It replaces three names inside transformers and puts them back: nothing else in the package does, and this module is
imported by nothing else. It does not touch the caches that a model's own ``forward`` makes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import DynamicCache
from transformers.generation import utils as generation
from transformers.modeling_utils import PreTrainedModel

from .attention import NAME
from .cache import RedKnotCache
from .errors import RedKnotError
from .heads import HeadProfile

__all__ = ["Made", "redknot_by_default"]


@dataclass
class Made:
    """What was made while RedKnot was the default.

    Attributes:
        caches: RedKnotCaches that ``generate`` got.
        models: models that were built with "redknot".
        refused: why a config got a `DynamicCache` after all, and how often.
        kept: model classes whose attention transformers cannot change, and how often they were built.
    """

    caches: int = 0
    models: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.models} models ran {NAME!r}, {self.caches} caches were RedKnotCaches"]
        lines += [f"{count} DynamicCaches instead: {why}" for why, count in self.refused.most_common()]
        lines += [f"{count} x {name} kept its own attention" for name, count in self.kept.most_common()]
        return "\n".join(lines)


class DefaultRedKnotCache(RedKnotCache, DynamicCache):
    """The cache that `generate` gets. It is a DynamicCache for those who ask, as suites and encoder-decoder models do."""


class _StandIn(type):
    """A class that is called in place of another one and still answers isinstance() for it."""

    original: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.make(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (cls.original, *cls.also))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls.original, *cls.also))

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)


def _dynamic_cache(made: Made) -> type:
    original = generation.DynamicCache

    def make(*args: Any, config: Any = None, offloading: bool = False, **kwargs: Any) -> Any:
        def plain(why: str) -> Any:
            made.refused[why] += 1
            return original(*args, config=config, offloading=offloading, **kwargs)

        if args or config is None or offloading or kwargs:
            return plain("offloading" if offloading else "no config to make it from")
        try:
            cache = DefaultRedKnotCache(config, HeadProfile.all_global(config))
        except RedKnotError as refusal:
            return plain(str(refusal))
        if not cache.paged_layers:
            return plain(f"{type(config).__name__}: no layer that could be served from pages")
        made.caches += 1
        return cache

    return _StandIn("DynamicCache", (), {"original": original, "also": (RedKnotCache,), "make": staticmethod(make)})


def _encoder_decoder_cache(made: Made) -> type:
    original = generation.EncoderDecoderCache
    dynamic = generation.DynamicCache

    def make(own: Any, cross: Any, *rest: Any) -> Any:
        if isinstance(cross, RedKnotCache):  # an encoder's keys are seen in both directions: not ours to keep
            made.caches -= 1
            cross = dynamic(config=cross.config)
        return original(own, cross, *rest)

    return _StandIn("EncoderDecoderCache", (), {"original": original, "also": (), "make": staticmethod(make)})


def _choose(made: Made) -> Any:
    original = PreTrainedModel.get_correct_attn_implementation

    def get_correct_attn_implementation(self: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
        usual = original(self, requested, *args, **kwargs)
        if requested is not None:
            return usual
        if not type(self)._can_set_attn_implementation():
            made.kept[type(self).__name__] += 1
            return usual
        made.models += 1
        return NAME

    return get_correct_attn_implementation


@contextlib.contextmanager
def redknot_by_default() -> Iterator[Made]:
    """Make "redknot" and a `RedKnotCache` (all heads global) the defaults; see the module's description."""
    made = Made()
    replaced: list[tuple[Any, str, Any]] = [
        (generation, "DynamicCache", _dynamic_cache(made)),
        (generation, "EncoderDecoderCache", _encoder_decoder_cache(made)),
        (PreTrainedModel, "get_correct_attn_implementation", _choose(made)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, ours in replaced:
        setattr(owner, name, ours)
    try:
        yield made
    finally:
        for owner, name, theirs in before:
            setattr(owner, name, theirs)


# ------------------------------------------------------------------------------------------------ the pytest plugin
_running: list[tuple[contextlib.AbstractContextManager[Made], Made]] = []


def pytest_configure(config: Any) -> None:
    """Hook of pytest: start."""
    manager = redknot_by_default()
    _running.append((manager, manager.__enter__()))


def pytest_unconfigure(config: Any) -> None:
    """Hook of pytest: put everything back."""
    if _running:
        _running.pop()[0].__exit__(None, None, None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Hook of pytest: say what was run."""
    if _running:
        terminalreporter.section("redknot by default")
        terminalreporter.write_line(str(_running[-1][1]))
