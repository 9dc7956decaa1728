"""Tries launch parameters of the kernels on this GPU and prints them in order: `python tune.py --out DIR`.

What it finds is meant for `choose_config` in decode_kernel.py and prefill_kernel.py; nothing is taken over by itself.
All variants are compiled first, by several processes at once; then each is checked against float32 and timed, twice,
in another order, so that the spread is seen. Writes tune.json, a row per variant and case, as they come. A variant that
does not compile or does not fit is reported and skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import peers
import torch
from harness import CUDA, DEVICE, KEEP_ALL, Shape, check_decode, check_prefill, layers_needed, make_layer, measure
from segpaged_attention import decode_kernel, prefill_kernel


@dataclass(frozen=True)
class Decode:
    """One decode step of `batch` rows with `context` stored tokens."""

    batch: int
    context: int
    num_global: int = 1
    sink: int = 64
    window: int = 256

    @property
    def name(self) -> str:
        heads = f"{self.num_global}/8 global" + ("" if self.num_global == 8 else f", {self.sink}+{self.window}")
        return f"decode B{self.batch} {self.context >> 10}K {heads}"


@dataclass(frozen=True)
class Prefill:
    """`columns` new tokens over `past`, heads all of one class."""

    columns: int
    past: int = 0
    window: int = KEEP_ALL

    @property
    def name(self) -> str:
        over = f" over {self.past}" if self.past else ""
        return f"prefill {self.columns}{over} " + ("global" if self.window == KEEP_ALL else f"64+{self.window}")


def decode_variants(case: Decode, shape: Shape) -> list:
    base = decode_kernel.choose_config(
        DEVICE, shape.dtype, shape.head_dim, shape.head_dim, shape.page_size, 1, shape.group, 1
    )
    one = {"overhead": (0, 1, 2, 3), "early": (True, False), "pdl": (False,), "tma": (False,), "stages": (2,)}
    found = [base, *(replace(base, **{name: value}) for name, values in one.items() for value in values)]
    found.append(replace(base, stages=2, programs=base.programs * 3 // 2))
    found.append(replace(base, stages=2 * base.stages, programs=base.programs // 2))
    return list(dict.fromkeys(found))


def prefill_variants(case: Prefill, shape: Shape) -> list:
    big = case.window == KEEP_ALL
    args = (DEVICE, shape.dtype, shape.head_dim, shape.head_dim, shape.page_size, case.columns)
    base = prefill_kernel.choose_config(*args, big)
    found = [base]
    for m, n, warps, stages in ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3)):
        found.append(replace(base, block_m=m, block_n=n, past_n=min(n, 64), warps=warps, stages=stages))
    return list(dict.fromkeys(found))


def decode_calls(case: Decode, shape: Shape, layers: list, config: object) -> list[Callable]:
    scale = shape.head_dim**-0.5
    return [partial(decode_kernel.decode, *x.decode_args, scale, exact_positions=False, config=config) for x in layers]


def decode_layers(case: Decode, shape: Shape, count: int | None = None) -> list:
    kept = min(case.context, case.sink + case.window)
    slots = case.batch * (case.num_global * case.context + (shape.kv_heads - case.num_global) * kept)
    count = count or layers_needed(slots * shape.head_dim * 2 * shape.dtype.itemsize)
    heads = (case.num_global, case.sink, case.window)
    return [make_layer(shape, case.batch, case.context, *heads, i) for i in range(count)]


def prefill_inputs(case: Prefill, shape: Shape) -> tuple:
    num_global = shape.kv_heads if case.window == KEEP_ALL else 0
    layer = make_layer(shape, 1, 0, num_global, 64, min(case.window, 1 << 20), 0, room=max(case.past, 1))
    kv = peers.dense_kv(shape, 1, case.past + case.columns, 0)
    q_heads = shape.kv_heads * shape.group
    q = torch.randn(1, case.columns, q_heads, shape.head_dim, device=DEVICE).to(shape.dtype).transpose(1, 2)
    layer.k_pages.zero_(), layer.v_pages.zero_()
    if case.past:
        from segpaged_attention import append

        old = (x[:, :, : case.past] for x in kv)
        append(*old, layer.k_pages, layer.v_pages, layer.block_table, layer.seq_lens, layer.sink, layer.window)
        layer.seq_lens.fill_(case.past)
    new = tuple(x[:, :, case.past :].transpose(1, 2).contiguous().transpose(1, 2) for x in kv)
    return layer, q, kv, new


def prefill_call(case: Prefill, shape: Shape, inputs: tuple, config: object) -> Callable:
    layer, q, _kv, new = inputs
    num_global = shape.kv_heads if case.window == KEEP_ALL else 0
    order = torch.arange(shape.kv_heads, dtype=torch.int32, device=DEVICE)
    return partial(
        prefill_kernel.prefill, q, *new, layer.k_pages, layer.v_pages, layer.block_table, layer.seq_lens, layer.sink,
        layer.window, layer.window, shape.head_dim**-0.5, head_order=order, num_global=num_global,
        past_len_hint=case.past, config=(config, config),
    )  # fmt: skip


def compile_one(case: Decode | Prefill, config: object, shape: Shape) -> str | None:
    """In a process of its own: runs a small problem that needs the same compiled kernels. Returns what went wrong."""
    try:
        if isinstance(case, Decode):
            small = replace(case, context=512)
            decode_calls(small, shape, decode_layers(small, shape, 1), config)[0]()
        else:
            small = replace(case, columns=256, past=min(case.past, 128), window=min(case.window, KEEP_ALL))
            prefill_call(small, shape, prefill_inputs(small, shape), config)()
        torch.cuda.synchronize()
    except Exception as error:  # does not fit, does not compile: the others may
        return f"{type(error).__name__} {str(error)[:100]}"
    return None


def time_decode(case: Decode, shape: Shape, variants: list, done: Callable) -> None:
    layers = decode_layers(case, shape)
    size = sum(x.kv_bytes for x in layers) / len(layers)
    for again in (False, True):
        for config in reversed(variants) if again else variants:
            try:
                calls = decode_calls(case, shape, layers, config)
                outs = [call() for call in calls]
                error = max(
                    check_decode(x, out, shape.head_dim**-0.5) for x, out in zip(layers[:4], outs[:4], strict=True)
                )
                done(case, config, measure(calls, 21), size, error)
            except (Exception, SystemExit) as failure:  # does not run, or is wrong
                print(f"  {config}: {type(failure).__name__} {str(failure)[:100]}", flush=True)


def time_prefill(case: Prefill, shape: Shape, variants: list, done: Callable) -> None:
    inputs = prefill_inputs(case, shape)
    layer, q, kv, _new = inputs
    dense = peers.sdpa("cudnn" if CUDA else "default", [q], [kv], True)[0] if case.past == 0 else None
    for again in (False, True):
        for config in reversed(variants) if again else variants:
            try:
                call = prefill_call(case, shape, inputs, config)
                scale = shape.head_dim**-0.5
                error = check_prefill(q, *kv, call(), case.past, layer.sink, layer.window, scale)
                done(case, config, measure([call] * 2, 7), 0, error)
            except (Exception, SystemExit) as failure:  # does not run, or is wrong
                print(f"  {config}: {type(failure).__name__} {str(failure)[:100]}", flush=True)
        if dense is not None and case.window == KEEP_ALL:
            done(case, "SDPA cudnn", measure([dense] * 2, 7), 0, 0.0)


CASES: dict[str, list] = {
    "decode": [
        Decode(1, 8 << 10),
        Decode(1, 128 << 10),
        Decode(8, 32 << 10),
        Decode(8, 32 << 10, window=4096),
        Decode(32, 32 << 10),
        Decode(8, 8 << 10, window=4096),
    ],
    "global": [Prefill(32 << 10), Prefill(8 << 10)],
    "local": [Prefill(32 << 10, window=256), Prefill(32 << 10, window=4096)],
    "chunk": [Prefill(4096, 28 << 10), Prefill(4096, 28 << 10, window=256)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tune.json")
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated choice")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tries out this script on a CPU
    args = parser.parse_args()
    if not CUDA and not args.tiny:
        parser.error("no CUDA device here; there is nothing to tune")
    args.out.mkdir(parents=True, exist_ok=True)
    begin, rows = time.time(), []
    shape = Shape(kv_heads=2, group=1, head_dim=16, page_size=16, dtype=torch.float32) if args.tiny else Shape()
    chosen = [case for name in args.only.split(",") for case in CASES[name]]
    if args.tiny:
        chosen = [Decode(1, 40, window=30), Prefill(20), Prefill(20, 10, 8)]
    variants = {
        case: (decode_variants if isinstance(case, Decode) else prefill_variants)(case, shape) for case in chosen
    }
    if args.tiny:
        variants = {case: configs[:3] for case, configs in variants.items()}
    if CUDA:
        # A compiled kernel does not depend on lengths, and on the batch only in whether it is more than 4 here.
        work = {
            (type(case).__name__, isinstance(case, Decode) and case.batch > 4, getattr(case, "past", 0) > 0,
             getattr(case, "window", 0) == KEEP_ALL, config): (case, config)
            for case, configs in variants.items() for config in configs
        }  # fmt: skip
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            failed = list(pool.map(compile_one, *zip(*work.values(), strict=True), [shape] * len(work)))
        for (case, config), reason in zip(work.values(), failed, strict=True):
            if reason:
                print(f"{case.name} {config}: {reason}")
        print(f"{len(work)} variants compiled, {time.time() - begin:.0f} s", flush=True)

    def done(case: Decode | Prefill, config: object, us: float, size: float, error: float) -> None:
        known = {"config": config} if isinstance(config, str) else asdict(config)
        rows.append({"case": case.name, "us": us, "bytes": size, "relative_error": error, **known})

    for case in chosen:
        (time_decode if isinstance(case, Decode) else time_prefill)(case, shape, variants[case], done)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        show(case, [row for row in rows if row["case"] == case.name], variants[case][0])
        (args.out / "tune.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{time.time() - begin:.0f} s", flush=True)


def show(case: Decode | Prefill, rows: list[dict], base: object) -> None:
    """The variants of one case by the mean of their two times, named by what differs from the present choice."""
    print(case.name, flush=True)
    times: dict[str, list[float]] = {}
    for row in rows:
        differs = {name: row[name] for name, value in asdict(base).items() if name in row and row[name] != value}
        times.setdefault(str(row.get("config", differs or "as chosen now")), []).append(row["us"])
    for name, us in sorted(times.items(), key=lambda pair: sum(pair[1]) / len(pair[1])):
        print(f"  {sum(us) / len(us):10.2f} us  +-{(max(us) - min(us)) / 2:7.2f}  {name}", flush=True)


if __name__ == "__main__":
    main()
