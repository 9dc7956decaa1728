"""What schedules cost in quality, several prompts of one length at a time.

A context is prefilled under a schedule; what follows is fed densely and compared with the dense model. Text: 128 tokens of
continuation, no part of the prefill, so that they have no say in the importance. Needles: the question ends the prefill
(its rows are the query), the answer follows; accuracy is exact match of the greedy answer.

Prompts of one batch have prefills and suffixes of equal length: there is no padding. Layers before the first sparse one
run once per batch and are replayed.
"""

from __future__ import annotations

import contextlib
import gzip
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import DynamicCache

from redknot_hf.heads.profiler.tasks import Sample, make_needles, make_texts
from redknot_hf.heads.profiler.texts import TokenStream
from redknot_hf.sparse_ffn import SparseFFN, SparseFFNSchedule
from redknot_hf.sparse_ffn.structure import find_blocks

__all__ = ["CONTINUATION", "Prefilled", "Replay", "in_batches", "prompts", "read_texts"]

KINDS = ("passkey", "number", "lookup")
CONTINUATION = 128


class Replay:
    """Runs the layers from `first` on; those before hand out what they gave in the dense run.

    Args:
        first: no schedule touches a layer before it.
    """

    def __init__(self, model: Any, first: int):
        self.model, self.first = model, first
        self.layers = [block.layer for block in find_blocks(model)]

    @contextlib.contextmanager
    def recording(self, outputs: dict[int, Any]) -> Iterator[None]:
        """Inside, the last two layers before `first` put what they give into ``outputs``."""
        hooks = []
        for index in range(max(0, self.first - 2), self.first):

            def keep(module: Any, args: Any, output: Any, index: int = index) -> None:
                outputs[index] = output

            hooks.append(self.layers[index].register_forward_hook(keep))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def replaying(self, outputs: dict[int, Any]) -> Iterator[None]:
        """Inside, layers before `first` do not run and store nothing."""
        for index in range(self.first):

            def forward(hidden_states: Any, *args: Any, index: int = index, **kwargs: Any) -> Any:
                return outputs.get(index, hidden_states)

            self.layers[index].forward = forward
        try:
            yield
        finally:
            for layer in self.layers[: self.first]:
                del layer.forward


class Prefilled:
    """Prompts, prefilled densely, and what the dense model says about what follows.

    Args:
        samples: with prefills and suffixes of equal length; texts or needles, not both.
    """

    @torch.no_grad()
    def __init__(self, replay: Replay, samples: list[Sample], device: Any):
        self.replay, self.model = replay, replay.model
        self.needle = samples[0].kind != "text"
        # the question belongs to the prefill, its last token to what follows, because its logits are the first answer's
        self.split = samples[0].answer_start - 1 if self.needle else 0
        self.prompt = torch.tensor([s.context + s.suffix[: self.split] for s in samples], device=device)
        self.suffix = torch.tensor([s.suffix[self.split :] for s in samples], device=device)
        self._outputs: dict[int, Any] = {}
        self._dense = DynamicCache(config=self.model.config)
        with replay.recording(self._outputs):
            self.model.get_decoder()(self.prompt, past_key_values=self._dense)
        self._stored = [(layer.keys, layer.values) for layer in self._dense.layers[: replay.first]]
        self.reference = self._follow(self._dense)
        self._dense = None  # type: ignore[assignment]  # what `_stored` does not hold may go

    def _follow(self, cache: DynamicCache) -> torch.Tensor:
        """Log-probabilities, fp32 ``[batch, rows, vocabulary]``, of the suffix fed after what the cache holds."""
        found = log_softmax(self.model(self.suffix, past_key_values=cache).logits.float(), -1)
        return found[:, :-1] if self.needle else found

    def dense(self) -> list[dict[str, float]]:
        """One result per prompt of the dense model itself."""
        return self._compare(self.reference, 1.0)

    @torch.no_grad()
    def run(self, schedule: SparseFFNSchedule) -> list[dict[str, float]]:
        """One result per prompt: kl (nats per token), agree (share of rows with the same first token), rows (share of
        FFN rows run), and of needles match."""
        context = SparseFFN(self.model, schedule, query_tokens=self.split)
        first = min((layer for layer, rule in enumerate(context.rules) if rule is not None), default=self.replay.first)
        cache = DynamicCache(config=self.model.config)
        skips = first >= self.replay.first
        with context, self.replay.replaying(self._outputs) if skips else contextlib.nullcontext():
            self.model.get_decoder()(self.prompt, past_key_values=cache)
        if skips:  # after the forward: until then the cache counts as empty
            for layer, (keys, values) in enumerate(self._stored):
                cache.update(keys, values, layer)
        total = len(self.replay.layers) * self.prompt.numel()
        skipped = sum(s - r for s, r in zip(context.stats.seen, context.stats.run, strict=True))
        return self._compare(self._follow(cache), 1 - skipped / total)

    def _compare(self, found: torch.Tensor, rows: float) -> list[dict[str, float]]:
        kl = kl_div(found, self.reference, reduction="none", log_target=True).sum(-1).mean(1)
        best = found.argmax(-1)
        parts = {"kl": kl, "agree": (best == self.reference.argmax(-1)).float().mean(1)}
        if self.needle:
            parts["match"] = (best == self.suffix[:, 1:]).all(1).float()
        table = {name: values.tolist() for name, values in parts.items()}
        return [
            {**{name: values[i] for name, values in table.items()}, "rows": rows} for i in range(self.prompt.shape[0])
        ]


def in_batches(samples: list[Sample], tokens: int) -> list[list[int]]:
    """Indices of samples that go together: equal lengths, in order, at most ``tokens`` tokens in one batch."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.kind == "text", len(sample.context), len(sample.suffix), sample.answer_start].append(index)
    found = []
    for (_, length, *_), group in groups.items():
        size = max(1, tokens // length)
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return found


def read_texts(folder: Path) -> list[str]:
    """WikiText-2's test and validation sets and 87 Wikipedia articles, in pieces, shuffled."""
    texts = []
    with tarfile.open(folder / "text" / "wikipedia_87_articles.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.isfile():
                texts.append(archive.extractfile(member).read().decode("utf-8", errors="replace"))  # type: ignore[union-attr]
    for part in ("test", "valid"):
        with gzip.open(folder / "text" / f"wikitext-2-{part}.txt.gz", "rt", encoding="utf-8") as file:
            wiki = file.read()
        texts += [wiki[i : i + 20_000] for i in range(0, len(wiki), 20_000)]
    random.Random(0).shuffle(texts)
    return texts


def prompts(tokenizer: Any, texts: list[str], role: str, kind: str, n: int, context: int) -> list[Sample]:
    """n texts or needles. The texts of role "fit" are others than those of any other role, needles' too."""
    cut = len(texts) // 3
    part = texts[:cut] if role == "fit" else texts[cut:]
    middle = len(part) * 2 // 3
    stream = TokenStream(tokenizer, part[:middle] if kind == "text" else part[middle:], f"{role}-{kind}-{context}")
    if kind == "text":
        return make_texts(tokenizer, stream, n, context, CONTINUATION)
    return make_needles(tokenizer, stream, n, context, f"{role}-{context}", KINDS)
