"""The tasks by name: how a prompt is made and how its answer is scored.

The retrieval, tracking and aggregation tasks follow the definitions in RULER (Hsieh et al. 2024, arXiv 2404.06654,
section 3 and appendix B); key-value retrieval follows Liu et al. 2023 (arXiv 2307.03172, section 4). They are written
from those texts. What differs is said in docs/evaluation.md. A task is a row of `TASKS`; this module knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import RedKnotError, shorten
from . import aggregation, documents, needles, scoring
from .documents import Question
from .prompts import Example, PromptMaker

__all__ = ["DEFAULT_TASKS", "TASKS", "Task", "make_examples", "task"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        title: for tables and plots.
        make: (maker, index) -> a prompt; None for tasks that need the user's data or no prompt.
        score: (answer, references) -> share in [0, 1]; None for perplexity.
        measure: what the score is called.
    """

    title: str
    make: Callable[[PromptMaker, int], Example] | None
    score: Callable[[str, Sequence[str]], float] | None
    measure: str = "share of references found"


TASKS: dict[str, Task] = {
    "passkey": Task("passkey in noise", needles.passkey, scoring.found_share),
    "single": Task("single needle", needles.single, scoring.found_share),
    "multikey": Task("one of 4 keys", needles.multikey, scoring.found_share),
    "multivalue": Task("4 values of a key", needles.multivalue, scoring.found_share),
    "multiquery": Task("4 keys asked", needles.multiquery, scoring.found_share),
    "vt": Task("variable tracking", needles.variable_tracking, scoring.found_share),
    "cwe": Task("common words", aggregation.common_words_task, scoring.found_share),
    "fwe": Task("frequent words", aggregation.frequent_words_task, scoring.found_share),
    "kv": Task("key-value (UUIDs)", aggregation.key_value, scoring.found_share),
    "kv_short": Task("key-value (numbers)", aggregation.short_key_value, scoring.found_share),
    "qa": Task("multi-document QA", None, scoring.found_any, "an accepted answer found"),
    "ppl": Task("perplexity", documents.continuation, None, "perplexity"),
}
"""Tasks by their name on the command line."""

DEFAULT_TASKS = ("single", "multikey", "multivalue", "vt", "cwe", "fwe", "kv", "kv_short", "ppl")


def task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        RedKnotError: there is none.
    """
    if name not in TASKS:
        raise RedKnotError(f"--tasks: {shorten(name)} is no task; expected some of {', '.join(TASKS)}")
    return TASKS[name]


def make_examples(name: str, maker: PromptMaker, count: int, questions: Sequence[Question] = ()) -> list[Example]:
    """The first ``count`` prompts of a task; the same for the same maker, whatever else runs.

    Args:
        name: the task.
        maker: length, seed and tokenizer.
        count: prompts; of "qa" at most as many as there are questions that fit.
        questions: the user's, for "qa".

    Raises:
        RedKnotError: unknown task, too short a context, or "qa" without questions.
    """
    found = task(name)
    if name == "qa":
        return documents.question_examples(maker, questions, count)
    assert found.make is not None
    return [found.make(maker, index) for index in range(count)]
