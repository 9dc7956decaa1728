"""`profile_heads`: measure a model's KV heads, choose their classes and windows, and validate the choice.

Scores, gates and the quadratic model come from `collect`, the map from `selection`, the figures from `validation`. The
result is a `HeadProfile` whose metadata says how it was made and what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ...errors import RedKnotError, shorten
from ..profile import HeadProfile
from .checkpoint import Checkpoint
from .choose import METHODS, select_profile
from .collect import batches, build_prompts, fingerprint, frozen, measure_heads, workload
from .intercept import decoder_layout
from .objective import Objective
from .refine import search_on
from .tasks import collate
from .tolerance import read_tolerance, search_budget
from .validation import PREFILL_MODES, Prompts, full_reference, validate_profile

__all__ = ["profile_heads"]


def profile_heads(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    *,
    budget: float | None = None,
    tolerance: float | Mapping[str, float] | None = None,
    method: str = "joint",
    sink: int = 4,
    windows: Sequence[int] = (64, 128, 256, 512, 1024),
    mean_window: int = 256,
    needle_weight: float = 1.0,
    prefill: str = "windowed",
    context: int = 2048,
    seed: int = 0,
    gate_steps: int | None = None,
    gate_weight: float = 5.0,
    samples: int | None = None,
    validate: bool = True,
    progress: bool = True,
    checkpoint: Any = None,
) -> HeadProfile:
    """Measure which KV heads of a model need the whole context, and what keeping only those costs.

    Args:
        model: a causal decoder of transformers (or a composite model; its text part is profiled), on any device. It is
            restored to its state afterwards.
        tokenizer: of the model.
        texts: plain texts to calibrate and validate on; None makes prose by itself. Retrieval prompts are always made,
            with these texts as haystack.
        budget: fraction of heads that stay global; 0.25 when `tolerance` is None too.
        tolerance: instead of a budget, the cost that is allowed: a bound on KL(full || profile) on text in nats per
            token, or a mapping with some of "text_kl", "needle_kl" (nats per token) and "accuracy_drop" (share of
            retrieval prompts lost). The smallest budget that meets it on the validation prompts is taken; if none
            does, all heads stay global and a warning says so.
        method: one of `METHODS`.
        sink: first tokens every local head keeps. 4 because position 0 is the sink of every model measured.
        windows: sizes a local head may get, tokens, increasing.
        mean_window: average window of local heads, tokens: fixes the bytes, whatever windows are chosen.
        needle_weight: what the search pays for answers against text: 0.5 KL at answers and 0.25 misses times this number,
            beside 1 KL on text. Below 1 for maps that stay close to the full cache on text, above 1 for retrieval alone.
        prefill: the mode of the cache that will be used: "windowed" applies windows during prefill, "full" evicts after
            it. Validated in this mode. On a GPU the last few maps are also compared in it, and up to 1B parameters the
            search ends in it; scores and all else are of eviction after the prefill.
        context: tokens per calibration context.
        seed: of prompts, prose and sketches; equal seeds give equal profiles on one machine.
        gate_steps: of Adam; None for what the device does in time (32 on a CPU; 80 on a GPU, 16 there from 1B on).
        gate_weight: of the KL against the mean gate; more keeps more heads.
        samples: retrieval prompts; None for what the device does in minutes (9 on a CPU, where three share a context; 40 on
            a GPU, 24 there from 1B on).
        validate: False skips the validation (not with `tolerance`).
        progress: show a progress bar.
        checkpoint: file to continue from and to save to; deleted when the profile is done.

    Returns:
        The profile; `metadata["scores"]` and `metadata["validation"]` hold the figures.

    Raises:
        RedKnotError: an argument out of range, or a model whose heads cannot be profiled; the message says why.
    """
    if budget is not None and tolerance is not None:
        raise RedKnotError(
            "budget and tolerance were both given; pass one: a fraction of heads, or a bound on the cost"
        )
    bounds = read_tolerance(tolerance)
    budget = 0.25 if budget is None and bounds is None else budget
    windows = _check(budget, method, sink, windows, mean_window, prefill, context, gate_steps, samples)
    objective = Objective.weighted(needle_weight)
    if bounds is not None and not validate:
        raise RedKnotError("tolerance needs the validation; pass validate=True or a budget")
    texts = None if texts is None else [text for text in texts if text.strip()]
    if texts is not None and not texts:
        raise RedKnotError("texts is empty; pass at least one text, or None for made-up prose")

    layout = decoder_layout(model)
    device = next(model.parameters()).device
    load = workload(device, context, samples, sum(parameter.numel() for parameter in model.parameters()))
    gate_steps = load.gate_steps if gate_steps is None else gate_steps
    build_part = partial(build_prompts, tokenizer, texts, context=context, seed=seed, kinds=load.kinds)
    needles, plain = build_part("profile", load.needles, load.texts, rows=load.rows, together=load.together)
    held = build_part("validation", load.held_needles, load.held_texts, rows=load.rows, together=load.together)
    gate_window = min(windows, key=lambda w: abs(w - mean_window))
    steps = 0 if method == "error" else gate_steps
    arguments = {
        "sink": sink, "windows": windows, "context": context, "seed": seed, "gate_steps": steps,
        "gate_weight": gate_weight, "gate_window": gate_window, "load": repr(load), "method": method,
        "mean_window": mean_window, "needle_weight": needle_weight,
    }  # fmt: skip
    state = Checkpoint(checkpoint, fingerprint(model, [*needles, *plain], arguments) if checkpoint else "")

    batched = [*batches(needles, load.batch), *batches(plain, load.batch)]
    units = sum(1 + (load.text_sketches if b[0].kind == "text" else load.needle_sketches) for b in batched) + steps
    held_batches = [*batches(held[0], load.batch), *batches(held[1], load.batch)] if validate else []
    rounds = load.rounds if method == "joint" and budget is not None else 0
    with frozen(model), _bar(units + rounds + 2 * len(held_batches), progress) as bar:
        measured = measure_heads(
            model, layout, needles, plain, load, sink=sink, windows=windows, gate_window=gate_window,
            gate_steps=steps, gate_weight=gate_weight, seed=seed, checkpoint=state, progress=bar,
        )  # fmt: skip
        bar.set_description("preparing the search")
        prompts = measured.prompts
        if load.search_needles and method != "gates":
            measured.prompts.clear()  # their KV makes room for the search's
            fresh = build_part("selection", load.search_needles, load.search_texts, rows=load.search_rows)
            groups = [*batches(fresh[0], load.batch), *batches(fresh[1], load.batch)]
            prompts = [full_reference(model, collate(group, device)) for group in groups]
        search = search_on(
            model, layout, prompts, windows=windows, sink=sink, objective=objective, sketches=load.search_sketches,
            seed=seed, mode=prefill if load.deployed else "full", rounds=load.rounds, lengths=load.lengths, singles=load.singles,
            finalists=load.finalists, deployed_rounds=load.deployed_rounds, step=lambda: bar.update(1),
        )  # fmt: skip
        search = replace(search, load=partial(_load_search, state), save=partial(_save_search, state))
        bar.set_description("full cache on held-out prompts")
        references: list[Prompts] = []
        for group in held_batches:
            references.append(full_reference(model, collate(group, device)))
            bar.update(1)

        def build(fraction: float) -> HeadProfile:
            bar.set_description("choosing")
            return select_profile(
                model.config,
                layout,
                measured,
                budget=fraction,
                method=method,
                mean_window=mean_window,
                search=search,
            )

        if bounds is None:
            assert budget is not None
            profile = build(budget)
            if validate:
                profile.metadata["validation"] = validate_profile(model, references, profile, prefill, context, bar)
        else:
            profile = search_budget(model, references, build, bounds, prefill, context, bar)
    profile.metadata.update(
        prefill=prefill,
        data={
            "texts": f"{len(texts)} texts of the user" if texts else "made-up prose and Python's language reference",
            "context": context, "needles": load.needles, "text_samples": load.texts, "seed": seed,
            "text_rows": load.rows, "gate_steps": steps, "sketches": [load.text_sketches, load.needle_sketches],
            "search_needles": load.search_needles or load.needles, "search_texts": load.search_texts or load.texts,
            "needle_weight": needle_weight,
        },
        seed=seed,
        device=str(device.type),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )  # fmt: skip
    state.remove()
    return profile


def _load_search(state: Checkpoint, key: str) -> Any:
    """The best choice and the history of an interrupted search, or None."""
    if key not in state.note:
        return None
    return state.tensors[key], list(state.note[key])


def _save_search(state: Checkpoint, key: str, found: tuple[Tensor, list[dict[str, Any]]]) -> None:
    state.tensors[key], state.note[key] = found[0].clone(), list(found[1])
    state.save()


def _check(
    budget: Any, method: Any, sink: Any, windows: Sequence[int], mean_window: int, prefill: Any, context: Any,
    gate_steps: Any, samples: Any,
) -> tuple[int, ...]:  # fmt: skip
    """Refuse arguments out of range; the windows as a tuple."""
    if budget is not None and (
        isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1
    ):
        raise RedKnotError(f"budget is {shorten(budget)}; expected a fraction of heads in [0, 1]")
    if method not in METHODS:
        raise RedKnotError(f"method is {shorten(method)}; expected one of {', '.join(map(repr, METHODS))}")
    if prefill not in PREFILL_MODES:
        raise RedKnotError(f"prefill is {shorten(prefill)}; expected one of {', '.join(map(repr, PREFILL_MODES))}")
    sizes = tuple(windows)
    if not sizes or any(not isinstance(w, int) or w < 1 for w in sizes) or list(sizes) != sorted(set(sizes)):
        raise RedKnotError(f"windows is {shorten(list(sizes))}; expected increasing positive token counts")
    if not sizes[0] <= mean_window:
        raise RedKnotError(f"mean_window is {mean_window}; expected at least the smallest window, {sizes[0]}")
    for name, value, least in (("sink", sink, 0), ("context", context, 128), ("gate_steps", gate_steps, 0)):
        if value is None and name == "gate_steps":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RedKnotError(f"{name} is {shorten(value)}; expected an integer of at least {least}")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise RedKnotError(f"samples is {shorten(samples)}; expected a positive integer or None")
    if method != "error" and gate_steps == 0:
        raise RedKnotError("gate_steps is 0, but the method needs gates; pass gate_steps >= 1 or method='error'")
    return sizes


class _bar:
    """A tqdm bar, or nothing with its interface."""

    def __init__(self, total: int, show: bool) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, disable=not show, unit="pass", leave=False)

    def __enter__(self) -> Any:
        return self._bar

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
