"""Prompts of an exact length, cut where the question begins.

An `Example` is a context of token ids, which a cache may evict from, and a question that comes after it. The cut is the
point: a cache that evicts has to decide before it knows the question. Contexts of one length make batches without
padding and comparable memory.

This module knows chat templates and tokenizers. It does not know tasks.
"""

from __future__ import annotations

import importlib.resources
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import RedKnotError
from ..heads.profiler.texts import make_prose

__all__ = ["NOISE", "Example", "Frame", "Haystack", "PromptMaker", "common_words"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
"""The filler of passkey retrieval (Mohtashami & Jaggi 2023, arXiv 2305.16300), which RULER takes over."""


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        task: the task's name.
        index: number within (task, context length, seed).
        context: token ids that may be evicted; as many as the context length says.
        opening: how many of them come before the text itself (chat template, instruction), for the run without it.
        question: token ids of the question and of the answer's beginning; of a text, its continuation.
        references: what a right answer contains.
        max_new_tokens: longest answer.
    """

    task: str
    index: int
    context: tuple[int, ...]
    opening: int
    question: tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int


class Frame:
    """What stands before the context, between context and question, and after the question.

    Args:
        tokenizer: a transformers tokenizer.
        chat: use the tokenizer's chat template, if it has one that keeps a message in one piece.
    """

    def __init__(self, tokenizer: Any, chat: bool = True) -> None:
        self.tokenizer = tokenizer
        self.chat = False
        self._before, self._after = "", "\n"
        if chat and getattr(tokenizer, "chat_template", None):
            # A word that no template contains: it shows where the message goes.
            mark = "\u2042MESSAGE\u2042"
            try:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
                )
            except Exception:  # whatever a template raises that wants other roles or tools
                text = ""
            if text.count(mark) == 1:
                self._before, self._after = text.split(mark)
                self.chat = True

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def begin(self, instruction: str) -> list[int]:
        """Ids of the template's opening and the instruction. Without a template: the tokenizer's own first tokens."""
        if self.chat:
            return self.ids(self._before + instruction)
        return list(self.tokenizer(instruction, verbose=False)["input_ids"])

    def ask(self, question: str, prefix: str) -> list[int]:
        """Ids of the question, the template's turn to the assistant, and the beginning of the answer."""
        return self.ids(f"{question}{self._after}{prefix}")


class Haystack:
    """Sentences without end: the user's texts, or made-up prose.

    Args:
        texts: plain texts; None for made-up prose.
        seed: where to begin.
    """

    def __init__(self, texts: Sequence[str] | None, seed: int | str) -> None:
        self._texts = texts
        self._seed = seed

    def __iter__(self) -> Iterator[str]:
        """Sentences with their trailing blanks, wrapping around where the user's texts are short."""
        if self._texts is None:
            count = 0
            while True:
                yield from _sentences(make_prose(f"eval-{self._seed}-{count}", paragraphs=18))
                count += 1
        order = _split(tuple(self._texts))
        if not order:
            raise RedKnotError("the haystack texts hold no sentence: pass plain text of a few thousand words")
        at = random.Random(f"haystack-{self._seed}").randrange(len(order))
        while True:
            yield order[at]
            at = (at + 1) % len(order)


class PromptMaker:
    """Builds contexts of exactly ``tokens`` ids.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: length of every context.
        seed: of all draws.
        texts: haystack texts; None for made-up prose.
        chat: use the chat template.
    """

    def __init__(
        self, tokenizer: Any, tokens: int, seed: int = 0, texts: Sequence[str] | None = None, chat: bool = True
    ) -> None:
        self.frame = Frame(tokenizer, chat)
        self.tokens, self.seed, self.texts = tokens, seed, texts

    def rng(self, task: str, index: int) -> random.Random:
        """The same draws for the same (task, length, index, seed), whatever else runs."""
        return random.Random(f"{task}-{self.tokens}-{index}-{self.seed}")

    def haystack(
        self, instruction: str, inserts: Sequence[tuple[float, str]], index: int, noise: bool = False
    ) -> tuple[list[int], int]:
        """A long text with sentences inserted.

        Args:
            instruction: what stands before the text.
            inserts: (depth, sentence): the sentence goes between two sentences of the text, ``depth`` (0 to 1) of the way.
            index: which part of the haystack.
            noise: the text is `NOISE` over and over.

        Returns:
            Exactly ``tokens`` ids, and how many of them are the opening.

        Raises:
            RedKnotError: no room for the inserts.
        """
        begin = self.frame.begin(instruction)
        # By depth alone: sentences at one depth stay in the order they were given.
        needles = [(depth, self.frame.ids(f"{text} ")) for depth, text in sorted(inserts, key=lambda item: item[0])]
        room = self.tokens - len(begin) - sum(len(ids) for _, ids in needles)
        if room < 16:
            raise RedKnotError(
                f"a context of {self.tokens} tokens is too short for this task: the prompt alone takes "
                f"{self.tokens - room}; use a longer one"
            )
        source: Iterator[str] = iter(Haystack(self.texts, f"{self.seed}-{index}"))
        if noise:
            source = _repeat(NOISE)
        ids, used = list(begin), 0
        waiting = list(needles)
        while used < room:
            while waiting and used >= waiting[0][0] * room:
                ids += waiting.pop(0)[1]
            piece = self.frame.ids(next(source))[: room - used]
            ids += piece
            used += len(piece)
        for _, piece in waiting:
            ids += piece
        return ids, len(begin)

    def listing(
        self, instruction: str, make: Callable[[int], str], most: int, least: int = 1, tail: str = "\n"
    ) -> tuple[list[int], int, int]:
        """As many items as fit; what is left is filled with `NOISE` before the instruction's list.

        Args:
            instruction: what stands before the items.
            make: number of items -> the text of the list.
            most: more items than this are never asked for.
            least: fewer make no task.
            tail: stands after the list.

        Returns:
            Exactly ``tokens`` ids, how many are the opening, and the number of items.

        Raises:
            RedKnotError: fewer than ``least`` items fit.
        """
        begin = self.frame.begin(instruction)
        room = self.tokens - len(begin)

        def size(count: int) -> list[int]:
            return self.frame.ids(make(count) + tail)

        low, high = least, most
        body = size(least)
        if len(body) > room:
            raise RedKnotError(
                f"a context of {self.tokens} tokens is too short for this task: its smallest list takes "
                f"{len(begin) + len(body)}; use a longer one"
            )
        while low < high:
            middle = (low + high + 1) // 2
            attempt = size(middle)
            if len(attempt) <= room:
                low, body = middle, attempt
            else:
                high = middle - 1
        filler, line = room - len(body), self.frame.ids("\n")
        fill: list[int] = []
        for piece in _repeat(NOISE):
            if len(fill) >= filler:
                break
            fill += self.frame.ids(piece)
        fill = fill[:filler]
        if filler > len(line):
            fill[-len(line) :] = line
        return begin + fill + body, len(begin), low

    def example(
        self, task: str, index: int, context: Sequence[int], opening: int, question: str, prefix: str,
        references: Sequence[str], max_new_tokens: int,
    ) -> Example:  # fmt: skip
        return Example(
            task,
            index,
            tuple(context),
            opening,
            tuple(self.frame.ask(question, prefix)),
            tuple(references),
            max_new_tokens,
        )


def _repeat(text: str) -> Iterator[str]:
    sentences = list(_sentences(text))
    while True:
        yield from sentences


@lru_cache(maxsize=4)
def _split(texts: tuple[str, ...]) -> list[str]:
    """Kept: every prompt starts somewhere in the same texts."""
    return [sentence for text in texts for sentence in _sentences(text)]


def _sentences(text: str) -> Iterator[str]:
    """Sentences with the blanks that follow them; joined they give the text again."""
    for piece in re.split(r"(?<=[.!?])(?=\s)", text):
        if piece.strip():
            yield piece.lstrip() + ("" if piece.endswith("\n") else " ")


@lru_cache
def common_words() -> tuple[str, ...]:
    """Some 800 lower-case English words of 4 to 9 letters: those of the article that comes with the package."""
    text = (importlib.resources.files("redknot_hf") / "data" / "aardvark.txt").read_text(encoding="utf-8")
    return tuple(sorted(set(re.findall(r"(?<![\w'’-])[a-z]{4,9}(?![\w'’-])", text))))
