"""Plain text that is on every machine, and text of the user's, as token streams.

Without texts of the user's, half of the text is made here and half is the language reference that comes with Python
(`pydoc_data.topics`): real prose keeps the made-up half honest. The generator writes small encyclopaedic paragraphs
from a grammar with many slots: not literature, but text in which names, numbers and topics recur over long distances,
which is what a head with a long reach can use; one seed gives the same prose everywhere (the reference differs between
Python versions). It does not know tokenizers' quirks beyond calling them.
"""

# ruff: noqa: SIM905 - word lists are easier to read and edit as one string than as quoted items

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["TokenStream", "make_paragraph", "make_prose", "python_topics"]

_PLACES = (
    "Alden Harbor;Brightmoor;Calder Valley;Dunmere;Eastwick;Fennbridge;Glasslake;Hollow Ridge;Ironvale;Juniper Falls;"
    "Kestrel Point;Larkfield;Marrow Bay;Northgate;Oakhurst;Pinecrest;Quarry Hill;Ravenwood;Saltmarsh;Thornbury;"
    "Upper Wexley;Violet Springs;Westerly;Yarrow Creek"
).split(";")
_PEOPLE = (
    "Amara Osei;Bruno Keller;Clara Whitfield;Dmitri Volkov;Elena Marquez;Farid Haddad;Greta Lindqvist;Hiroshi Tanaka;"
    "Ines Carvalho;Jonas Weber;Kavita Rao;Liam Gallagher;Mei Chen;Nadia Petrova;Oscar Delgado;Priya Nair;Quentin Moreau;"
    "Rosa Bianchi;Samuel Adeyemi;Tessa van Dijk;Umar Siddiqui;Vera Novak;Walter Higgins;Yusuf Demir;Zoe Papadakis"
).split(";")
_TOPICS: dict[str, tuple[str, ...]] = {
    "river engineering": (
        "lock",
        "embankment",
        "gauging station",
        "spillway",
        "dredger",
        "culvert",
        "flood plain",
        "weir",
    ),
    "astronomy": (
        "telescope",
        "spectrograph",
        "dome",
        "catalogue",
        "double star",
        "photographic plate",
        "eclipse",
        "orbit",
    ),
    "bread making": ("starter", "oven", "rye flour", "crust", "proofing basket", "dough", "crumb", "hearth"),
    "cartography": (
        "survey",
        "contour line",
        "compass",
        "base map",
        "triangulation point",
        "atlas",
        "scale bar",
        "plane table",
    ),
    "textile weaving": ("loom", "shuttle", "warp", "linen yarn", "dye vat", "pattern card", "selvage", "spindle"),
    "seed ecology": (
        "meadow",
        "pollinator",
        "seed bank",
        "root system",
        "field trial",
        "wild thyme",
        "soil sample",
        "hedge",
    ),
    "railway history": (
        "locomotive",
        "signal box",
        "timetable",
        "gauge",
        "branch line",
        "platform",
        "viaduct",
        "carriage",
    ),
    "early computing": (
        "punched card",
        "relay",
        "memory drum",
        "subroutine",
        "console",
        "paper tape",
        "register",
        "compiler",
    ),
    "music theory": (
        "cadence",
        "counterpoint",
        "string quartet",
        "tuning fork",
        "manuscript",
        "fugue",
        "interval",
        "chorale",
    ),
    "mountain rescue": (
        "rope",
        "ridge",
        "radio beacon",
        "stretcher",
        "weather report",
        "base camp",
        "avalanche probe",
        "guide",
    ),
    "coastal fishing": ("trawler", "net", "lighthouse", "tide table", "herring season", "quay", "cold store", "buoy"),
    "public libraries": (
        "reading room",
        "card index",
        "lending desk",
        "rare book",
        "night school",
        "archive",
        "bequest",
        "shelf",
    ),
}
_ADJECTIVES = (
    "careful;unusual;modest;ambitious;narrow;celebrated;forgotten;practical;costly;elegant;early;detailed;quiet;remarkable;"
    "stubborn;provisional;sturdy;controversial;regional;patient"
).split(";")
_VERBS = "described;repaired;measured;financed;catalogued;abandoned;redesigned;inspected;defended;sketched;extended;sold".split(
    ";"
)
_REASONS = (
    "because the winter had been long;although few people noticed at the time;after a vote that lasted until midnight;"
    "since the old one no longer met the need;while the rest of the town was busy with the harvest;"
    "before any money had been promised;as the letters of the period make clear;without asking the council first;"
    "even though the first attempt had failed;partly out of curiosity and partly out of necessity"
).split(";")
_CLOSERS = (
    "Visitors still ask about it today.;The exact figures remain disputed.;A second volume was planned but never printed.;"
    "None of this was known to the wider public.;What happened next depended on the weather.;"
    "The minutes of the meeting run to forty pages.;It was, by most accounts, a sensible decision.;"
    "Later writers repeated the story with small changes.;The matter rested there for nearly a decade.;"
    "Much of the correspondence has survived."
).split(";")


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _sentence(rng: random.Random, topic: str, cast: Sequence[str], place: str, year: int) -> str:
    nouns = _TOPICS[topic]
    a, b = rng.sample(nouns, 2)
    who, other = rng.sample(list(cast), 2)
    adjective, second = rng.sample(_ADJECTIVES, 2)
    number = rng.choice((rng.randint(3, 19), rng.randint(20, 95), rng.randint(100, 980)))
    forms = (
        f"In {year}, {who} {rng.choice(_VERBS)} the {a} near {place}, {rng.choice(_REASONS)}.",
        f"The {a} at {place} was {_article(adjective)} piece of work, and {other} called it {second} in a letter to {who}.",
        f"According to {other}, the {b} cost {number} crowns, about twice what {who} had expected.",
        f"{who} had come to {topic} by accident; {other}, on the other hand, had studied every {a} in the region.",
        f"Between {year} and {year + rng.randint(1, 9)} the number of people who used the {b} rose from {number} to "
        f"{number + rng.randint(5, 400)}.",
        f'"A {a} is only as good as its {b}," {who} used to say, and the people of {place} agreed.',
        f"For {topic}, the {adjective} {a} mattered less than the {b}, which {other} {rng.choice(_VERBS)} twice.",
        f"When {other} returned to {place}, the {second} {b} had been replaced by {_article(adjective)} {a}.",
        f"There were {number} reports about the {a}; {who} read all of them, {rng.choice(_REASONS)}.",
        f"It is easy to forget that {place} had no {b} before {year}, and that {who} paid for the first one.",
        f"The difference between {_article(a)} and {_article(b)} is simple: the first is {adjective}, the second {second}.",
        rng.choice(_CLOSERS),
    )
    return rng.choice(forms)


def make_paragraph(rng: random.Random, topic: str, cast: Sequence[str], place: str) -> str:
    """One paragraph of four to eight sentences about a topic, with recurring people."""
    year = rng.randint(1840, 1990)
    return " ".join(_sentence(rng, topic, cast, place, year + i) for i in range(rng.randint(4, 8)))


def make_prose(seed: int | str, paragraphs: int = 12) -> str:
    """A made-up article: one place, a small cast, two topics; the same for the same seed everywhere."""
    rng = random.Random(f"prose-{seed}")
    place = rng.choice(_PLACES)
    topics = rng.sample(sorted(_TOPICS), 2)
    cast = rng.sample(_PEOPLE, 5)
    parts = [f"{topics[0].capitalize()} in {place}"]
    for i in range(paragraphs):
        parts.append(make_paragraph(rng, topics[0] if i % 3 else topics[1], cast, place))
    return "\n\n".join(parts)


def python_topics() -> list[str]:
    """Long topics of the Python language reference, in a fixed order; empty where Python comes without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[key] for key in sorted(topics) if len(topics[key]) > 2000]


class TokenStream:
    """Token ids of text, taken piece by piece without repetition.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the user's texts; None takes made-up prose and Python's reference in turn, as much as is asked for.
        seed: which made-up prose, and where in the user's texts to start.
        reference: real prose to take in turn with made-up prose when `texts` is None.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str] | None, seed: int | str, reference: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._source = self._pieces(texts, seed, reference)
        self._buffer: list[int] = []

    @staticmethod
    def _pieces(texts: Sequence[str] | None, seed: int | str, reference: Sequence[str]) -> Iterator[str]:
        if texts is None:
            topics = list(reference)
            random.Random(f"topics-{seed}").shuffle(topics)
            count = 0
            while True:
                # Pieces of a few hundred tokens in turn would make every context a mixture; articles are longer.
                yield make_prose(f"{seed}-{count}", paragraphs=18)
                size = 0
                while topics and size < 10_000:
                    size += len(topics[0])
                    yield topics[0]
                    topics.append(topics.pop(0))
                count += 1
        order = [piece for text in texts for piece in _split(text)]
        start = random.Random(f"start-{seed}").randrange(len(order)) if order else 0
        while order:  # wraps around when the user's texts are short
            yield from order[start:]
            start = 0

    def take(self, tokens: int) -> list[int]:
        """The next `tokens` ids."""
        while len(self._buffer) < tokens:
            piece = next(self._source) + "\n\n"
            self._buffer += self._tokenizer(piece, add_special_tokens=False)["input_ids"]
        taken, self._buffer = self._buffer[:tokens], self._buffer[tokens:]
        return taken


def _split(text: str, size: int = 20_000) -> Iterable[str]:
    """Pieces of at most `size` characters, so that one huge file is not tokenized for a few tokens."""
    return [text[i : i + size] for i in range(0, len(text), size) if text[i : i + size].strip()]
