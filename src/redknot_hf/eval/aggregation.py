"""Lists that fill the context: common words, frequent words, key-value pairs.

Definitions: RULER (arXiv 2404.06654) section 3.3 for common and frequent words; Liu et al. 2023 (arXiv 2307.03172)
section 4 for key-value retrieval.
"""

from __future__ import annotations

import random
import string
import uuid

from .prompts import Example, PromptMaker, common_words

__all__ = ["common_words_task", "frequent_words_task", "key_value", "short_key_value"]

COMMON = 10
COMMON_TIMES, OTHER_TIMES = 30, 3


def common_words_task(maker: PromptMaker, index: int) -> Example:
    """A numbered list in which ten words come 30 times and others 3 times; which ten?

    A short context cannot hold 300 words: the common ones then come less often, at least twice as often as the others.
    """
    rng = maker.rng("cwe", index)
    words = list(common_words())
    rng.shuffle(words)
    common, others = words[:COMMON], words[COMMON:]
    # About four tokens an item; the common words shall take at most two thirds of the list.
    times = max(2 * OTHER_TIMES, min(COMMON_TIMES, maker.tokens // 4 * 2 // 3 // COMMON))

    def text(count: int) -> str:
        items = [word for word in common for _ in range(times)]
        items += [word for word in others[:count] for _ in range(OTHER_TIMES)]
        random.Random(f"cwe-{index}-{maker.seed}").shuffle(items)
        return " ".join(f"{number}. {word}" for number, word in enumerate(items, 1))

    context, opening, _ = maker.listing(
        "Below is a numbered list of words. Some of them appear more often than others. Remember the ones that appear "
        "most often.\n\n",
        text,
        most=len(others),
    )
    question = f"\nWhat are the {COMMON} most common words in the list above?"
    prefix = f"The {COMMON} most common words in the list are:"
    return maker.example("cwe", index, context, opening, question, prefix, common, 6 * COMMON)


def frequent_words_task(maker: PromptMaker, index: int, alpha: float = 2.0) -> Example:
    """Made-up words, the one of rank k in proportion to k^-alpha; the first rank is "...", to be ignored. Which three?"""
    rng = maker.rng("fwe", index)
    vocabulary = ["..."] + ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(50)]
    weights = [(rank + 1) ** -alpha for rank in range(len(vocabulary))]

    def text(count: int) -> str:
        # Counts are the expected ones, not drawn: otherwise ranks two to four could come out in another order.
        items = [
            word
            for word, weight in zip(vocabulary, weights, strict=True)
            for _ in range(max(1, round(count * weight / sum(weights))))
        ]
        random.Random(f"fwe-{index}-{maker.seed}").shuffle(items)
        return " ".join(items)

    context, opening, _ = maker.listing(
        "Read the following coded text and count how often each coded word appears.\n\n",
        text,
        most=maker.tokens,
        least=60,
    )
    question = (
        "\nWhat are the three most frequent coded words in the text above? The dots '...' do not count as a word."
    )
    prefix = "The three most frequent coded words in the text are:"
    return maker.example("fwe", index, context, opening, question, prefix, vocabulary[1:4], 24)


def key_value(maker: PromptMaker, index: int) -> Example:
    """A JSON object of random UUIDs, as many pairs as fit; the value of one key is asked for."""
    rng = maker.rng("kv", index)
    pairs = [(_uuid(rng), _uuid(rng)) for _ in range(max(2, maker.tokens // 20))]
    return _look_up(maker, index, "kv", pairs, 40)


def short_key_value(maker: PromptMaker, index: int) -> Example:
    """The same with keys of two words and values of five digits, for models that cannot copy a UUID."""
    rng = maker.rng("kv_short", index)
    words = list(common_words())
    pairs: dict[str, str] = {}
    while len(pairs) < max(2, maker.tokens // 6):
        pairs["-".join(rng.sample(words, 2))] = str(rng.randint(10_000, 99_999))
    return _look_up(maker, index, "kv_short", list(pairs.items()), 10)


def _look_up(maker: PromptMaker, index: int, name: str, pairs: list[tuple[str, str]], longest: int) -> Example:
    depth = (index * 0.6180339887 + maker.rng(f"{name}-depth", index).random() * 0.05) % 1.0

    def text(count: int) -> str:
        return "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs[:count]) + "}"

    context, opening, count = maker.listing(
        "Extract the value of the specified key from the JSON object below.\n\nJSON data:\n",
        text,
        most=len(pairs),
        least=2,
    )
    key, value = pairs[int(depth * count)]
    question = f'\nKey: "{key}"\nCorresponding value:'
    prefix = f'The value of the key "{key}" is "'
    return maker.example(name, index, context, opening, question, prefix, [value], longest)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
