"""Runs tasks x context lengths x methods, one row per prompt, and can be interrupted.

Rows go to a .jsonl file as they are made; its first line says what was measured. Started again with the same settings, a
run makes only the rows that are missing. This module prints nothing; `report` makes tables of rows.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import PoolExhausted, RedKnotError, shorten
from ..heads import HeadProfile
from ..heads.model_shape import text_config
from .documents import Question
from .generate import answer, continue_text
from .methods import DEFAULT_METHODS, Method, build_methods
from .prompts import Example, PromptMaker
from .scoring import token_f1
from .tasks import DEFAULT_TASKS, TASKS, make_examples, task

__all__ = ["Evaluation", "evaluate", "read_rows"]

FORMAT = 1


@dataclass
class Evaluation:
    """What is to be measured.

    Attributes:
        tasks: names in `TASKS`.
        contexts: lengths in tokens.
        n: prompts per task and length.
        methods: names in `METHODS`.
        random_maps: draws of the method "random".
        prefill: of every cache but the full one: "windowed" or "full".
        page_size: tokens per page.
        seed: of prompts and random maps.
        chat: use the tokenizer's chat template.
        batch_tokens: context tokens per batch; 0 for one prompt at a time. A batch that does not fit into the memory of
            the device is made in halves.
        texts: haystack and perplexity texts; None for made-up prose.
        questions: of the task "qa".
    """

    tasks: Sequence[str] = DEFAULT_TASKS
    contexts: Sequence[int] = (1024, 2048)
    n: int = 20
    methods: Sequence[str] = DEFAULT_METHODS
    random_maps: int = 3
    prefill: str = "windowed"
    page_size: int = 64
    seed: int = 0
    chat: bool = True
    batch_tokens: int = 0
    texts: Sequence[str] | None = None
    questions: Sequence[Question] = field(default_factory=list)

    def check(self) -> None:
        """Raises `RedKnotError` where a setting is out of range."""
        for name in self.tasks:
            task(name)
        if not self.tasks or not self.contexts or not self.methods:
            raise RedKnotError("tasks, contexts and methods must each name at least one")
        if self.n < 1:
            raise RedKnotError(f"--n {self.n}: expected at least 1 prompt")
        if min(self.contexts) < 64:
            raise RedKnotError(f"--contexts: {min(self.contexts)} tokens are too few; expected 64 or more")
        if self.prefill not in ("windowed", "full"):
            raise RedKnotError(f"--prefill {shorten(self.prefill)}: expected 'windowed' or 'full'")
        if "qa" in self.tasks and not self.questions:
            raise RedKnotError("task qa needs --data: a file or folder of questions with their documents")


def evaluate(
    model: Any,
    tokenizer: Any,
    profile: HeadProfile,
    evaluation: Evaluation,
    rows_path: str | Path,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> list[dict[str, Any]]:
    """Make the rows that are missing in ``rows_path``.

    Args:
        model: a causal decoder with attn_implementation "redknot".
        tokenizer: the model's.
        profile: the head profile called "ours".
        evaluation: what to measure.
        rows_path: .jsonl file; made if absent.
        progress: called with a line of text, prompts done and prompts in all.

    Returns:
        All rows of the settings, as dictionaries: task, context, method, index, score (ppl: the mean negative
        log-likelihood in nats; kl and top1 beside it), answer, kv_bytes, live_bytes, prefill_s, decode_s, tokens.

    Raises:
        RedKnotError: settings out of range, a context longer than the model's, or the file holds other settings.
    """
    evaluation.check()
    _check_length(model, max(evaluation.contexts))
    profile.validate_for(model.config)
    rows_path = Path(rows_path)
    head = _header(model, profile, evaluation)
    rows = _resume(rows_path, head)
    have = {(row["task"], row["context"], row["method"], row["index"]) for row in rows}
    done = 0
    with rows_path.open("a", encoding="utf-8") as file:
        for tokens in evaluation.contexts:
            methods = build_methods(
                model.config, profile, tokens, evaluation.methods, random_maps=evaluation.random_maps,
                prefill=evaluation.prefill, page_size=evaluation.page_size, seed=evaluation.seed,
            )  # fmt: skip
            maker = PromptMaker(tokenizer, tokens, evaluation.seed, evaluation.texts, evaluation.chat)
            total = len(evaluation.tasks) * len(evaluation.contexts) * len(methods) * evaluation.n
            for name in evaluation.tasks:
                examples = make_examples(name, maker, evaluation.n, evaluation.questions)
                size = max(1, evaluation.batch_tokens // tokens)
                for begin in range(0, len(examples), size):
                    group = examples[begin : begin + size]
                    missing = [m for m in methods if any((name, tokens, m.name, e.index) not in have for e in group)]
                    progress(f"{name} at {tokens} tokens", done, total)
                    for row in _rows(model, tokenizer, name, group, methods, missing):
                        if (name, tokens, row["method"], row["index"]) in have:
                            continue  # an interruption in the middle of a batch
                        row = {"task": name, "context": tokens, **row}
                        rows.append(row)
                        file.write(json.dumps(row) + "\n")
                    file.flush()
                    done += len(group) * len(methods)
        progress("done", done, done)
    return rows


def read_rows(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a .jsonl file; a last line that was cut off by an interruption is left out.

    Raises:
        RedKnotError: not a file that `evaluate` wrote.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    try:
        head = json.loads(lines[0])
        if head.get("format") != FORMAT:
            raise ValueError
    except (ValueError, IndexError, AttributeError):
        raise RedKnotError(f"{shorten(str(path))} is no file of rows of this release; choose another --out") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise RedKnotError(f"{shorten(str(path))}: line {number} is damaged; choose another --out") from None
    return head, rows


def _rows(
    model: Any,
    tokenizer: Any,
    name: str,
    group: Sequence[Example],
    methods: Sequence[Method],
    missing: Sequence[Method],
) -> Iterable[dict[str, Any]]:
    if not missing:
        return
    if TASKS[name].score is None:
        yield from _in_parts(group, lambda part: list(_text_rows(model, part, methods, missing)))
        return
    score = TASKS[name].score
    assert score is not None
    for method in missing:
        yield from _in_parts(group, lambda part: _answer_rows(model, tokenizer, name, part, method, score))  # noqa: B023


def _in_parts(
    group: Sequence[Example], make: Callable[[Sequence[Example]], list[dict[str, Any]]]
) -> Iterable[dict[str, Any]]:
    """Rows of the whole group, made in halves (and these in halves) where the device has no memory for all at once."""
    parts = [group]
    while parts:
        part = parts.pop(0)
        rows: list[dict[str, Any]] = []
        try:
            rows = make(part)
        except (torch.OutOfMemoryError, PoolExhausted):
            if len(part) == 1:
                raise
            parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
        if not rows and torch.cuda.is_available():
            torch.cuda.empty_cache()  # only here: the exception no longer holds on to the batch's tensors
        yield from rows


def _answer_rows(
    model: Any,
    tokenizer: Any,
    name: str,
    group: Sequence[Example],
    method: Method,
    score: Callable[[str, Sequence[str]], float],
) -> list[dict[str, Any]]:
    found = answer(model, tokenizer, group, method)
    rows = []
    for example, text in zip(group, found.texts, strict=True):
        row: dict[str, Any] = {
            "method": method.name,
            "index": example.index,
            "score": score(text, example.references),
        }
        if name == "qa":
            row["f1"] = token_f1(text, example.references)
        rows.append(
            {
                **row,
                "answer": text[:300],
                "references": list(example.references),
                "kv_bytes": found.kv_bytes,
                "live_bytes": found.live_bytes,
                "prefill_s": round(found.prefill_s, 6),
                "decode_s": round(found.decode_s, 6),
                "tokens": found.tokens,
            }
        )
    return rows


def _text_rows(
    model: Any, group: Sequence[Example], methods: Sequence[Method], missing: Sequence[Method]
) -> Iterable[dict[str, Any]]:
    """Perplexity, and the distance from the full cache where that is among the methods."""
    full = next((method for method in methods if method.name == "full"), None)
    reference = None if full is None else continue_text(model, group, full)
    for method in missing:
        found = reference if method is full and reference is not None else continue_text(model, group, method)
        nll = -found.log_probs.gather(2, found.ids[..., None])[..., 0]
        if method.blind:
            nll = nll[:, 1:]  # nothing comes before the first token
        for row, example in enumerate(group):
            extra: dict[str, Any] = {}
            if reference is not None and not method.blind:
                p, q = reference.log_probs[row], found.log_probs[row]
                extra["kl"] = float((p.exp() * (p - q)).sum(-1).mean())
                extra["top1"] = float((p.argmax(-1) == q.argmax(-1)).float().mean())
            yield {
                "method": method.name,
                "index": example.index,
                "score": float(nll[row].mean()),
                **extra,
                "kv_bytes": found.kv_bytes,
                "live_bytes": found.live_bytes,
                "prefill_s": round(found.prefill_s, 6),
                "decode_s": round(found.decode_s, 6),
                "tokens": len(example.question),
            }


def _check_length(model: Any, tokens: int) -> None:
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    if limit and tokens + 256 > limit:
        raise RedKnotError(
            f"--contexts: {tokens} tokens and an answer do not fit into the model's {limit} positions; use at most "
            f"{limit - 256}"
        )


def _header(model: Any, profile: HeadProfile, evaluation: Evaluation) -> dict[str, Any]:
    """First line of a file of rows. Settings that only choose *which* rows are made are not compared."""
    import transformers

    from .. import __version__

    settings = {k: v for k, v in asdict(evaluation).items() if k not in ("texts", "questions")}
    settings["texts"] = None if evaluation.texts is None else _digest("\0".join(evaluation.texts))
    settings["questions"] = _digest(repr(evaluation.questions)) if evaluation.questions else None
    cells = [profile.head_class, profile.sink, profile.window]
    parameter = next(model.parameters())
    device = parameter.device
    return {
        "format": FORMAT,
        "model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__).rstrip("/").rsplit("/", 1)[-1],
        "profile": _digest(json.dumps(cells)),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "settings": settings,
        "versions": {
            "redknot_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


_FREE = ("tasks", "contexts", "n", "methods", "random_maps", "batch_tokens")


def _resume(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that are there already; writes the header of a new file."""
    if not path.exists() or not path.read_bytes().strip():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return []
    old, rows = read_rows(path)
    for what in ("model", "profile", "dtype"):
        if old[what] != head[what]:
            raise RedKnotError(f"{shorten(str(path))} was made with another {what} ({old[what]}): choose another --out")
    for what, value in head["settings"].items():
        before = old["settings"].get(what)
        if what not in _FREE and before != value:
            raise RedKnotError(
                f"{shorten(str(path))} was made with {what}={shorten(before)}, now it is {shorten(value)}: choose another "
                "--out"
            )
    # Rewritten: a line that was cut off must not stay in the middle of the file.
    path.write_text("".join(json.dumps(item) + "\n" for item in [head, *rows]), encoding="utf-8")
    return rows


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
