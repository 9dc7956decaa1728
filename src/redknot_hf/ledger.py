"""Where prefill goes: FLOPs from formulas, bytes and seconds from measurements, side by side per mechanism.

FLOPs count a multiplication and an addition as two. They are counted from the weights and from what heads see, not from
what a kernel does, so they are the saving on paper; seconds are measured in the same process, configurations in turn.
``realised`` is the time saved over the time that the FLOPs saved promise at the dense run's rate: a mechanism that saves
47 points of FLOPs and no time shows 0 there. The formulas are in docs/sparse-ffn.md.

What this module does not know: quality.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .cache import RedKnotCache
from .errors import RedKnotError
from .heads import HeadProfile
from .heads.model_shape import model_shape, text_config
from .sparse_ffn import SparseFFN, SparseFFNSchedule
from .sparse_ffn.structure import Block, decoder_of, find_blocks

__all__ = ["PARTS", "Entry", "Ledger", "measure_prefill", "prefill_flops"]

PARTS = ("projections", "attention", "ffn", "selection", "head")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass
class Entry:
    """One configuration.

    Attributes:
        name: of the configuration; ``mechanisms`` says which of "head classes" and "sparse FFN" are on.
        flops: of one prefill, by `PARTS`, and "total".
        seconds: median of the whole prefill; ``all_seconds`` every repeat.
        part_seconds: "attention" (attention modules, with projections and storage), "ffn" (with the norm before it, and
            choosing, gathering and scattering rows) and "rest", from one more run that waits for the device around each
            module.
        kv_bytes: pages and tables that the cache holds afterwards.
        moved_bytes: FFN rows gathered and scattered.
        peak_bytes: most that the device allocator held beyond the weights; None on a CPU.
        ffn_rows: share of the FFN rows that ran.
    """

    name: str
    mechanisms: tuple[str, ...]
    flops: dict[str, float]
    seconds: float
    all_seconds: list[float]
    part_seconds: dict[str, float]
    kv_bytes: int
    moved_bytes: int
    peak_bytes: int | None
    ffn_rows: float
    notes: tuple[str, ...] = ()


@dataclass
class Ledger:
    """The configurations, the dense one first."""

    model: str
    tokens: int
    batch: int
    device: str
    dtype: str
    threads: int
    repeats: int
    versions: dict[str, str]
    entries: list[Entry] = field(default_factory=list)

    def saved_flops(self, entry: Entry) -> float:
        """Share of the dense run's FLOPs."""
        return 1 - entry.flops["total"] / self.entries[0].flops["total"]

    def saved_seconds(self, entry: Entry) -> float:
        """Share of the dense run's seconds; negative if it took longer."""
        return 1 - entry.seconds / self.entries[0].seconds

    def realised(self, entry: Entry) -> float | None:
        """Time saved over what the FLOPs saved promise; None where no FLOPs are saved."""
        saved = self.saved_flops(entry)
        return self.saved_seconds(entry) / saved if saved > 1e-9 else None

    def realised_ffn(self, entry: Entry) -> float | None:
        """The same for the FFN modules and the norms before them alone, at their own rate: tells overhead from FFNs that
        are faster than the average of the model."""
        dense = self.entries[0]
        paper = (1 - (entry.flops["ffn"] + entry.flops["selection"]) / dense.flops["ffn"]) if dense.flops["ffn"] else 0
        if paper <= 1e-9 or not dense.part_seconds["ffn"]:
            return None
        return (1 - entry.part_seconds["ffn"] / dense.part_seconds["ffn"]) / paper

    def as_dict(self) -> dict[str, Any]:
        found = {key: value for key, value in asdict(self).items() if key != "entries"}
        found["configurations"] = [
            {
                **asdict(entry),
                "saved_flops": self.saved_flops(entry),
                "saved_seconds": self.saved_seconds(entry),
                "realised": self.realised(entry),
                "realised_ffn": self.realised_ffn(entry),
            }
            for entry in self.entries
        ]
        return found


# --------------------------------------------------------------------------------------------------------------- FLOPs


def prefill_flops(
    model: nn.Module,
    tokens: int,
    profile: HeadProfile | None = None,
    ffn_rows: list[float] | None = None,
    batch: int = 1,
    observed: dict[int, int] | None = None,
) -> dict[str, float]:
    """FLOPs of a prefill that returns the last token's logits.

    Args:
        tokens: of every sequence.
        profile: head classes; None for all heads global.
        ffn_rows: share of the rows that the FFN of each layer runs on; None for all.
        observed: layer -> queries whose attention is measured there for choosing rows.

    Returns:
        By `PARTS`, and "total".
    """
    config: Any = decoder_of(model).config
    shape = model_shape(config)
    blocks = find_blocks(model)
    text = text_config(config)
    rows = batch * tokens
    found = dict.fromkeys(PARTS, 0.0)
    for block in blocks:
        share = 1.0 if ffn_rows is None else ffn_rows[block.index]
        found["projections"] += 2.0 * rows * sum(_active(getattr(block.layer, name), text) for name in block.mixers)
        found["ffn"] += 2.0 * rows * share * sum(_active(getattr(block.layer, name), text) for name in block.ffn)
        if shape.attention_layers is not None and block.index not in shape.attention_layers:
            continue
        dim = shape.head_dim or text.hidden_size // shape.num_attention_heads
        group = shape.num_attention_heads // shape.num_kv_heads
        for pairs in _visible_pairs(block.index, tokens, shape, profile):
            found["attention"] += 4.0 * batch * dim * group * pairs  # q.k and weights.v
        found["selection"] += 2.0 * rows * (observed or {}).get(block.index, 0) * dim * shape.num_attention_heads
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is not None:
        found["head"] = 2.0 * batch * sum(weight.numel() for weight in head.parameters() if weight.dim() == 2)
    return {**found, "total": sum(found.values())}


def _active(module: nn.Module, config: Any) -> float:
    """Weights of the module's products that one row meets: of experts, those that are chosen."""
    experts = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), 0)
    chosen = next((getattr(config, name) for name in _CHOSEN if getattr(config, name, None)), 0)
    total = 0.0
    for name, weight in module.named_parameters():
        if weight.dim() < 2 or name.endswith("bias"):
            continue
        stacked = experts and weight.dim() == 3 and weight.shape[0] == experts
        listed = experts and "experts." in name and "shared" not in name and any(p.isdigit() for p in name.split("."))
        total += weight.numel() * (chosen / experts if stacked or listed else 1.0)
    return total


def _visible_pairs(layer: int, tokens: int, shape: Any, profile: HeadProfile | None) -> Iterator[float]:
    """(query, key) pairs that each KV head of a layer sees."""
    model_window = None
    if shape.sliding_window and (shape.sliding_layers is None or layer in shape.sliding_layers):
        model_window = shape.sliding_window
    for head in range(shape.num_kv_heads):
        sink, window = 0, tokens
        if profile is not None and profile.head_class[layer][head] == "local":
            sink, window = profile.sink[layer][head], profile.window[layer][head]
        if model_window and model_window <= window:
            sink, window = 0, model_window
        held = min(sink + window, tokens)
        yield held * (held + 1) / 2 + (tokens - held) * held


# --------------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def measure_prefill(
    model: nn.Module,
    tokens: int,
    schedules: dict[str, SparseFFNSchedule],
    profile: HeadProfile | None = None,
    repeats: int = 5,
    batch: int = 1,
    ids: torch.Tensor | None = None,
    progress: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Ledger:
    """Prefill densely, with head classes, with each schedule, and with both; in turn, ``repeats`` times.

    Args:
        model: runs attn_implementation="redknot".
        tokens: of every sequence.
        schedules: name -> schedule.
        profile: head classes; None leaves those configurations out.
        ids: int64 ``[batch, tokens]``; None for random tokens (rows kept under ``mass`` depend on the text).
        progress: called with one line per configuration.
        clock: gives seconds. ``time.process_time`` compares configurations on a CPU that others use, in one thread.

    Raises:
        RedKnotError: an argument is out of range.
    """
    if tokens < 2 or repeats < 1 or batch < 1:
        raise RedKnotError(f"tokens={tokens}, batch={batch}, repeats={repeats}: expected at least 2, 1 and 1")
    decoder = decoder_of(model)
    config: Any = decoder.config
    device = next(model.parameters()).device
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = text_config(config).vocab_size
        ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    ids = ids.to(device)
    plans: list[tuple[str, HeadProfile | None, SparseFFNSchedule | None]] = [("dense", None, None)]
    if profile is not None:
        plans.append(("head classes", profile, None))
    plans += [(name, None, schedule) for name, schedule in schedules.items()]
    if profile is not None:
        plans += [(f"head classes + {name}", profile, schedule) for name, schedule in schedules.items()]
    contexts = [None if schedule is None else SparseFFN(model, schedule) for _, _, schedule in plans]

    def once(number: int) -> tuple[float, RedKnotCache]:
        own, context = plans[number][1], contexts[number]
        cache = RedKnotCache(config, own if own is not None else HeadProfile.all_global(config))
        _wait(device)
        start = clock()
        with context if context is not None else contextlib.nullcontext():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        _wait(device)
        return clock() - start, cache

    seconds: list[list[float]] = [[] for _ in plans]
    entries: list[Entry] = []
    for number, (name, own, schedule) in enumerate(plans):  # the first runs warm up and are not counted
        if progress is not None:
            progress(name)
        context = contexts[number]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        _, cache = once(number)
        peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        kv = cache.memory_report().live
        del cache
        rows, moved = _rows_run(context, find_blocks(model), config, ids, model)
        with _timed_parts(model, device, clock) as parts:
            total, _ = once(number)
        part_seconds = {**parts, "rest": total - sum(parts.values())}
        observed = {} if context is None else dict.fromkeys(context.observed, context.schedule.query_block)
        entries.append(
            Entry(
                name=name,
                mechanisms=(("head classes",) if own is not None else ()) + (("sparse FFN",) if schedule else ()),
                flops=prefill_flops(model, tokens, own, rows, batch, observed),
                seconds=0.0,
                all_seconds=seconds[number],
                part_seconds=part_seconds,
                kv_bytes=kv,
                moved_bytes=moved,
                peak_bytes=peak,
                ffn_rows=1.0 if context is None or not sum(context.stats.seen) else context.stats.fraction,
                notes=() if schedule is None else schedule.notes,
            )
        )
    for repeat in range(repeats):
        order = range(len(plans)) if repeat % 2 == 0 else reversed(range(len(plans)))  # drift hits all alike
        for number in order:
            seconds[number].append(once(number)[0])
        if progress is not None:
            progress(f"repeat {repeat + 1} of {repeats}")
    for entry in entries:
        entry.seconds = statistics.median(entry.all_seconds)
    return Ledger(
        model=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        tokens=tokens,
        batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        repeats=repeats,
        versions=_versions(),
        entries=entries,
    )


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def _rows_run(
    context: SparseFFN | None, blocks: list[Block], config: Any, ids: torch.Tensor, model: nn.Module
) -> tuple[list[float] | None, int]:
    """Share of the rows of each layer that ran in the run before, and bytes gathered and scattered."""
    if context is None or not sum(context.stats.seen):
        return None, 0
    stats = context.stats
    shares = [run / seen if seen else 1.0 for run, seen in zip(stats.run, stats.seen, strict=True)]
    width = text_config(config).hidden_size * next(model.parameters()).element_size()
    # a row is read and written once in gathering, once in scattering; the zeros of all rows are written
    moved = sum(4 * run + seen for run, seen in zip(stats.run, stats.seen, strict=True) if run < seen) * width
    return shares, moved


@contextlib.contextmanager
def _timed_parts(model: nn.Module, device: torch.device, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds spent in the attention and FFN modules of the layers while inside; waits for the device around each."""
    spent = {"attention": 0.0, "ffn": 0.0}
    started: list[float] = []
    hooks = []

    def before(module: nn.Module, args: Any) -> None:
        _wait(device)
        started.append(clock())

    def after(part: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            _wait(device)
            spent[part] += clock() - started.pop()

        return hook

    for block in find_blocks(model):
        for part, names in (("attention", block.mixers), ("ffn", (block.norm, *block.ffn))):
            for name in filter(None, names):
                module = getattr(block.layer, name)
                hooks.append(module.register_forward_pre_hook(before))
                hooks.append(module.register_forward_hook(after(part)))
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
