"""Decode, prefill and append against other means, against the device's floor, and against the bars of this project.

    python bench.py --out DIR [--quick] [--only decode,prefill,append]

Writes results.json, results.csv, bars.json (name, measured, target, unit, met) and a plot where there is matplotlib.
Every timed kernel is checked against float32 in the same run; a wrong result ends the run with an error. Times are what
`harness` says: microseconds per layer, CUDA graph, cold KV. A peer that fails is reported with its reason and left out.
`--tiny` tries the script itself out on small shapes, on the CPU in triton's interpreter or by the torch path.
"""

from __future__ import annotations

import argparse
import csv
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
)

# name: (global heads per layer, cycled; sink, window of the others)
PROFILES = {
    "1/8 global, 64+256": ((1,), 64, 256),
    "1/8 global, 64+4096": ((1,), 64, 4096),
    "all global": ((8,), 0, 256),
    "uneven layers, 64+256": ((0, 0, 1, 3), 64, 256),
}
MAIN = "1/8 global, 64+256"


class Report:
    """Rows of measurements; printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, kind: str, case: str, method: str, us: float | None, **more: object) -> None:
        self.rows.append({"kind": kind, "case": case, "method": method, "us": us, **more})
        extra = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in more.items()
        )
        print(f"{kind:8} {case:44} {method:28} {'-' if us is None else f'{us:12.2f}'} {extra}", flush=True)

    def peer(self, kind: str, case: str, method: str, make: Callable[[], peers.Calls], **more: object) -> None:
        try:
            self.add(kind, case, method, measure(make(), 7), **more)
        except Exception as error:  # another project's kernel: any failure means "not available here"
            self.add(
                kind,
                case,
                method,
                None,
                error=f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
            )
        free()

    def us(self, kind: str, case: str, method: str) -> float | None:
        return next((r["us"] for r in self.rows if (r["kind"], r["case"], r["method"]) == (kind, case, method)), None)


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def memory_left() -> int:
    return torch.cuda.mem_get_info()[0] if CUDA else 1 << 32


def bench_decode(report: Report, shape: Shape, quick: bool, tiny: bool, read: float) -> None:
    scale = shape.head_dim**-0.5
    sizes = [(b, n << 10) for b in (1, 8, 32) for n in (8, 32, 128)]
    if quick:
        sizes = [(1, 8 << 10), (1, 32 << 10), (1, 128 << 10), (8, 32 << 10), (32, 32 << 10)]
    if tiny:
        sizes = [(2, 200)]
    for batch, context in sizes:
        at = f"B{batch} {context >> 10}K"
        for name, (global_heads, sink, window) in PROFILES.items():
            kept = min(context, sink + window)
            most = max(global_heads) * context + (shape.kv_heads - max(global_heads)) * kept
            layer_bytes = batch * most * shape.head_dim * 2 * shape.dtype.itemsize
            count = max(layers_needed(layer_bytes), len(global_heads))
            if (count + 1) * layer_bytes > 0.8 * memory_left():
                report.add("decode", f"{at} {name}", "segpaged", None, error="does not fit this device's memory")
                continue
            count = -(-count // len(global_heads)) * len(global_heads)
            layers = [
                make_layer(shape, batch, context, global_heads[i % len(global_heads)], sink, window, i)
                for i in range(count)
            ]
            error = max(
                check_decode(layer, sp.decode(*layer.decode_args, scale, exact_positions=False), scale)
                for layer in layers[: len(global_heads)]
            )
            calls = [lambda x=layer: sp.decode(*x.decode_args, scale, exact_positions=False) for layer in layers]
            us = measure(calls)
            size = sum(layer.kv_bytes for layer in layers) / count
            report.add(
                "decode", f"{at} {name}", "segpaged", us, bytes=size, gb_s=size / us / 1e3, floor_us=size / read / 1e3,
                relative_error=error, items=batch * shape.kv_heads,
            )  # fmt: skip
            if name == MAIN and not tiny:
                report.peer(
                    "decode", f"{at} {name}", "flashinfer per head", partial(peers.flashinfer_decode, layers, scale)
                )
            del layers, calls
            free()
        dense_bytes = batch * shape.kv_heads * context * shape.head_dim * 2 * shape.dtype.itemsize
        count = layers_needed(dense_bytes)
        if (count + 1) * dense_bytes > 0.8 * memory_left():
            report.add(
                "decode", f"{at} {MAIN}", "SDPA cudnn, full context", None, error="does not fit this device's memory"
            )
            continue
        kv = [peers.dense_kv(shape, batch, context, i) for i in range(count)]
        q = [
            torch.randn(batch, shape.kv_heads * shape.group, 1, shape.head_dim, device=DEVICE).to(shape.dtype)
            for _ in kv
        ]
        heads = heads_of(1, 64, 256, shape)
        for method in ("cudnn", "flash") if CUDA else ("default",):
            report.peer(
                "decode", f"{at} {MAIN}", f"SDPA {method}, full context", partial(peers.sdpa, method, q, kv, False)
            )
        report.peer(
            "decode", f"{at} {MAIN}", "SDPA, mask per head", partial(peers.sdpa_masked, q, kv, context - 1, *heads)
        )
        del kv, q
        free()


def bench_prefill(report: Report, shape: Shape, quick: bool, tiny: bool) -> None:
    """B = 1: whole prompts, then 512 new tokens over 31.5K."""
    cases = [(0, 8 << 10), (0, 32 << 10), (0, 128 << 10), (32256, 512), (28 << 10, 4096)]
    if quick:
        cases = [(0, 8 << 10), (0, 32 << 10), (0, 128 << 10), (32256, 512)]
    if tiny:
        cases = [(0, 90), (100, 40)]
    scale = shape.head_dim**-0.5
    for past, columns in cases:
        at = f"{columns} over {past}" if past else f"{columns >> 10}K"
        total, hq = past + columns, shape.kv_heads * shape.group
        kv = [peers.dense_kv(shape, 1, total, i) for i in range(2)]
        q = [torch.randn(1, columns, hq, shape.head_dim, device=DEVICE).to(shape.dtype).transpose(1, 2) for _ in kv]
        flops = 4 * hq * shape.head_dim * (columns * past + columns * (columns + 1) / 2)
        for name, (global_heads, sink, window) in PROFILES.items():
            if len(global_heads) > 1 or (
                quick and past == 0 and columns > 32 << 10 and name not in (MAIN, "all global")
            ):
                continue
            num_global, calls, worst = global_heads[0], [], 0.0
            for i, (k, v) in enumerate(kv):
                layer = make_layer(shape, 1, 0, num_global, sink, window, i, room=max(past, 1))
                layer.k_pages.zero_()
                layer.v_pages.zero_()
                if past:
                    old = (k[:, :, :past], v[:, :, :past], layer.k_pages, layer.v_pages, layer.block_table)
                    sp.append(*old, layer.seq_lens, layer.sink, layer.window)
                # chunks as a model hands them over: [B, T, H, D] seen as [B, H, T, D]
                new = [x[:, :, past:].transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
                order = torch.argsort((layer.window < KEEP_ALL).int(), stable=True).int()

                call = partial(
                    sp.prefill, q[i], *new, layer.k_pages, layer.v_pages, layer.block_table, layer.seq_lens, layer.sink,
                    layer.window, layer.window, scale, head_order=order, num_global=num_global, past_len_hint=past,
                )  # fmt: skip
                layer.seq_lens.fill_(past)
                worst = max(worst, check_prefill(q[i], k, v, call(), past, layer.sink, layer.window, scale))
                calls.append(call)
            us = measure(calls, 9)
            seen = flops if num_global == shape.kv_heads else None
            more = {} if seen is None else {"tflop_s": seen / us / 1e6}
            report.add("prefill", f"{at} {name}", "segpaged", us, relative_error=worst, **more)
            del calls, layer, new, call
            free()
        case = f"{at} {MAIN}"
        if past:
            report.peer("prefill", case, "SDPA causal_lower_right", partial(peers.sdpa_lower_right, q, kv))
        else:
            for method in ("cudnn", "flash") if CUDA else ("default",):
                report.peer(
                    "prefill",
                    case,
                    f"SDPA {method}, full",
                    partial(peers.sdpa, method, q, kv, True),
                    tflops=flops / 1e12,
                )
        heads = heads_of(1, 64, 256, shape)
        if total * columns * hq <= 1 << 32:
            report.peer("prefill", case, "SDPA, mask per head", partial(peers.sdpa_masked, q, kv, past, *heads))
        if CUDA and past == 0 and columns == 32 << 10 and not quick:
            report.peer("prefill", case, "flex_attention, mask per head", partial(peers.flex, q, kv, *heads))
        del kv, q
        free()


def bench_append(report: Report, shape: Shape, tiny: bool) -> None:
    for batch, columns in ((1, 1), (8, 1), (32, 1), (1, 4096)) if not tiny else ((2, 1), (1, 70)):
        layers = [make_layer(shape, batch, 1000, 1, 64, 256, i, room=columns) for i in range(2 if tiny else 32)]
        new = [
            torch.randn(2, batch, columns, shape.kv_heads, shape.head_dim, device=DEVICE).to(shape.dtype)
            for _ in layers
        ]
        calls = []
        for layer, (k, v) in zip(layers, new, strict=True):
            args = (layer.k_pages, layer.v_pages, layer.block_table, layer.seq_lens, layer.sink, layer.window)
            calls.append(partial(sp.append, k.transpose(1, 2), v.transpose(1, 2), *args))
            want = [layer.k_pages.clone(), layer.v_pages.clone()]
            sp.reference.append(k.transpose(1, 2), v.transpose(1, 2), *want, *args[2:])
            calls[-1]()
            if not (torch.equal(want[0], layer.k_pages) and torch.equal(want[1], layer.v_pages)):
                raise SystemExit("append: pages differ from the reference's: wrong results")
        report.add("append", f"B{batch} T{columns}", "segpaged", measure(calls))
        del layers, new, calls, want, args
        free()


def bars(report: Report, limits: dict[str, float]) -> list[dict]:
    """What the project asks of these kernels, and what was measured. Bars whose cases did not run are left out.

    Bandwidth is that of a pure read, which is what decode does and the highest there is: a copy inside a CUDA graph is a
    memcpy node and was measured at little more than half of it.
    """
    found = []

    def bar(name: str, measured: float | None, target: float, unit: str, at_least: bool) -> None:
        if measured is not None:
            met = measured >= target if at_least else measured <= target
            found.append(
                {"name": name, "measured": round(measured, 3), "target": round(target, 3), "unit": unit, "met": met}
            )

    for row in report.rows:
        if row["kind"] != "decode" or row["method"] != "segpaged" or row["us"] is None:
            continue
        fixed = 10.0 if row["items"] >= 256 else 8.0
        bar(f"decode {row['case']}", row["us"], fixed + row["bytes"] / limits["read"] / 1e3, "us per layer", False)
        if row["bytes"] >= 500e6:
            bar(f"decode {row['case']}, share of read bandwidth", row["gb_s"] / limits["read"], 0.95, "ratio", True)
    for tokens, share, factor in (("8K", 0.85, None), ("32K", 0.95, 5.5), ("128K", 0.95, 7.3)):
        dense = report.us("prefill", f"{tokens} {MAIN}", "SDPA cudnn, full")
        whole = report.us("prefill", f"{tokens} all global", "segpaged")
        ours = report.us("prefill", f"{tokens} {MAIN}", "segpaged")
        if dense and whole:
            bar(f"prefill {tokens}, all global, speed against cuDNN", dense / whole, share, "ratio", True)
        if dense and ours and factor:
            bar(f"prefill {tokens}, 1/8 global, speed against cuDNN dense", dense / ours, factor, "ratio", True)
    chunk = "512 over 32256"
    ours = report.us("prefill", f"{chunk} {MAIN}", "segpaged")
    methods = ((f"{chunk} all global", "segpaged"), (f"{chunk} {MAIN}", "SDPA causal_lower_right"))
    dense = [us for case, method in methods if (us := report.us("prefill", case, method)) is not None]
    if ours and dense:
        bar("512 new tokens over 31.5K, time against the best dense", ours / min(dense), 0.5, "ratio", False)
    for row in report.rows:
        if row["kind"] == "append" and row["case"].endswith(" T1"):
            bar(f"append {row['case']}", row["us"], 2.5, "us per layer", False)
    return found


def plot(report: Report, path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    kinds = [
        kind for kind in ("decode", "prefill", "append") if any(r["kind"] == kind and r["us"] for r in report.rows)
    ]
    figure, axes = plt.subplots(1, len(kinds), figsize=(8 * len(kinds), 12), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        rows = [r for r in report.rows if r["kind"] == kind and r["us"]][::-1]
        colors = ["tab:blue" if r["method"] == "segpaged" else "tab:gray" for r in rows]
        axis.barh(range(len(rows)), [r["us"] for r in rows], color=colors)
        axis.set_yticks(range(len(rows)), [f"{r['case']} | {r['method']}" for r in rows], fontsize=6)
        axis.set_xscale("log")
        axis.set_xlabel("microseconds per layer")
        axis.set_title(kind)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, about two minutes")
    parser.add_argument("--only", default="decode,prefill,append", help="comma-separated choice of the three")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not CUDA and not args.tiny:
        parser.error("no CUDA device here; this benchmark measures one")
    chosen = args.only.split(",")
    unknown = set(chosen) - {"decode", "prefill", "append"}
    if unknown:
        parser.error(f"--only names {', '.join(sorted(unknown))}; it takes decode, prefill and append")
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    torch.manual_seed(0)
    limits = harness.bandwidth()
    shape = Shape(head_dim=64, page_size=16, dtype=torch.float32) if args.tiny else Shape()
    report = Report()
    if "append" in chosen:
        bench_append(report, shape, args.tiny)
    if "decode" in chosen:
        bench_decode(report, shape, args.quick, args.tiny, limits["read"])
    if "prefill" in chosen:
        bench_prefill(report, shape, args.quick, args.tiny)
    judged = bars(report, limits)
    about = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if CUDA else None,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"bench.py {'--quick ' if args.quick else ''}--only {args.only}",
        "kernels": sp.is_available(DEVICE),
        "copy_gb_s": round(limits["copy"], 1),
        "read_gb_s": round(limits["read"], 1),
        "seconds": round(time.time() - begin, 1),
        "bars_set_for": "NVIDIA H200",
    }
    (args.out / "results.json").write_text(json.dumps({"about": about, "rows": report.rows}, indent=1) + "\n")
    (args.out / "bars.json").write_text(json.dumps(judged, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in report.rows for name in row))
    with open(args.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(report.rows)
    plot(report, args.out / "results.png")
    print(json.dumps(about))
    for one in judged:
        verdict = "met   " if one["met"] else "MISSED"
        print(f"{verdict} {one['name']}: {one['measured']} (target {one['target']} {one['unit']})")
    print(f"{sum(one['met'] for one in judged)} of {len(judged)} bars met; results in {args.out}")


if __name__ == "__main__":
    main()
