"""What is compared: the full cache, a head profile, and what else could be bought with the same bytes.

Every method but "full" and "blind" is a `HeadProfile` in a `RedKnotCache`, so all of them run the same code and differ in
which tokens each head keeps:

    full       DynamicCache: every token of every head
    ours       the head profile
    window     every head keeps the same recent window (uniform sliding window)
    streaming  every head keeps the first tokens and the same recent window (StreamingLLM, arXiv 2309.17453)
    random-K   the profile's classes, sinks and windows dealt to the heads at random (draw K)
    blind      no context at all: what the model answers from the question alone

Windows of "window" and "streaming" are the shortest that take at least as many pages as the profile does at the context
length, and fill them, so a method never loses for lack of bytes. This module knows no tasks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache import RedKnotCache
from ..errors import RedKnotError, shorten
from ..heads import HeadProfile

__all__ = ["DEFAULT_METHODS", "METHODS", "Method", "build_methods", "fitted", "matched_uniform", "shuffled"]

METHODS = ("full", "ours", "window", "streaming", "random", "blind")
DEFAULT_METHODS = METHODS


@dataclass(frozen=True)
class Method:
    """One way to keep the context.

    Attributes:
        name: as in rows and tables.
        make_cache: an empty cache.
        profile: of the cache; None for the ordinary one.
        blind: the context is left out.
    """

    name: str
    make_cache: Callable[[], Any]
    profile: HeadProfile | None = None
    blind: bool = False


def build_methods(
    config: Any,
    profile: HeadProfile,
    tokens: int,
    names: Sequence[str] = DEFAULT_METHODS,
    *,
    random_maps: int = 3,
    prefill: str = "windowed",
    page_size: int = 64,
    seed: int = 0,
) -> list[Method]:
    """The methods by name, at the bytes of ``profile`` after ``tokens`` tokens.

    Args:
        config: the model's config.
        profile: "ours".
        tokens: context length at which bytes are matched.
        names: some of `METHODS`; "random" stands for ``random_maps`` draws.
        random_maps: draws, at least 1.
        prefill, page_size: of every `RedKnotCache`.
        seed: of the draws.

    Raises:
        RedKnotError: an unknown name, or bad options.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise RedKnotError(f"--methods: {shorten(unknown[0])} is unknown; expected some of {', '.join(METHODS)}")
    if random_maps < 1:
        raise RedKnotError(f"--random-maps {random_maps}: expected at least 1")

    def paged(name: str, own: HeadProfile) -> Method:
        def make() -> RedKnotCache:
            return RedKnotCache(config, own, prefill=prefill, page_size=page_size)

        return Method(name, make, own)

    def plain() -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=config)

    found: list[Method] = []
    for name in dict.fromkeys(names):
        if name == "full":
            found.append(Method(name, plain))
        elif name == "ours":
            found.append(paged(name, profile))
        elif name == "window":
            found.append(paged(name, matched_uniform(config, profile, tokens, 0, page_size)))
        elif name == "streaming":
            found.append(paged(name, matched_uniform(config, profile, tokens, 4, page_size)))
        elif name == "random":
            found += [
                paged(f"random-{draw}", shuffled(profile, f"{seed}-{draw}")) for draw in range(1, random_maps + 1)
            ]
        else:
            found.append(Method(name, plain, blind=True))
    return found


def matched_uniform(config: Any, profile: HeadProfile, tokens: int, sink: int, page_size: int = 1) -> HeadProfile:
    """All heads local with one window, the shortest that takes at least the pages of ``profile`` after ``tokens``.

    Sink and window fill whole pages: what a page holds anyway costs this method nothing.
    """
    goal = _pages(profile, tokens, page_size)
    low, high = 1, max(1, -(-tokens // page_size))  # pages per head
    while low < high:
        middle = (low + high) // 2
        if _pages(HeadProfile.uniform(config, sink, max(1, middle * page_size - sink)), tokens, page_size) >= goal:
            high = middle
        else:
            low = middle + 1
    return HeadProfile.uniform(config, sink, max(1, low * page_size - sink))


def shuffled(profile: HeadProfile, seed: int | str) -> HeadProfile:
    """The profile's (class, sink, window) triples dealt to the attention heads at random: same bytes, other heads."""
    cells = [(l, h) for l in profile.attention_layers for h in range(profile.num_kv_heads)]
    order = list(cells)
    random.Random(f"map-{seed}").shuffle(order)
    classes = [list(row) for row in profile.head_class]
    sinks, windows = [list(row) for row in profile.sink], [list(row) for row in profile.window]
    for (l, h), (from_l, from_h) in zip(cells, order, strict=True):
        classes[l][h] = profile.head_class[from_l][from_h]
        sinks[l][h] = profile.sink[from_l][from_h]
        windows[l][h] = profile.window[from_l][from_h]
    kept = {k: v for k, v in profile.metadata.items() if k not in ("scores", "validation", "selection")}
    metadata = {**kept, "method": f"shuffled {seed}"}
    return HeadProfile(profile.num_layers, profile.num_kv_heads, classes, sinks, windows, metadata)


def fitted(profile: HeadProfile, fits: Callable[[HeadProfile], bool], page_size: int = 1) -> HeadProfile:
    """The profile with other windows, the longest for which ``fits`` says yes.

    Where the profile is too large, its longest windows are cut to a common length; where there is room, its shortest are
    raised to one. The global heads stay: the cheapest way to meet a byte budget without measuring heads again. Sink and
    window together are rounded to whole pages of ``page_size`` tokens, so that no slot that is paid for stays empty.

    Raises:
        RedKnotError: it does not fit even with the shortest windows.
    """
    widest = max((w for row in profile.window for w in row), default=0)
    if not widest:
        return profile

    def at(step: int) -> HeadProfile:
        def window(sink: int, own: int) -> int:
            own = min(own, step) if step <= widest else max(own, step - widest)
            return max(1, page_size * max(1, round((sink + own) / page_size)) - sink)

        windows = [
            [window(s, w) for s, w in zip(*rows, strict=True)]
            for rows in zip(profile.sink, profile.window, strict=True)
        ]
        kept = {k: v for k, v in profile.metadata.items() if k not in ("validation", "selection")}
        metadata = {**kept, "method": f"{profile.metadata.get('method', 'a profile')}, windows fitted"}
        return HeadProfile(
            profile.num_layers, profile.num_kv_heads, profile.head_class, profile.sink, windows, metadata
        )

    # Steps up to the widest window cut, those beyond raise; each stores at least as much as the one before.
    low, high = 1, 17 * widest
    if not fits(at(low)):
        raise RedKnotError(
            f"the profile's {profile.count('global')} global heads alone take more than this budget: choose fewer with "
            "HeadProfile.with_budget"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle - 1)
    return at(low)


def _pages(profile: HeadProfile, tokens: int, page_size: int) -> int:
    """Pages of one sequence; with pages of one token, the tokens stored."""
    return sum(-(-stored // page_size) for row in profile.stored_tokens(tokens) for stored in row)
