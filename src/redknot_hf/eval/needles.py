"""Sentences hidden in a long text: needles of four kinds, and chains of variable assignments.

Definitions: RULER (arXiv 2404.06654) section 3.1 (single, multi-key, multi-value, multi-query) and 3.2 (variable
tracking). Keys are made of two words, values are numbers of seven digits, as there.
"""

from __future__ import annotations

import itertools
import random
import string

from .prompts import Example, PromptMaker, common_words

__all__ = ["multikey", "multiquery", "multivalue", "passkey", "single", "variable_tracking"]

_INSTRUCTION = (
    "Some special magic numbers are hidden in the following text. Remember them: there will be a question about them "
    "afterwards.\n\n"
)
_VALUE_TOKENS = 12  # a number of seven digits is up to seven tokens, plus a blank and what ends it


def _depths(rng: random.Random, index: int, count: int) -> list[float]:
    """Depths of ``count`` sentences; the first one's spread evenly over the examples (golden ratio), 0 to 0.95."""
    first = 0.95 * ((index * 0.6180339887 + rng.random() * 0.05) % 1.0)
    return [first] + [0.95 * rng.random() for _ in range(count - 1)]


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _keys(rng: random.Random, count: int) -> list[str]:
    words = rng.sample(common_words(), 2 * count)
    return [f"{words[2 * i]}-{words[2 * i + 1]}" for i in range(count)]


def _sentence(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def passkey(maker: PromptMaker, index: int) -> Example:
    """A number in repeated noise (RULER's first single-needle variant)."""
    return _one_key(maker, index, "passkey", keys=1, noise=True)


def single(maker: PromptMaker, index: int) -> Example:
    """A number in prose."""
    return _one_key(maker, index, "single", keys=1)


def multikey(maker: PromptMaker, index: int) -> Example:
    """A number in prose, beside three others whose keys are not asked for."""
    return _one_key(maker, index, "multikey", keys=4)


def _one_key(maker: PromptMaker, index: int, name: str, keys: int, noise: bool = False) -> Example:
    rng = maker.rng(name, index)
    names = _keys(rng, keys)
    values = [_number(rng) for _ in names]
    inserts = [(d, _sentence(k, v)) for d, k, v in zip(_depths(rng, index, keys), names, values, strict=True)]
    context, opening = maker.haystack(_INSTRUCTION, inserts, index, noise)
    question = f"\n\nWhat is the special magic number for {names[0]} mentioned in the text above?"
    prefix = f"The special magic number for {names[0]} mentioned in the text is"
    return maker.example(name, index, context, opening, question, prefix, values[:1], _VALUE_TOKENS)


def multivalue(maker: PromptMaker, index: int, values: int = 4) -> Example:
    """Four numbers under one key; all are asked for."""
    rng = maker.rng("multivalue", index)
    (key,) = _keys(rng, 1)
    numbers = [_number(rng) for _ in range(values)]
    inserts = [(d, _sentence(key, v)) for d, v in zip(_depths(rng, index, values), numbers, strict=True)]
    context, opening = maker.haystack(_INSTRUCTION, inserts, index)
    question = f"\n\nWhat are all the special magic numbers for {key} mentioned in the text above?"
    prefix = f"The {values} special magic numbers for {key} mentioned in the text are"
    return maker.example("multivalue", index, context, opening, question, prefix, numbers, _VALUE_TOKENS * values)


def multiquery(maker: PromptMaker, index: int, queries: int = 4) -> Example:
    """Four keys with a number each; all are asked for."""
    rng = maker.rng("multiquery", index)
    keys = _keys(rng, queries)
    numbers = [_number(rng) for _ in keys]
    inserts = [(d, _sentence(k, v)) for d, k, v in zip(_depths(rng, index, queries), keys, numbers, strict=True)]
    context, opening = maker.haystack(_INSTRUCTION, inserts, index)
    listed = ", ".join(keys[:-1]) + f" and {keys[-1]}"
    question = f"\n\nWhat are the special magic numbers for {listed} mentioned in the text above?"
    prefix = f"The special magic numbers for {listed} mentioned in the text are"
    return maker.example("multiquery", index, context, opening, question, prefix, numbers, _VALUE_TOKENS * queries)


def variable_tracking(maker: PromptMaker, index: int, hops: int = 4) -> Example:
    """A chain X1 = number, X2 = X1, ... in noise; which variables hold the number?"""
    rng = maker.rng("vt", index)
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(hops + 1)]
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)]
    depths = sorted(0.95 * rng.random() for _ in lines)  # a variable is assigned before it is used
    context, opening = maker.haystack(
        "Keep track of the variables that are assigned in the following text.\n\n",
        list(zip(depths, lines, strict=True)),
        index,
        noise=True,
    )
    question = f"\n\nWhich variables have the value {value} in the text above, directly or through other variables?"
    prefix = f"{len(names)} variables have the value {value} in the text. They are:"
    return maker.example("vt", index, context, opening, question, prefix, names, 8 * len(names))
