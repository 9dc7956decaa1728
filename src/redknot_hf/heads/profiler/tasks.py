"""Prompts whose answer is known and far away: passkeys, key-value look-ups, records to recite, two-hop look-ups.

Every prompt is split into a context of exactly `context` tokens, which a cache may evict, and a suffix that holds the
question, the beginning of the answer and the answer, so that no question is ever inside the evicted part. Plain text
has the same form with the suffix as its continuation. Contexts of equal length make batches without padding.
"""

# ruff: noqa: SIM905 - word lists are easier to read and edit as one string than as quoted items

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import RedKnotError
from .texts import TokenStream

__all__ = ["NEEDLE_KINDS", "Batch", "Sample", "collate", "make_needles", "make_texts"]

NEEDLE_KINDS = ("passkey", "number", "lookup", "record", "two_hop")

_NAMES = "Marla;Tobin;Selma;Corwin;Ottilie;Bastian;Fenna;Lorcan;Imke;Radek;Sunniva;Anselm".split(";")
_THINGS = "copper lantern;blue crate;glass compass;oak chest;brass key;velvet ledger;silver flute;clay tablet".split(
    ";"
)
_SITES = (
    "harbour depot;north tower;old granary;river mill;stone cellar;customs house;signal station;winter garden".split(
        ";"
    )
)
_WORDS = (
    "amber;basil;cobalt;delta;ember;fjord;ginger;harbor;indigo;jasper;kettle;lemon;marble;nectar;onyx;pepper;quartz;"
    "raven;saffron;timber;umber;velvet;walnut;yellow;zephyr;anchor;bishop;candle;dragon;engine;feather;garden"
).split(";")


@dataclass
class Sample:
    """One prompt.

    Attributes:
        kind: one of `NEEDLE_KINDS`, or "text".
        context: ids that may be evicted.
        suffix: ids of question, answer prefix and answer; or of the continuing text.
        answer_start: index in `suffix` of the first answer token; all from there on are targets.
        needle: half-open range of context positions that hold what the answer needs; (0, 0) for text.
    """

    kind: str
    context: list[int]
    suffix: list[int]
    answer_start: int
    needle: tuple[int, int] = (0, 0)


@dataclass
class Batch:
    """Samples with contexts of one length; suffixes padded on the right.

    Attributes:
        context: int64 `[batch, context]`.
        suffix: int64 `[batch, rows]`.
        target: bool `[batch, rows]`: True where the logits of that row predict a target token (the next id).
        needle: `[batch]` ranges of context positions.
        kinds: `[batch]`.
    """

    context: Tensor
    suffix: Tensor
    target: Tensor
    needle: list[tuple[int, int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.context.shape[0]

    @property
    def next_ids(self) -> Tensor:
        """int64 `[batch, rows]`: the id each row should predict (0 in the last)."""
        return torch.cat([self.suffix[:, 1:], torch.zeros_like(self.suffix[:, :1])], dim=1)


def collate(samples: Sequence[Sample], device: Any = "cpu") -> Batch:
    """Put samples of equal context length into one batch."""
    rows = max(len(sample.suffix) for sample in samples)
    suffix = torch.zeros(len(samples), rows, dtype=torch.long)
    target = torch.zeros(len(samples), rows, dtype=torch.bool)
    for i, sample in enumerate(samples):
        suffix[i, : len(sample.suffix)] = torch.tensor(sample.suffix)
        target[i, max(sample.answer_start - 1, 0) : len(sample.suffix) - 1] = True
    context = torch.tensor([sample.context for sample in samples])
    return Batch(
        context.to(device), suffix.to(device), target.to(device), [s.needle for s in samples], [s.kind for s in samples]
    )


class _Frame:
    """A chat template cut at the places where the haystack and the question go; plain text without a template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before, self.between, self.after = "", "\n\n", "\n"
        self.add_special_tokens = True
        if getattr(tokenizer, "chat_template", None):
            marks = ("HAYSTACKMARK", "QUESTIONMARK")
            message = [{"role": "user", "content": f"{marks[0]}\n\n{marks[1]}"}]
            try:
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                before, rest = text.split(marks[0])
                between, after = rest.split(marks[1])
            except Exception:  # a template may demand other roles or tools: plain text then
                return
            self.before, self.between, self.after, self.add_special_tokens = before, between, after, False

    def ids(self, text: str, start: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=start and self.add_special_tokens)["input_ids"]


def _needle(kind: str, rng: random.Random) -> tuple[list[str], list[str], str, str, str]:
    """(needle sentences, distractors, question, answer prefix, answer)."""
    if kind == "passkey":
        key = str(rng.randint(10_000, 99_999))
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        return [needle], [], "What is the pass key? Answer with the pass key only.", "The pass key is", f" {key}"
    if kind == "number":
        thing = f"{rng.choice(_WORDS)}-{rng.choice(_WORDS)}"
        number = str(rng.randint(1_000_000, 9_999_999))
        needle = f"One of the special magic numbers for {thing} is: {number}."
        question = f"What is the special magic number for {thing} mentioned in the provided text?"
        prefix = f"The special magic number for {thing} mentioned in the provided text is"
        return [needle], [], question, prefix, f" {number}"
    if kind == "lookup":
        things = rng.sample(_THINGS, 2)
        codes = [str(rng.randint(1000, 9999)) for _ in things]
        lines = [f"The code of the {thing} is {code}." for thing, code in zip(things, codes, strict=True)]
        return (
            lines[:1],
            lines[1:],
            f"What is the code of the {things[0]}?",
            f"The code of the {things[0]} is",
            f" {codes[0]}",
        )
    if kind == "record":
        names = rng.sample(_NAMES, 2)
        words = rng.sample(_WORDS, 12)
        lines = [f'The note of {n} says: "{" ".join(w)}".' for n, w in zip(names, (words[:6], words[6:]), strict=True)]
        return (
            lines[:1],
            lines[1:],
            f"What does the note of {names[0]} say?",
            f'The note of {names[0]} says: "',
            f'{" ".join(words[:6])}".',
        )
    if kind == "two_hop":
        things, sites, names = rng.sample(_THINGS, 2), rng.sample(_SITES, 2), rng.sample(_NAMES, 2)
        needles = [f"The {things[0]} is stored in the {sites[0]}.", f"The keeper of the {sites[0]} is {names[0]}."]
        others = [f"The {things[1]} is stored in the {sites[1]}.", f"The keeper of the {sites[1]} is {names[1]}."]
        question = f"Where is the {things[0]} stored, and who is the keeper of that place?"
        prefix = f"The {things[0]} is stored in the"
        return needles, others, question, prefix, f" {sites[0]}, and the keeper of the {sites[0]} is {names[0]}"
    raise ValueError(f"kind is {kind!r}; expected one of {', '.join(NEEDLE_KINDS)}")


def make_needles(
    tokenizer: Any,
    stream: TokenStream,
    count: int,
    context: int,
    seed: int | str,
    kinds: Sequence[str] = NEEDLE_KINDS,
    together: int = 1,
) -> list[Sample]:
    """Retrieval prompts, kinds in turn, needles at spread depths.

    Args:
        tokenizer: of the model.
        stream: where the haystack comes from.
        count: prompts.
        context: tokens of every context, at least 128.
        seed: fixes every draw.
        kinds: of `NEEDLE_KINDS`.
        together: prompts that share one context, which holds all their needles: questions are cheap, contexts are not.
            At most as many as there are kinds, so that no two questions of a context are alike.
    """
    frame = _Frame(tokenizer)
    begin = frame.ids(frame.before, start=True)
    samples: list[Sample] = []
    while len(samples) < count:
        group = range(len(samples), min(len(samples) + together, count))
        questions = []
        encoded: list[tuple[float, int, list[int]]] = []
        for i in group:
            rng = random.Random(f"needle-{seed}-{i}")
            needles, others, question, prefix, answer = _needle(kinds[i % len(kinds)], rng)
            questions.append((question, prefix, answer))
            # Depth 2 % to 85 %: the needle must lie outside the sinks and (mostly) outside the windows.
            depth = 0.02 + 0.83 * ((i * 0.618 + rng.random() * 0.1) % 1.0)
            for text in needles + others:
                at = depth if text == needles[0] else 0.02 + 0.83 * rng.random()
                # Only the last needle holds what the final answer tokens are copied from; its span is the sample's.
                encoded.append((at, i if text == needles[-1] else -1, frame.ids(f"\n\n{text}\n\n")))
        encoded.sort()
        room = context - len(begin) - sum(len(ids) for _, _, ids in encoded)
        if room < 32:
            what = " and ".join(kinds[i % len(kinds)] for i in group)
            raise RedKnotError(f"context is {context} tokens; a {what} prompt needs at least {context - room + 32}")
        hay = stream.take(room)
        ids, used, span = list(begin), 0, {}
        for at, owner, piece in encoded:
            upto = int(at * room)
            ids += hay[used:upto]
            used = upto
            span[owner] = (len(ids), len(ids) + len(piece))
            ids += piece
        ids += hay[used:]
        for i, (question, prefix, answer) in zip(group, questions, strict=True):
            head = frame.ids(f"{frame.between}{question}{frame.after}{prefix}")
            samples.append(Sample(kinds[i % len(kinds)], ids, head + frame.ids(answer), len(head), span[i]))
    return samples


def make_texts(tokenizer: Any, stream: TokenStream, count: int, context: int, rows: int) -> list[Sample]:
    """Plain text: `context` tokens and the `rows` that follow, each predicting the next."""
    begin = _Frame(tokenizer).ids("", start=True) if getattr(tokenizer, "chat_template", None) is None else []
    samples = []
    for _ in range(count):
        ids = begin + stream.take(context + rows - len(begin))
        samples.append(Sample("text", ids[:context], ids[context:], 1))
    return samples
