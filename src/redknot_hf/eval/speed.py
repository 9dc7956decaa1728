"""The caches a user could choose from, timed on one model: first token, decoding, memory, and how many sequences fit.

Capacity, memory and speed are three numbers and are reported apart. Every cache reads the same random tokens in the same
process and decodes greedily; the share of tokens that agree with DynamicCache's stands beside the times, so that a fast
wrong answer shows. Quality is measured by `run`, not here.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import compat
from ..cache import RedKnotCache
from ..errors import RedKnotError, shorten
from ..heads import HeadProfile
from .generate import cache_argument, last_logits_only, wait

__all__ = ["CACHES", "CacheRow", "CacheTable", "Contender", "contenders", "measure_caches", "tensor_bytes"]

CACHES = ("dynamic", "static", "quantized", "offloaded", "ours", "ours-static", "ours-global")


@dataclass(frozen=True)
class Contender:
    """A cache to time.

    Attributes:
        key: one of `CACHES`.
        name: for tables.
        make: (tokens that it must hold) -> an empty cache.
        implementation: attention implementation that it runs with.
        compiled: decode steps run under torch.compile.
        absent: why it cannot run here; None if it can.
    """

    key: str
    name: str
    make: Callable[[int], Any]
    implementation: str
    compiled: bool = False
    absent: str | None = None


@dataclass
class CacheRow:
    """What one cache did; None where nothing was measured.

    Attributes:
        first_token_s: seconds from the prompt to the first token, median.
        decode_ms: milliseconds per token after the first, all sequences of the batch together, median.
        kv_bytes: bytes of one sequence's cache on the device after the prompt, as the cache allocates them.
        host_bytes: the same in host memory.
        peak_bytes: most that the device allocator held beyond the weights, for the whole batch; None on a CPU.
        fits: sequences of this length that fit by bytes: (memory x 0.9 - weights) / kv_bytes.
        fits_measured: largest batch that was filled and decoded one step on this device.
        agrees: share of the greedy tokens that are DynamicCache's.
        note: why something is missing.
    """

    key: str
    name: str
    first_token_s: float | None = None
    decode_ms: float | None = None
    kv_bytes: int | None = None
    host_bytes: int | None = None
    peak_bytes: int | None = None
    fits: int | None = None
    fits_measured: int | None = None
    agrees: float | None = None
    note: str = ""


@dataclass
class CacheTable:
    """All rows, and what they were measured on."""

    model: str
    tokens: int
    new_tokens: int
    batch: int
    device: str
    dtype: str
    threads: int
    repeats: int
    memory: int
    weights: int
    profile: str
    versions: dict[str, str]
    rows: list[CacheRow] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def contenders(
    model: Any, profile: HeadProfile, wanted: Iterable[str], *, compile_decode: bool = False
) -> list[Contender]:
    """The caches by name, with the reason where one cannot run here.

    Args:
        model: decides the config, the device and the ordinary attention implementation.
        profile: of "ours".
        wanted: some of `CACHES`; "quantized" stands for all backends of transformers' QuantizedCache.
        compile_decode: add compiled decoding for the two static forms.

    Raises:
        RedKnotError: an unknown name.
    """
    from transformers import DynamicCache, QuantizedCache, StaticCache
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    config = model.config
    cuda = next(model.parameters()).device.type == "cuda"
    plain = "sdpa" if compat.runs_sdpa(config) else "eager"
    exact = HeadProfile.all_global(config)
    no_cuda = None if cuda else "offloading needs a CUDA device"

    def quantized(backend: str) -> Callable[[int], Any]:
        return lambda n: QuantizedCache(backend, config)

    def static(n: int) -> Any:
        return StaticCache(config=config, max_cache_len=n)

    def ours_static(n: int) -> Any:
        return RedKnotCache(config, profile, max_cache_len=n)

    known: list[Contender] = [
        Contender("dynamic", f"DynamicCache, {plain}", lambda n: DynamicCache(config=config), plain),
        Contender("static", "StaticCache", static, plain),
        Contender("static", "StaticCache, compiled", static, plain, compiled=True),
        Contender(
            "quantized", "QuantizedCache quanto, 4 bits", quantized("quanto"), plain,
            absent=None if is_optimum_quanto_available() else "needs the package optimum-quanto",
        ),
        Contender(
            "quantized", "QuantizedCache hqq, 4 bits", quantized("hqq"), plain,
            absent=None if is_hqq_available() else "needs the package hqq",
        ),
        Contender("quantized", "QuantizedCache fp8, 8 bits", quantized("fp8"), plain),
        Contender(
            "offloaded", "DynamicCache, offloaded", lambda n: DynamicCache(config=config, offloading=True), plain,
            absent=no_cuda,
        ),
        Contender("ours", "RedKnotCache", lambda n: RedKnotCache(config, profile), "redknot"),
        Contender("ours-static", "RedKnotCache static", ours_static, "redknot"),
        Contender("ours-static", "RedKnotCache static, compiled", ours_static, "redknot", compiled=True),
        Contender("ours-global", "RedKnotCache, all heads global", lambda n: RedKnotCache(config, exact), "redknot"),
    ]  # fmt: skip
    wanted = list(dict.fromkeys(wanted))
    for key in wanted:
        if key not in CACHES:
            raise RedKnotError(f"--caches: {shorten(key)} is unknown; expected some of {', '.join(CACHES)}")
    return [c for key in wanted for c in known if c.key == key and (compile_decode or not c.compiled)]


def measure_caches(
    model: Any,
    tokens: int,
    new_tokens: int,
    candidates: list[Contender],
    *,
    batch: int = 1,
    repeats: int = 3,
    memory: int | None = None,
    measure_fits_s: float = 0.0,
    profile_name: str = "",
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> CacheTable:
    """Time every cache.

    Args:
        model: a causal decoder; its attention implementation is switched and set back.
        tokens, new_tokens, batch: prompt length, tokens decoded, sequences.
        candidates: from `contenders`.
        repeats: runs of each; the first run of a cache warms up and is not counted.
        memory: bytes for weights and caches; None: the device's.
        measure_fits_s: on CUDA, seconds per cache for finding the largest batch by trying; 0: by bytes alone.

    Raises:
        RedKnotError: an argument is out of range, or the model has too few positions.
    """
    if tokens < 2 or new_tokens < 2 or batch < 1 or repeats < 1:
        raise RedKnotError(
            f"tokens={tokens}, new tokens={new_tokens}, batch={batch}, repeats={repeats}: expected at least 2, 2, 1 and 1"
        )
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit and tokens + new_tokens > limit:
        raise RedKnotError(f"--tokens {tokens} and {new_tokens} new ones exceed the model's {limit} positions")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, text.vocab_size, (batch, tokens), generator=generator).to(device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    table = CacheTable(
        model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__).rstrip("/").rsplit("/", 1)[-1],
        tokens=tokens, new_tokens=new_tokens, batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        repeats=repeats, memory=memory or _memory(device), weights=weights, profile=profile_name, versions=_versions(),
    )  # fmt: skip
    before = model.config._attn_implementation
    reference: list[torch.Tensor] = []
    try:
        for contender in candidates:
            progress(contender.name)
            row = CacheRow(contender.key, contender.name, note=contender.absent or "")
            table.rows.append(row)
            if contender.absent:
                continue
            try:
                made = _time(model, contender, ids, new_tokens, repeats, row)
            except torch.OutOfMemoryError:
                row.note = "out of memory"
                continue
            except Exception as error:  # an optional backend or compiler that does not work here is a result
                if contender.key.startswith("ours"):
                    raise
                row.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
                continue
            if not reference and contender.key == "dynamic":
                reference.append(made)
            if reference:
                row.agrees = float((made == reference[0]).float().mean())
            if row.kv_bytes:
                row.fits = max(0, int((table.memory * 0.9 - weights) // row.kv_bytes))
            if measure_fits_s and device.type == "cuda":
                progress(f"{contender.name}: largest batch")
                row.fits_measured = _largest_batch(model, contender, ids, row.fits or 1, measure_fits_s)
    finally:
        model.set_attn_implementation(before)
        _release(device)
    return table


@torch.inference_mode()
def _time(
    model: Any, contender: Contender, ids: torch.Tensor, new_tokens: int, repeats: int, row: CacheRow
) -> torch.Tensor:
    """Fill in the row; returns the greedy tokens ``[batch, new_tokens]``."""
    device, batch, tokens = ids.device, ids.shape[0], ids.shape[1]
    model.set_attn_implementation(contender.implementation)
    step, name, few = model.__call__, cache_argument(model), last_logits_only(model)
    if contender.compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        step = torch.compile(model.__call__, mode=mode)
    firsts, decodes = [], []
    for repeat in range(repeats + 1):
        _release(device)
        cache = contender.make(tokens + new_tokens)
        start = wait(device)
        out = model(ids, **{name: cache}, use_cache=True, **few)
        token = out.logits[:, -1:].argmax(-1)
        middle = wait(device)
        del out
        if repeat == 0:
            # (sizes are the same in every run)
            row.kv_bytes, row.host_bytes = (size // batch for size in tensor_bytes(cache, device))
        made = [token]
        for count in range(1, new_tokens):
            position = torch.full((batch, 1), tokens + count - 1, device=device)
            logits = step(token, **{name: cache}, position_ids=position, use_cache=True).logits
            token = logits[:, -1:].argmax(-1).clone()  # a compiled step overwrites its outputs
            made.append(token)
        end = wait(device)
        if repeat:
            firsts.append(middle - start)
            decodes.append((end - middle) / (new_tokens - 1) * 1e3)
        elif device.type == "cuda":
            row.peak_bytes = torch.cuda.max_memory_allocated(device) - sum(p.nbytes for p in model.parameters())
        del cache
    row.first_token_s, row.decode_ms = statistics.median(firsts), statistics.median(decodes)
    return torch.cat(made, 1)


@torch.inference_mode()
def _largest_batch(model: Any, contender: Contender, ids: torch.Tensor, guess: int, seconds: float) -> int:
    """Largest batch whose cache was filled (in chunks, so that activations stay small) and decoded one step."""
    device, tokens = ids.device, ids.shape[1]
    deadline = time.perf_counter() + seconds
    name, few = cache_argument(model), last_logits_only(model)

    def works(batch: int) -> bool:
        _release(device)
        cache = None
        try:
            cache = contender.make(tokens + 2)
            rows = ids[:1].expand(batch, -1)
            chunk = max(1, 65536 // batch)
            for begin in range(0, tokens, chunk):
                part = rows[:, begin : begin + chunk]
                model(part, **{name: cache}, use_cache=True, **few)
            model(rows[:, :1], **{name: cache}, use_cache=True, **few)
            return True
        except (torch.OutOfMemoryError, RedKnotError):
            return False
        finally:
            del cache
            _release(device)

    low, high = 0, max(1, guess)
    while time.perf_counter() < deadline and works(high):
        low, high = high, high + max(1, high // 4)
    while high - low > max(1, low // 20) and time.perf_counter() < deadline:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def tensor_bytes(cache: Any, device: torch.device) -> tuple[int, int]:
    """(device, host) bytes that a cache holds: its own report, or the storages of all tensors found in its layers."""
    if hasattr(cache, "memory_report"):
        report = cache.memory_report()
        return report.allocated - report.cold, report.cold
    seen: dict[int, tuple[int, bool]] = {}

    def look(value: Any, depth: int) -> None:
        if torch.is_tensor(value):
            inner = getattr(value, "__dict__", {})
            if type(value) is not torch.Tensor and inner:  # quantised tensors hold their parts as attributes
                for part in inner.values():
                    look(part, depth + 1)
            else:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = (storage.nbytes(), value.device.type == device.type)
        elif depth < 4 and isinstance(value, (list, tuple)):
            for part in value:
                look(part, depth + 1)
        elif depth < 4 and isinstance(value, dict):
            for part in value.values():
                look(part, depth + 1)

    for layer in cache.layers:
        for value in vars(layer).values():
            look(value, 0)
    there = sum(size for size, local in seen.values() if local)
    return there, sum(size for size, local in seen.values() if not local)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 0


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _versions() -> dict[str, str]:
    import transformers

    from .. import __version__

    return {
        "redknot_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
