"""Decode, prefill and append against other means, against the device's floor, and against the bars of this project.

    python bench.py --out DIR [--quick] [--only decode,prefill,append] [--resume] [--max-seconds 360]

Rows go to DIR/rows.jsonl as they come; at the end DIR has results.json, results.csv, bars.json (name, measured, target,
unit, met) and a plot where there is matplotlib. `--only` also gives the order. Rows of kinds that a run does not measure
are kept, so parts can be run one at a time, and `--resume` goes on with what a run that was cut off left.

Every timed kernel is checked against float32 in the same run; a wrong result ends the run with an error. Times are what
`harness` says: microseconds per layer, CUDA graph, cold KV; prefill's methods take turns of a few replays. A peer that
fails is reported with its reason and left out. `--tiny` tries the script itself out on small shapes, on the CPU in
triton's interpreter or by the torch path.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import peers
import segpaged_attention as sp
import torch
from harness import (
    CUDA,
    DEVICE,
    KEEP_ALL,
    Shape,
    check_decode,
    check_prefill,
    heads_of,
    layers_needed,
    make_layer,
    measure,
    measure_together,
)
from report import MAIN, Report, bars

# name: (global heads per layer, cycled; sink, window of the others)
PROFILES = {
    MAIN: ((1,), 64, 256),
    "1/8 global, 64+4096": ((1,), 64, 4096),
    "all global": ((8,), 0, 256),
    "uneven layers, 64+256": ((0, 0, 1, 3), 64, 256),
}
NO_ROOM = "does not fit this device's memory"


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def memory_left() -> int:
    return torch.cuda.mem_get_info()[0] if CUDA else 1 << 32


def reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


class Bench:
    """The measurements, one method per kind."""

    def __init__(self, report: Report, shape: Shape, quick: bool, tiny: bool, deadline: float) -> None:
        self.report, self.shape, self.quick, self.tiny, self.deadline = report, shape, quick, tiny, deadline
        self.scale = shape.head_dim**-0.5

    def late(self, what: str) -> bool:
        """Whether the time is up: what is left out is said, and `--resume` takes it up."""
        if time.time() < self.deadline:
            return False
        print(f"time is up: {what} is left for --resume", flush=True)
        return True

    def peer(self, kind: str, case: str, method: str, make: Callable[[], peers.Calls]) -> None:
        if self.report.has(kind, case, method):
            return
        try:
            self.report.add(kind, case, method, measure(make(), 7))
        except Exception as error:  # another project's kernel: any failure means "not available here"
            self.report.add(kind, case, method, None, error=reason(error))
        free()

    # ----------------------------------------------------------------------------------------------------- decode

    def decode(self, limits: dict[str, float]) -> None:
        sizes = [(1, 8), (1, 32), (1, 128), (8, 32), (32, 32)]
        if not self.quick:
            sizes += [(8, 8), (8, 128), (32, 8), (32, 128)]
        for batch, context in [(2, 200)] if self.tiny else [(b, n << 10) for b, n in sizes]:
            if self.late(f"decode from B{batch} {context >> 10}K on"):
                return
            for name in PROFILES:
                self.decode_profile(batch, context, name, limits)
            self.decode_dense(batch, context)

    def decode_profile(self, batch: int, context: int, name: str, limits: dict[str, float]) -> None:
        case, shape = f"B{batch} {context >> 10}K {name}", self.shape
        if self.report.has("decode", case, "segpaged"):
            return
        global_heads, sink, window = PROFILES[name]
        kept = min(context, sink + window)
        most = max(global_heads) * context + (shape.kv_heads - max(global_heads)) * kept
        layer_bytes = batch * most * shape.head_dim * 2 * shape.dtype.itemsize
        count = max(layers_needed(layer_bytes), len(global_heads))
        if (count + 1) * layer_bytes > 0.8 * memory_left():
            return self.report.add("decode", case, "segpaged", None, error=NO_ROOM)
        count = -(-count // len(global_heads)) * len(global_heads)
        cycle = [global_heads[i % len(global_heads)] for i in range(count)]
        layers = [make_layer(shape, batch, context, heads, sink, window, i) for i, heads in enumerate(cycle)]
        calls = [partial(sp.decode, *x.decode_args, self.scale, exact_positions=False) for x in layers]
        outs = [call() for call in calls]  # one right after another, as in the graph
        checked = list(zip(layers, outs, strict=True))[: max(2, len(global_heads))]
        error = max(check_decode(layer, out, self.scale) for layer, out in checked)
        del outs, checked
        us = measure(calls)
        size = sum(layer.kv_bytes for layer in layers) / count
        rate = size / us / 1e3
        self.report.add(
            "decode", case, "segpaged", us, bytes=size, gb_s=rate, of_copy=rate / limits["copy"],
            of_read=rate / limits["read"], floor_us=size / limits["read"] / 1e3, relative_error=error,
            items=batch * shape.kv_heads,
        )  # fmt: skip
        if name == MAIN and not self.tiny:
            self.peer("decode", case, "flashinfer per head", partial(peers.flashinfer_decode, layers, self.scale))
        del layers, calls
        free()

    def decode_dense(self, batch: int, context: int) -> None:
        """What other means do with the full context: no head evicts."""
        case, shape = f"B{batch} {context >> 10}K {MAIN}", self.shape
        backends = ("cudnn", "flash") if CUDA else ("default",)
        masked = "SDPA, mask per head"
        names = [f"SDPA {backend}, full context" for backend in backends]
        if all(self.report.has("decode", case, method) for method in [*names, masked]):
            return
        dense_bytes = batch * shape.kv_heads * context * shape.head_dim * 2 * shape.dtype.itemsize
        count = layers_needed(dense_bytes)
        if (count + 1) * dense_bytes > 0.8 * memory_left():
            return self.report.add("decode", case, names[0], None, error=NO_ROOM)
        kv = [peers.dense_kv(shape, batch, context, i) for i in range(count)]
        size = (batch, shape.kv_heads * shape.group, 1, shape.head_dim)
        q = [torch.randn(size, device=DEVICE).to(shape.dtype) for _ in kv]
        for backend, name in zip(backends, names, strict=True):
            self.peer("decode", case, name, partial(peers.sdpa, backend, q, kv, False))
        self.peer("decode", case, masked, partial(peers.sdpa_masked, q, kv, context - 1, *heads_of(1, 64, 256, shape)))
        del kv, q
        free()

    # ---------------------------------------------------------------------------------------------------- prefill

    def prefill(self) -> None:
        """B = 1: whole prompts, then new tokens over what is stored."""
        cases = [(0, 32 << 10), (0, 8 << 10), (32256, 512), (0, 128 << 10)]
        if not self.quick:
            cases += [(28 << 10, 4096)]
        for past, columns in [(0, 90), (100, 40)] if self.tiny else cases:
            at = f"{columns} over {past}" if past else f"{columns >> 10}K"
            if self.late(f"prefill from {at} on"):
                return
            if not self.report.has("prefill", f"{at} {MAIN}", "segpaged"):
                self.prefill_case(past, columns, at)

    def prefill_case(self, past: int, columns: int, at: str) -> None:
        shape, total, hq = self.shape, past + columns, self.shape.kv_heads * self.shape.group
        kv = [peers.dense_kv(shape, 1, total, i) for i in range(2)]
        q = [torch.randn(1, columns, hq, shape.head_dim, device=DEVICE).to(shape.dtype).transpose(1, 2) for _ in kv]
        flops = 4 * hq * shape.head_dim * (columns * past + columns * (columns + 1) / 2)
        case = f"{at} {MAIN}"
        methods: dict[tuple[str, str], list[Callable[[], object]]] = {}
        facts: dict[tuple[str, str], dict[str, float]] = {}
        for name, (global_heads, sink, window) in PROFILES.items():
            if len(global_heads) > 1 or (self.quick and total > 100_000 and name == "1/8 global, 64+4096"):
                continue
            found = [self.ours(q[i], *kv[i], past, global_heads[0], sink, window, i) for i in range(len(kv))]
            key = (f"{at} {name}", "segpaged")
            methods[key], facts[key] = [call for call, _ in found], {"relative_error": max(e for _, e in found)}
            if global_heads[0] == shape.kv_heads:
                facts[key]["flop"] = flops
        others: dict[str, Callable[[], peers.Calls]] = {}
        if past:
            others["SDPA causal_lower_right"] = partial(peers.sdpa_lower_right, q, kv)
        else:
            for backend in ("cudnn", "flash") if CUDA else ("default",):
                others[f"SDPA {backend}, full"] = partial(peers.sdpa, backend, q, kv, True)
        heads = heads_of(1, 64, 256, shape)
        if total * columns * hq <= 1 << 32:
            others["SDPA, mask per head"] = partial(peers.sdpa_masked, q, kv, past, *heads)
        if CUDA and columns == 32 << 10 and not self.quick:
            others["flex_attention, mask per head"] = partial(peers.flex, q, kv, *heads)
        for method, make in others.items():
            try:
                calls = make()
                calls[0]()
                methods[case, method] = calls
                facts[case, method] = {"flop": flops} if "full" in method else {}
            except Exception as error:  # another project's kernel: any failure means "not available here"
                self.report.add("prefill", case, method, None, error=reason(error))
        us = measure_together({"\n".join(key): calls for key, calls in methods.items()}, 11)
        # the package's own main row comes last: where it is, the case is complete
        for key in sorted(methods, key=lambda key: key == (case, "segpaged")):
            time_us, more = us["\n".join(key)], facts[key]
            flop = more.pop("flop", None)
            rate = {} if flop is None else {"tflop_s": flop / time_us / 1e6}
            self.report.add("prefill", *key, time_us, **more, **rate)
        del kv, q, methods, others, calls
        free()

    def ours(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int, num_global: int, sink: int, window: int,
        seed: int,
    ) -> tuple[Callable[[], object], float]:  # fmt: skip
        """A call of `prefill` on columns [past, ...) of k and v, and its error."""
        layer = make_layer(self.shape, 1, 0, num_global, sink, window, seed, room=max(past, 1))
        layer.k_pages.zero_()
        layer.v_pages.zero_()
        if past:
            old = (k[:, :, :past], v[:, :, :past], layer.k_pages, layer.v_pages, layer.block_table)
            sp.append(*old, layer.seq_lens, layer.sink, layer.window)
            layer.seq_lens.fill_(past)
        # chunks as a model hands them over: [B, T, H, D] seen as [B, H, T, D]
        new = [x[:, :, past:].transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
        order = torch.argsort((layer.window < KEEP_ALL).int(), stable=True).int()
        call = partial(
            sp.prefill, q, *new, layer.k_pages, layer.v_pages, layer.block_table, layer.seq_lens, layer.sink,
            layer.window, layer.window, self.scale, head_order=order, num_global=num_global, past_len_hint=past,
        )  # fmt: skip
        return call, check_prefill(q, k, v, call(), past, layer.sink, layer.window, self.scale)

    # ----------------------------------------------------------------------------------------------------- append

    def append(self) -> None:
        shape = self.shape
        for batch, columns in ((2, 1), (1, 70)) if self.tiny else ((1, 1), (8, 1), (32, 1), (1, 4096)):
            case = f"B{batch} T{columns}"
            if self.report.has("append", case, "segpaged"):
                continue
            layers = [
                make_layer(shape, batch, 1000, 1, 64, 256, i, room=columns) for i in range(2 if self.tiny else 32)
            ]
            size = (2, batch, columns, shape.kv_heads, shape.head_dim)
            calls = []
            for layer in layers:
                k, v = (x.transpose(1, 2) for x in torch.randn(size, device=DEVICE).to(shape.dtype))
                args = (layer.k_pages, layer.v_pages, layer.block_table, layer.seq_lens, layer.sink, layer.window)
                calls.append(partial(sp.append, k, v, *args))
                want = [layer.k_pages.clone(), layer.v_pages.clone()]
                sp.reference.append(k, v, *want, *args[2:])
                calls[-1]()
                if not (torch.equal(want[0], layer.k_pages) and torch.equal(want[1], layer.v_pages)):
                    raise SystemExit("append: pages differ from the reference's: wrong results")
            self.report.add("append", case, "segpaged", measure(calls))
            del layers, calls, want, args
            free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, about a minute")
    parser.add_argument("--only", default="append,decode,prefill", help="comma-separated choice and order of the three")
    parser.add_argument("--resume", action="store_true", help="keep what is in the folder, measure what is missing")
    parser.add_argument("--max-seconds", type=float, default=360, help="start no further case after this time")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not CUDA and not args.tiny:
        parser.error("no CUDA device here; this benchmark measures one")
    kinds = args.only.split(",")
    if unknown := set(kinds) - {"decode", "prefill", "append"}:
        parser.error(f"--only names {', '.join(sorted(unknown))}; it takes decode, prefill and append")
    begin = time.time()
    torch.manual_seed(0)
    report = Report(args.out, args.resume, kinds)
    limits = harness.bandwidth()
    print(" ".join(f"{name}={rate:.0f}" for name, rate in limits.items()), "GB/s", flush=True)
    shape = Shape(head_dim=64, page_size=16, dtype=torch.float32) if args.tiny else Shape()
    bench = Bench(report, shape, args.quick, args.tiny, begin + args.max_seconds)
    runs = {"append": bench.append, "decode": partial(bench.decode, limits), "prefill": bench.prefill}

    def finish() -> list[dict]:
        judged = bars(report, limits)
        about = {
            "device": torch.cuda.get_device_name() if CUDA else platform.processor() or "cpu",
            "torch": torch.__version__,
            "triton": __import__("triton").__version__ if CUDA else None,
            "date": time.strftime("%Y-%m-%d"),
            "command": f"bench.py {'--quick ' if args.quick else ''}--only {args.only}",
            "kernels": sp.is_available(DEVICE),
            "gb_s": {name: round(rate, 1) for name, rate in limits.items()},
            "seconds": round(time.time() - begin, 1),
            "bars_set_for": "NVIDIA H200",
        }
        report.write(about, judged)
        print(json.dumps(about))
        return judged

    for kind in kinds:
        runs[kind]()
        judged = finish()
    for one in judged:
        verdict = "met   " if one["met"] else "MISSED"
        by_read = f"; by read bandwidth {one['by_read']}" if "by_read" in one else ""
        print(f"{verdict} {one['name']}: {one['measured']} (target {one['target']} {one['unit']}{by_read})")
    print(f"{sum(one['met'] for one in judged)} of {len(judged)} bars met; results in {args.out}")


if __name__ == "__main__":
    main()
