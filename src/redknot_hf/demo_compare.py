"""One document, some questions, several caches: the measurement behind `redknot demo`.

Every contender reads the document once and answers each question from a copy of its cache, through `model.generate`.
The document is always read before the question is known: a cache that evicts has to decide without it.

Numbers are single runs on whatever else the machine is doing: good for a demonstration, not for a benchmark. This
module knows nothing about printing beyond a callback that receives text as it is generated.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .errors import RedKnotError

__all__ = ["Answer", "Contender", "Prompt", "Question", "Result", "build_prompt", "kv_bytes", "run_contender"]


@dataclass(frozen=True)
class Question:
    """A question, the words its answer is made to begin with, and what a right answer contains (None: not known)."""

    text: str
    answer_prefix: str = ""
    expected: str | None = None


@dataclass(frozen=True)
class Contender:
    """A cache to compare: its name, how to make an empty one, and the attention implementation it runs with."""

    name: str
    make_cache: Callable[[], Any]
    attn_implementation: str


@dataclass(frozen=True)
class Prompt:
    """Token ids of a document, `[1, document tokens]`, and of what follows it for each question, `[1, tokens]`."""

    document: torch.Tensor
    questions: tuple[torch.Tensor, ...]

    @property
    def longest(self) -> int:
        """Tokens of the document and the longest question."""
        return self.document.shape[1] + max(ids.shape[1] for ids in self.questions)


@dataclass
class Answer:
    """One answer and its times in seconds: question to first token, and first to last token."""

    question: str
    text: str
    expected: str | None
    tokens: int
    first_token_s: float
    decode_s: float

    @property
    def correct(self) -> bool | None:
        # Texts from the web hold no-break spaces; split() knows them.
        return None if self.expected is None else self.expected.lower() in " ".join(self.text.lower().split())


@dataclass
class Result:
    """What one contender did.

    Attributes:
        kv_bytes: memory that the cache's keys, values and tables occupy after the document (see `kv_bytes`).
        kv_live_bytes: of these, what holds tokens; the rest is room to grow.
        read_s: seconds of the forward over the document.
        first_token_s: seconds from an empty cache to the first answer's first token: document plus first question.
        decode_tokens_per_s: over all answers, without their first tokens; None if no answer has two.
    """

    name: str
    kv_bytes: int
    kv_live_bytes: int
    read_s: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        return self.read_s + self.answers[0].first_token_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        seconds = sum(answer.decode_s for answer in self.answers)
        return sum(answer.tokens - 1 for answer in self.answers) / seconds if seconds else None


def build_prompt(tokenizer: Any, document: str, questions: Sequence[Question]) -> Prompt:
    """Token ids of the document behind the chat template's opening, and of each question with its answer's beginning.

    The two parts are tokenized apart, so that the document's tokens do not depend on the question. Tokenizers without a
    chat template get plain text.

    Raises:
        RedKnotError: the chat template does not keep a message's text in one piece.
    """
    # A word that no template and no document contains, to find where the message goes.
    marker = "\u2042REDKNOT\u2042"
    if tokenizer.chat_template:
        frame = tokenizer.apply_chat_template(
            [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
        )
        if frame.count(marker) != 1:
            raise RedKnotError(
                "the tokenizer's chat template changes the text of a message; pass a model with another one"
            )
        opening, closing = frame.split(marker)
    else:
        opening, closing = tokenizer.bos_token or "", "\nAnswer: "

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids

    return Prompt(
        ids(f"{opening}Read this article and answer the question.\n\n{document.strip()}\n\n"),
        tuple(ids(f"Question: {question.text}{closing}{question.answer_prefix}") for question in questions),
    )


def kv_bytes(cache: Any) -> tuple[int, int]:
    """(allocated, live) bytes of a cache on its device.

    A cache that reports its own memory is asked: `memory_report()` reads its allocator. For transformers' caches both
    figures are the bytes of the key and value tensors.
    """
    if hasattr(cache, "memory_report"):
        report = cache.memory_report()
        return report.allocated, report.live
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    total = sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))
    return total, total


def run_contender(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    questions: Sequence[Question],
    contender: Contender,
    *,
    max_new_tokens: int,
    on_layer: Callable[[], None] = lambda: None,
    on_question: Callable[[Question], None] = lambda question: None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Result:
    """Let one cache read the document and answer the questions, greedily.

    Args:
        model: a causal language model; its attention implementation is switched to the contender's.
        tokenizer: the model's.
        prompt: from `build_prompt`.
        questions: the same as given to `build_prompt`.
        contender: what to run.
        max_new_tokens: most tokens of an answer, at least 1.
        on_layer: called after every decoder layer while the document is read, for a progress bar.
        on_question: called before each question.
        on_text: called with each new piece of an answer's text as it is generated.
    """
    model.set_attn_implementation(contender.attn_implementation)
    document = prompt.document.to(model.device)
    argument = _cache_argument(model)
    with torch.inference_mode():
        # Untimed: first calls pay for threads, workspaces and compiled kernels, whichever cache happens to come first.
        warm_up = document[:, :64]
        model(warm_up, **{argument: contender.make_cache()}, **_last_logits_only(model))

        cache = contender.make_cache()
        with _after_each_layer(model, on_layer):
            start = _now(model.device)
            model(document, **{argument: cache}, **_last_logits_only(model))
            result = Result(contender.name, *kv_bytes(cache), read_s=_now(model.device) - start)

        for question, ids in zip(questions, prompt.questions, strict=True):
            on_question(question)
            tokens = torch.cat([document, ids.to(model.device)], dim=1)
            clock = _Clock(tokenizer, on_text)
            copied = copy.deepcopy(cache)
            start = _now(model.device)
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                **{argument: copied},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=clock,
                pad_token_id=_first(model.generation_config.eos_token_id),
            )
            new = output[0, tokens.shape[1] :]
            text = question.answer_prefix + tokenizer.decode(new, skip_special_tokens=True)
            result.answers.append(
                Answer(
                    question.text,
                    text.strip(),
                    question.expected,
                    len(new),
                    clock.times[0] - start,
                    clock.times[-1] - clock.times[0],
                )
            )
    return result


class _Clock(BaseStreamer):
    """Notes when each token arrives and passes on the text that it adds."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.times: list[float] = []
        self._tokens: list[int] = []
        self._shown = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate() hands over the prompt first
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())  # the value is on the host: the device has finished it
        self._tokens.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A character may be spread over several tokens; until it is whole the text ends in a replacement character.
        if text.startswith(self._shown) and not text.endswith("\ufffd"):
            self.on_text(text[len(self._shown) :])
            self._shown = text

    def end(self) -> None:
        pass


@contextlib.contextmanager
def _after_each_layer(model: Any, callback: Callable[[], None]) -> Iterator[None]:
    layers = getattr(model.get_decoder(), "layers", ())
    handles = [layer.register_forward_hook(lambda *_: callback()) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_logits_only(model: Any) -> dict[str, int]:
    """Logits of all document tokens would be larger than the cache that is measured."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _cache_argument(model: Any) -> str:
    """transformers 5.24 renamed the argument; the old name works there too, but warns in the middle of the text."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _first(token_ids: int | list[int] | None) -> int | None:
    return token_ids[0] if isinstance(token_ids, list) else token_ids
