"""The measuring half of profiling: prompts, one scored pass over them, gates. Resumable after every unit of work."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...paging.varying_sdpa import without_cudnn
from .checkpoint import Checkpoint
from .curvature import score_batch
from .gates import optimise_gates
from .intercept import DecoderLayout
from .scores import HeadScores
from .tasks import NEEDLE_KINDS, Sample, collate, make_needles, make_texts
from .texts import TokenStream, python_topics
from .validation import Prompts, full_reference

__all__ = ["Measured", "Workload", "build_prompts", "fingerprint", "frozen", "measure_heads", "workload"]

_GATE_STEPS_PER_SAVE = 8


@dataclass(frozen=True)
class Workload:
    """How much is measured.

    Attributes:
        needles, texts: prompts of the scored pass and of the gates.
        held_needles, held_texts: prompts of the validation.
        together: retrieval prompts that share a context.
        rows: tokens of a text's suffix.
        text_sketches, needle_sketches: random backward passes per batch of the scored pass.
        gate_steps: of Adam.
        batch: contexts per forward pass.
        search_needles, search_texts: prompts on which maps are compared; 0 takes those of the scored pass, which need no
            new prefill.
        search_rows: tokens of a text's suffix on which maps are compared.
        rounds, lengths, singles, search_sketches: of the search (`refine.Search`, `local_model.linearise`).
        deployed: measure the last few maps in the mode of the deployment, which may need a prefill for each.
        finalists, deployed_rounds: of the search, then (`refine.search_on`).
        kinds: of the retrieval prompts.
    """

    needles: int
    texts: int
    held_needles: int
    held_texts: int
    together: int
    rows: int
    text_sketches: int
    needle_sketches: int
    gate_steps: int
    batch: int
    search_needles: int
    search_texts: int
    search_rows: int
    rounds: int
    lengths: tuple[int, ...]
    singles: int
    search_sketches: int
    deployed: bool
    finalists: int
    deployed_rounds: int
    kinds: tuple[str, ...]


_LARGE = 10**9
"""Parameters from which a GPU measures less: an 8B model runs 60 times slower than the smallest one."""


def workload(device: torch.device, context: int, samples: int | None, parameters: int = 0) -> Workload:
    """What a device can do in the time a default call may take: minutes on two cores, under one on a GPU.

    Args:
        device: of the model.
        context: tokens per context.
        samples: retrieval prompts; None for the device's default. Everything else scales with it.
        parameters: of the model.
    """
    if device.type == "cpu":
        n = 9 if samples is None else samples
        return Workload(
            needles=n, texts=max(1, n // 3), held_needles=n, held_texts=max(1, n // 4), together=3, rows=64,
            text_sketches=8, needle_sketches=4, gate_steps=32, batch=1,
            search_needles=0, search_texts=0, search_rows=64, rounds=2, lengths=(2, 6, 16), singles=2, search_sketches=1,
            deployed=False, finalists=1, deployed_rounds=0, kinds=NEEDLE_KINDS,
        )  # fmt: skip
    large = parameters >= _LARGE
    n = (24 if large else 40) if samples is None else samples
    half = max(1, n * 3 // 5)
    return Workload(
        needles=n, texts=half, held_needles=n, held_texts=half, together=1,
        rows=64 if large else 128,
        text_sketches=8 if large else 16, needle_sketches=4 if large else 8, gate_steps=16 if large else 80,
        batch=max(1, min(24, 49_152 // context)),
        search_needles=0 if large else 2 * n, search_texts=0 if large else 2 * half, search_rows=64 if large else 128,
        rounds=2 if large else 4, lengths=(1, 2, 4, 8, 16) if large else (1, 2, 3, 4, 6, 8, 12, 16, 24),
        singles=6 if large else 12, search_sketches=2 if large else 4, deployed=True, finalists=2 if large else 4,
        deployed_rounds=0 if large else 2, kinds=NEEDLE_KINDS,
    )  # fmt: skip


@dataclass
class Measured:
    """What the selection works from.

    Attributes:
        scores: sums per head.
        text_rows, needle_rows: rows of the quadratic model, `[rows, layers, heads, windows]`.
        gates: `[layers, heads]` or None.
        prompts: of the scored pass, with their full-attention answers.
    """

    scores: HeadScores
    text_rows: Tensor
    needle_rows: Tensor
    gates: Tensor | None
    prompts: list[Prompts]


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients of parameters inside the block; both restored afterwards.

    cuDNN's attention is off inside: it compiles a plan for every new shape, and a profile meets dozens of shapes once.
    """
    training = model.training
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with without_cudnn():
            yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


def build_prompts(
    tokenizer: Any,
    texts: Sequence[str] | None,
    part: str,
    needles: int,
    plain: int,
    context: int,
    rows: int,
    seed: int,
    together: int = 1,
    kinds: Sequence[str] = NEEDLE_KINDS,
) -> tuple[list[Sample], list[Sample]]:
    """Retrieval prompts and texts of one part of the data.

    Args:
        tokenizer: of the model.
        texts: the user's, None for made-up prose. Even pieces serve the profile, odd ones the validation.
        part: "profile", "selection" or "validation"; what a validation sees, the others do not.
        needles, plain: prompts of each kind.
        context: tokens per context.
        rows: tokens of a text's suffix.
        seed: of everything.
        together: retrieval prompts that share a context.
        kinds: of the retrieval prompts.
    """
    if texts is not None:
        size = 4000
        pieces = [text[i : i + size] for text in texts for i in range(0, len(text), size)]
        random.Random(f"pieces-{seed}").shuffle(pieces)
        texts = pieces[part == "validation" :: 2] or pieces
    stream = TokenStream(tokenizer, texts, f"{part}-{seed}", python_topics()[part == "validation" :: 2])
    samples = make_needles(tokenizer, stream, needles, context, f"{part}-{seed}", kinds, together)
    return samples, make_texts(tokenizer, stream, plain, context, rows)


def fingerprint(model: Any, samples: Sequence[Sample], arguments: dict[str, Any]) -> str:
    """Hash of all that fixes the numbers: some weights of every parameter, all prompts, all arguments."""
    digest = hashlib.sha256(repr(sorted(arguments.items())).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    for sample in samples:
        digest.update(repr((sample.context, sample.suffix, sample.answer_start)).encode())
    return digest.hexdigest()


def batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Consecutive groups of at most `size` contexts; samples that share one stay together."""
    groups: list[list[Sample]] = []
    contexts = size
    for sample in samples:
        if not groups or sample.context is not groups[-1][-1].context:
            contexts += 1
        if contexts > size:
            groups.append([])
            contexts = 1
        groups[-1].append(sample)
    return groups


def measure_heads(
    model: Any,
    layout: DecoderLayout,
    needles: Sequence[Sample],
    texts: Sequence[Sample],
    load: Workload,
    *,
    sink: int,
    windows: Sequence[int],
    gate_window: int,
    gate_steps: int,
    gate_weight: float,
    seed: int,
    checkpoint: Checkpoint,
    progress: Any,
) -> Measured:
    """Score all prompts, then optimise the gates on them.

    Args:
        model: the decoder, inside `frozen`.
        layout: of the model.
        needles, texts: prompts.
        load: batch size and sketches.
        sink, windows, gate_window: tokens.
        gate_steps: of Adam; 0 for none.
        gate_weight: of the KL against the mean gate.
        seed: of the sketches.
        checkpoint: state to go on from and to save to.
        progress: has `update(n)` and `set_description(text)`.
    """
    device = next(model.parameters()).device
    scores = HeadScores(layout.num_layers, layout.num_kv_heads, tuple(windows), sink)
    for key in scores.sums:
        if f"sums.{key}" in checkpoint.tensors:
            scores.sums[key] = checkpoint.tensors[f"sums.{key}"].clone()
    rows: dict[str, list[Tensor]] = {"text": [], "needle": []}
    for kind in rows:
        if f"rows.{kind}" in checkpoint.tensors:
            rows[kind].append(checkpoint.tensors[f"rows.{kind}"])
    done = int(checkpoint.note.get("scored", 0))
    gates_done = int(checkpoint.note.get("gate_steps", 0))
    # Texts and needles alternate: the gates see both kinds from the first steps on.
    grouped = _alternate(batches(needles, load.batch), batches(texts, load.batch))
    sketches = {"text": load.text_sketches, "needle": load.needle_sketches}
    prompts: list[Prompts] = []
    for i, group in enumerate(grouped):
        kind = "text" if group[0].kind == "text" else "needle"
        progress.set_description("scoring heads")
        prompt = full_reference(model, collate(group, device))
        prompts.append(prompt)
        if i < done:
            progress.update(1 + sketches[kind])
            continue
        fresh = score_batch(
            model, prompt.cache, prompt.batch, scores, sketches=sketches[kind], seed=seed * 100_003 + i,
            windows=windows, sink=sink, step=lambda: progress.update(1),
        )  # fmt: skip
        rows[kind].append(fresh)
        checkpoint.tensors.update({f"sums.{key}": value for key, value in scores.sums.items()})
        checkpoint.tensors.update({f"rows.{key}": torch.cat(value) for key, value in rows.items() if value})
        checkpoint.note["scored"] = i + 1
        checkpoint.save()

    gates = None
    if gate_steps:
        progress.set_description("optimising gates")
        start: dict[str, Any] | None = None
        if gates_done:
            state_of = {key: checkpoint.tensors[f"gate.{key}"] for key in ("gates", "exp_avg", "exp_avg_sq")}
            start = {**state_of, "steps": gates_done}
            progress.update(gates_done)

        def after_step(state: dict[str, Any]) -> None:
            progress.update(1)
            if state["steps"] % _GATE_STEPS_PER_SAVE == 0 or state["steps"] == gate_steps:
                checkpoint.tensors.update({f"gate.{key}": state[key] for key in ("gates", "exp_avg", "exp_avg_sq")})
                checkpoint.note["gate_steps"] = state["steps"]
                checkpoint.save()

        if gates_done >= gate_steps:
            gates = checkpoint.tensors["gate.gates"].float()
        else:
            triples = [(prompt.cache, prompt.batch, prompt.log_probs) for prompt in prompts]
            gates = optimise_gates(
                model, triples, (layout.num_layers, layout.num_kv_heads), sink=sink, window=gate_window,
                steps=gate_steps, weight=gate_weight, start=start, step=after_step,
            )  # fmt: skip
    empty = torch.zeros(0, layout.num_layers, layout.num_kv_heads, len(windows))
    return Measured(scores, torch.cat([empty, *rows["text"]]), torch.cat([empty, *rows["needle"]]), gates, prompts)


def _alternate(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    out = []
    for i in range(max(len(a), len(b))):
        out += list(a[i : i + 1]) + list(b[i : i + 1])
    return out
