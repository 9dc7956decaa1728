"""Context, question, greedy answer, for a batch of prompts and any cache.

A loop of its own rather than `model.generate`: the context has to be in the cache before the question is fed, and rows
of one batch have questions of different lengths, which are padded on the left between context and question.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..demo_compare import kv_bytes
from .methods import Method
from .prompts import Example

__all__ = ["Answered", "Continued", "answer", "cache_argument", "continue_text", "last_logits_only", "wait"]


@dataclass
class Answered:
    """What a method did with a batch.

    Attributes:
        texts: one answer per example.
        kv_bytes, live_bytes: of one row after the context: allocated, and of these in use.
        prefill_s, decode_s: seconds of the context's forward, and of question and answer, divided by the rows.
        tokens: generated per row, up to the last row's end.
    """

    texts: list[str]
    kv_bytes: int
    live_bytes: int
    prefill_s: float
    decode_s: float
    tokens: int


@dataclass
class Continued:
    """Log-probabilities of a text's continuation, float32 ``[rows, tokens, vocabulary]``, and the true ids."""

    log_probs: torch.Tensor
    ids: torch.Tensor
    kv_bytes: int
    live_bytes: int
    prefill_s: float
    decode_s: float


class _Session:
    """One batch in one cache: feeds tokens and keeps account of padding and positions."""

    def __init__(self, model: Any, cache: Any, rows: int):
        self.model, self.cache, self.rows = model, cache, rows
        self.device = next(model.parameters()).device
        self.argument, self.few = cache_argument(model), last_logits_only(model)
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        self.padded = False

    def feed(self, ids: torch.Tensor, real: torch.Tensor | None = None, last: bool = True) -> torch.Tensor:
        """Logits of the last token ``[rows, vocabulary]``, or of all."""
        if real is not None and not bool(real.all()):
            self.padded = True
        fresh = torch.ones_like(ids) if real is None else real
        before = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, fresh], 1)
        extra: dict[str, Any] = {"attention_mask": self.mask} if self.padded else {}
        position = (before + fresh.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            ids,
            position_ids=position,
            use_cache=True,
            **{self.argument: self.cache},
            **extra,
            **(self.few if last else {}),
        )
        return out.logits[:, -1] if last else out.logits


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, examples: Sequence[Example], method: Method) -> Answered:
    """Greedy answers to a batch of examples with contexts of one length."""
    session = _Session(model, method.make_cache(), len(examples))
    device, rows = session.device, len(examples)
    start = wait(device)
    allocated = live = 0
    questions = [list(example.question) for example in examples]
    if method.blind:
        questions = [[*example.context[: example.opening], *example.question] for example in examples]
    else:
        session.feed(torch.tensor([example.context for example in examples], device=device))
        allocated, live = kv_bytes(session.cache)
    middle = wait(device)
    longest = max(map(len, questions))
    ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
    real = torch.zeros(rows, longest, dtype=torch.long, device=device)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = torch.tensor(question, device=device)
        real[row, longest - len(question) :] = 1
    logits = session.feed(ids, real)
    ends = _end_ids(model)
    stop = torch.tensor(sorted(ends) or [-1], device=device)
    limits = torch.tensor([example.max_new_tokens for example in examples], device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    steps: list[torch.Tensor] = []
    for count in range(1, int(limits.max()) + 1):
        token = logits.argmax(-1)
        steps.append(token)
        done |= torch.isin(token, stop) | (limits <= count)
        if bool(done.all()):
            break
        logits = session.feed(token[:, None])
    end = wait(device)
    made = torch.stack(steps, 1).tolist()
    texts = []
    for row, example in zip(made, examples, strict=True):
        row = row[: example.max_new_tokens]
        cut = next((at for at, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:cut], skip_special_tokens=True))
    return Answered(texts, allocated // rows, live // rows, (middle - start) / rows, (end - middle) / rows, len(steps))


@torch.inference_mode()
def continue_text(model: Any, examples: Sequence[Example], method: Method) -> Continued:
    """Log-probabilities of the known continuation of a batch of texts of one length."""
    session = _Session(model, method.make_cache(), len(examples))
    device, rows = session.device, len(examples)
    ids = torch.tensor([example.question for example in examples], device=device)
    start = wait(device)
    allocated = live = 0
    if method.blind:  # the continuation alone: its first token is not predicted by anything
        logits = session.feed(ids, last=False)
        first = torch.zeros_like(logits[:, :1])
    else:
        first = session.feed(torch.tensor([example.context for example in examples], device=device))[:, None]
        allocated, live = kv_bytes(session.cache)
    middle = wait(device)
    if not method.blind:
        logits = session.feed(ids, last=False)
    log_probs = torch.cat([first, logits[:, :-1]], 1).float().log_softmax(-1)
    end = wait(device)
    return Continued(log_probs, ids, allocated // rows, live // rows, (middle - start) / rows, (end - middle) / rows)


def cache_argument(model: Any) -> str:
    """transformers 5.24 renamed the argument; the old name works there too, but warns in the middle of a table."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def last_logits_only(model: Any) -> dict[str, int]:
    """Logits of all tokens of a context would be larger than the cache that is measured."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def wait(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _end_ids(model: Any) -> set[int]:
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            found |= set(ids) if isinstance(ids, (list, tuple)) else {int(ids)}
    return found
