"""Text of the user's: questions over several documents, and plain text to continue.

Questions come as HotpotQA writes them (`question`, `answer`, `context` with titles and sentences), as NQ-open and
"Lost in the Middle" do (`question`, `answers`, `ctxs` with title and text), or as the lists that HotpotQA's own file has.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RedKnotError, shorten
from .prompts import Example, Haystack, PromptMaker

__all__ = ["Question", "continuation", "question_examples", "read_questions", "read_texts"]

CONTINUED = 128  # tokens that a text is continued by
_LARGEST = 2**30


@dataclass(frozen=True)
class Question:
    """A question, the answers that count, and the documents: (title, text)."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[tuple[str, str], ...]


def continuation(maker: PromptMaker, index: int) -> Example:
    """Plain text and the `CONTINUED` tokens that follow it, which are scored one by one; no chat template."""
    tokenizer = maker.frame.tokenizer
    ids: list[int] = list(tokenizer("", verbose=False)["input_ids"])
    opening = len(ids)
    for sentence in Haystack(maker.texts, f"ppl-{maker.seed}-{index}"):
        ids += maker.frame.ids(sentence)
        if len(ids) >= maker.tokens + CONTINUED:
            break
    end = maker.tokens + CONTINUED
    return Example("ppl", index, tuple(ids[: maker.tokens]), opening, tuple(ids[maker.tokens : end]), (), 0)


def question_examples(maker: PromptMaker, questions: Sequence[Question], count: int) -> list[Example]:
    """Questions over their documents, filled up with documents of other questions to the context length.

    The gold documents keep their places among the others. Questions whose own documents do not fit are left out.

    Raises:
        RedKnotError: no questions, or none whose documents fit.
    """
    if not questions:
        raise RedKnotError("task qa needs --data: a file or folder of questions with their documents")
    found: list[Example] = []
    for number in range(len(questions)):
        if len(found) == count:
            break
        example = _question_example(maker, questions, number, len(found))
        if example is not None:
            found.append(example)
    if not found:
        raise RedKnotError(
            f"--data: no question's documents fit into {maker.tokens} tokens; use a longer context or shorter documents"
        )
    return found


def _question_example(maker: PromptMaker, questions: Sequence[Question], number: int, index: int) -> Example | None:
    question = questions[number]
    instruction = "Answer the question using the documents below. Give only the answer.\n\n"
    begin = maker.frame.begin(instruction)
    room = maker.tokens - len(begin)
    own = [_document_ids(maker, *document) for document in question.documents]
    if sum(map(len, own)) > room:
        return None
    others: list[list[int]] = []
    left = room - sum(map(len, own))
    for step in range(1, len(questions)):
        for document in questions[(number + step) % len(questions)].documents:
            if left <= 0:
                break
            piece = _document_ids(maker, *document)[:left]
            others.append(piece)
            left -= len(piece)
        if left <= 0:
            break
    if left > 0:  # the data set is smaller than one context
        filler: list[int] = []
        for sentence in Haystack(maker.texts, f"qa-{maker.seed}-{index}"):
            filler += maker.frame.ids(sentence)
            if len(filler) >= left:
                break
        others.insert(0, filler[:left])
    # The last of the others may be cut in the middle, so it goes first; where the own ones go is drawn.
    split = maker.rng("qa", index).randint(0, len(others))
    pieces = list(reversed(others[split:])) + own + list(reversed(others[:split]))
    context = begin + [token for piece in pieces for token in piece]
    asked = f"Question: {question.question}"
    return maker.example("qa", index, context, len(begin), asked, "Answer:", question.answers, 24)


def _document_ids(maker: PromptMaker, title: str, text: str) -> list[int]:
    return maker.frame.ids(f"{title}\n{text.strip()}\n\n")


# ------------------------------------------------------------------------------------------------------------- reading


def read_texts(path: str | Path) -> list[str]:
    """Plain texts of a file or of all .txt files of a folder (.gz is unpacked).

    Raises:
        RedKnotError: nothing readable there.
    """
    return [_text(file) for file in _files(path, (".txt", ".md"))]


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a .json or .jsonl file, or of all of a folder (.gz is unpacked).

    Raises:
        RedKnotError: nothing there, or a record that cannot be read; names it.
    """
    found: list[Question] = []
    for file in _files(path, (".json", ".jsonl")):
        for number, record in enumerate(_records(file), 1):
            found.append(_question(record, f"{file.name}, record {number}"))
    if not found:
        raise RedKnotError(f"--data {shorten(str(path))}: no questions in there")
    return found


def _files(path: str | Path, endings: tuple[str, ...]) -> list[Path]:
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RedKnotError(f"{shorten(str(path))}: no such file or folder")
    names = sorted(f for f in path.iterdir() if f.name.removesuffix(".gz").endswith(endings))
    if not names:
        raise RedKnotError(f"{shorten(str(path))}: the folder holds no {' or '.join(endings)} file")
    return names


def _text(file: Path) -> str:
    try:
        if file.suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                data = stream.read(_LARGEST)
        else:
            data = file.read_bytes()
        return data.decode("utf-8")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise RedKnotError(f"{shorten(str(file))}: not UTF-8 text ({error})") from error


def _records(file: Path) -> Iterator[Any]:
    text = _text(file)
    try:
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
            return
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RedKnotError(f"--data {shorten(str(file))}: not JSON ({error})") from error
    if isinstance(whole, dict):
        whole = whole.get("data", [whole])
    yield from whole if isinstance(whole, list) else [whole]


def _question(record: Any, where: str) -> Question:
    try:
        asked = record["question"]
        answers = record["answers"] if "answers" in record else record.get("answer")
        if isinstance(answers, str):
            answers = [answers]
        answers = [str(answer) for answer in answers if str(answer).strip()]
        context = record["context"] if "context" in record else record["ctxs"]
        if isinstance(context, dict):  # HotpotQA in columns: titles and lists of sentences
            context = list(zip(context["title"], context["sentences"], strict=True))
        documents = []
        for item in context:
            title, body = (item.get("title", ""), item["text"]) if isinstance(item, dict) else item
            documents.append((str(title), body if isinstance(body, str) else "".join(body)))
        if not isinstance(asked, str) or not answers or not documents:
            raise ValueError("question, answer and documents must not be empty")
        return Question(asked, tuple(answers), tuple(documents))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RedKnotError(
            f"--data: {where} is no question as HotpotQA or NQ-open writes it ({type(error).__name__}: {error}); "
            'expected {"question": ..., "answer": ..., "context": {"title": [...], "sentences": [[...], ...]}}'
        ) from error
