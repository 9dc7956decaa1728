"""How answers are scored, and how sure a mean is.

Scores are shares in [0, 1]. Text is compared in lower case with blanks collapsed. This module knows no models.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from ..heads.profiler.validation import bootstrap, wilson

__all__ = ["bootstrap", "contains", "found_any", "found_share", "interval", "token_f1", "wilson"]


def contains(answer: str, reference: str) -> bool:
    """Whether the answer holds the reference as whole words: "12345" is not in "123456"."""
    answer, reference = _plain(answer), _plain(reference)
    if not reference:
        return False
    # \b would not do: a reference may begin or end with something that is no word character.
    return re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", answer) is not None


def found_share(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer holds (RULER's measure for retrieval, tracking and aggregation)."""
    return sum(contains(answer, reference) for reference in references) / len(references)


def found_any(answer: str, references: Sequence[str]) -> float:
    """1 if the answer holds at least one reference (RULER's measure for question answering)."""
    return float(any(contains(answer, reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 of the words of the answer's first line against any reference, without articles and punctuation.

    (SQuAD's and HotpotQA's measure; the first line only, because a base model goes on to other things.)
    """
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    words = _words(lines[0]) if lines else []
    return max(_f1(words, _words(reference)) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def interval(scores: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for right or wrong, else a bootstrap over prompts.

    A bootstrap of scores that are all alike would claim certainty; their interval is Wilson's, too.
    """
    if set(scores) <= {0.0, 1.0}:
        return wilson(round(sum(scores)), len(scores))
    return bootstrap(list(scores), draws)


def _plain(text: str) -> str:
    # Texts from the web hold no-break spaces; split() knows them.
    return " ".join(text.lower().split())


def _words(text: str) -> list[str]:
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]
