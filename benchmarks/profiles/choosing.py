"""The maps that the comparison looks at: one calibration for all rules, ours by search, every other rule as an order."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import platform
import random
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rules
import torch
import transformers

from redknot_hf.heads.profile import HeadProfile
from redknot_hf.heads.profiler.checkpoint import Checkpoint
from redknot_hf.heads.profiler.choose import select_profile
from redknot_hf.heads.profiler.collect import Measured, Workload, batches, build_prompts, measure_heads, workload
from redknot_hf.heads.profiler.objective import Objective
from redknot_hf.heads.profiler.refine import Search, search_on
from redknot_hf.heads.profiler.tasks import collate
from redknot_hf.heads.profiler.validation import Prompts, full_reference
from redknot_hf.heads.profiler.visibility import HeadMap

WINDOWS = (64, 128, 256, 512, 1024)
"""Window sizes that ours may give a local head; the mean is that of all other rules."""


def read_texts(folder: Path, part: str) -> list[str]:
    """ "valid": WikiText-2's validation set. "test": its test set and 87 Wikipedia articles, shuffled."""
    texts = []
    if part == "test":
        with tarfile.open(folder / "text" / "wikipedia_87_articles.tar.gz") as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                if member.isfile():
                    texts.append(archive.extractfile(member).read().decode("utf-8", errors="replace"))  # type: ignore[union-attr]
    with gzip.open(folder / "text" / f"wikitext-2-{part}.txt.gz", "rt", encoding="utf-8") as file:
        wiki = file.read()
    texts += [wiki[i : i + 20_000] for i in range(0, len(wiki), 20_000)]
    random.Random(0).shuffle(texts)
    return texts


@dataclasses.dataclass
class Calibration:
    """What all rules are computed from: the profiler's own measurements and the prompts of its search.

    The other rules need gradients or scores of the scored pass; single-head ablation is measured on the search's prompts.
    """

    load: Workload
    measured: Measured
    prompts: list[Prompts]
    environment: dict[str, Any]


def calibrate(model: Any, tokenizer: Any, layout: Any, args: argparse.Namespace, log: Any) -> Calibration:
    device = next(model.parameters()).device
    context = args.contexts[0]
    load = workload(device, context, args.calibration, sum(p.numel() for p in model.parameters()))
    steps = args.gate_steps or load.gate_steps
    environment = {
        "model": args.model, "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "dtype": args.dtype, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv),
        "calibration": {**load.__dict__, "gate_steps": steps, "context": context},
    }  # fmt: skip
    source = None if args.made_up else read_texts(args.data, "valid")
    needles, texts = build_prompts(
        tokenizer, source, "profile", load.needles, load.texts, context, load.rows, 0, load.together, load.kinds
    )
    measured = measure_heads(
        model, layout, needles, texts, load, sink=rules.SINK, windows=WINDOWS,
        gate_window=rules.WINDOW, gate_steps=steps, gate_weight=5.0, seed=0, checkpoint=Checkpoint(None, ""),
        progress=log,
    )  # fmt: skip
    log("calibrated on", len(needles), "needles and", len(texts), "texts,", steps, "gate steps")
    prompts = measured.prompts
    if load.search_needles:
        measured.prompts.clear()
        fresh = build_prompts(
            tokenizer, source, "selection", load.search_needles, load.search_texts, context, load.search_rows, 0,
            kinds=load.kinds,
        )  # fmt: skip
        groups = [*batches(fresh[0], load.batch), *batches(fresh[1], load.batch)]
        prompts = [full_reference(model, collate(group, device)) for group in groups]
    return Calibration(load, measured, prompts, environment)


def choose_ours(
    model: Any, layout: Any, calibration: Calibration, window: int, args: argparse.Namespace, log: Any,
    rule: str, objective: Objective,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Our maps at every budget and mode, saved as profiles too."""
    load = calibration.load
    known: dict[Any, Any] = {}
    for mode in args.modes:
        for budget in args.budgets:
            if log.seconds > args.max_seconds:
                return
            search = remembering(known, search_on(
                model, layout, calibration.prompts, windows=WINDOWS, sink=rules.SINK,
                objective=objective, sketches=load.search_sketches, seed=0, mode=mode,
                rounds=load.rounds, lengths=load.lengths, singles=load.singles, finalists=load.finalists,
                deployed_rounds=load.deployed_rounds,
            ))  # fmt: skip
            profile = select_profile(
                model.config, layout, calibration.measured, budget=budget, mean_window=window, search=search
            )
            log(f"{rule} at {budget:.0%}, {window}, {mode}:", json.dumps(profile.metadata["selection"]))
            name = f"{rule.replace(', ', '-').replace(' ', '-')}-{mode}-{window}-{round(100 * budget)}.json"
            device = calibration.environment["device"]
            profile.metadata.update(seed=0, prefill=mode, device=device, dtype=args.dtype)
            profile.save(args.out / name)
            visible = HeadMap.from_profile(profile)
            yield entry(rule, budget, window, mode, visible, name)
            if mode == "windowed" and "full" in args.modes:  # one profile may have to serve both
                yield entry(f"{rule}, chosen for windowed", budget, window, "full", visible, name)


def choose_maps(
    model: Any, layout: Any, calibration: Calibration, window: int, args: argparse.Namespace, log: Any
) -> list[dict[str, Any]]:
    """The other rules' maps whose local heads have `window` tokens."""
    prompts = calibration.prompts
    cells = len(layout.layers) * layout.num_kv_heads
    whole = HeadMap.uniform(layout.num_layers, layout.num_kv_heads, rules.SINK, 2**30)
    found = [entry("all global", 1.0, window, mode, whole) for mode in args.modes if window == args.windows[0]]
    ablation = rules.ablate(model, layout, prompts, window)
    log("ablated", len(ablation[0]), "heads on", sum(len(prompt.batch) for prompt in prompts), "prompts")
    for rule, order in ({"all local": []} | rules.orders(calibration.measured, layout, ablation, window)).items():
        for budget in args.budgets if order else [0.0]:
            visible = rules.uniform_map(layout, order[: round(budget * cells)], window)
            found += [entry(rule, budget, window, mode, visible) for mode in args.modes]
    return found


def entry(
    rule: str, budget: float, window: int, mode: str, visible: HeadMap, profile: str | None = None
) -> dict[str, Any]:
    """One map to compare, as JSON."""
    return {
        "rule": rule, "budget": budget, "window": window, "mode": mode, "profile": profile,
        "map": {"sink": visible.sink, "window": visible.window},
    }  # fmt: skip


def remembering(known: dict[Any, Any], search: Search) -> Search:
    """The same search; what was measured or expanded for one mode is not done again for the other."""

    def cost(choices: Any) -> list[float]:
        keys = [tuple(choice.tolist()) for choice in choices]
        new = {key: choice for key, choice in zip(keys, choices, strict=True) if key not in known}
        if new:
            known.update(zip(new, search.cost(list(new.values())), strict=True))
        return [known[key] for key in keys]

    def expand(choice: Any, number: int) -> Any:
        key = (tuple(choice.tolist()), number, "expanded")
        if key not in known:
            known[key] = search.expand(choice, number)
        return known[key]

    return dataclasses.replace(search, cost=cost, expand=expand)


def given(path: Path, window: int, mode: str) -> dict[str, Any]:
    """A profile file beside the rules."""
    profile = HeadProfile.load(path)
    budget = profile.metadata["budget"]["global_fraction"]
    return entry(f"profile {path.stem}", budget, window, mode, HeadMap.from_profile(profile))


def head_map(e: dict[str, Any]) -> HeadMap:
    sink, window = (tuple(map(tuple, e["map"][name])) for name in ("sink", "window"))
    return HeadMap(sink, window)
