"""Timing, random layers and checks for the benchmarks. Knows no peer and no bar.

Times are microseconds per layer: a CUDA graph that runs the call on several layers with different KV (so that nothing is
left in L2 from the replay before), the median over replays, divided by the number of calls. Starting a graph takes some
10 us. A model's step has tens of layers in one graph, so a graph here goes over its layers again until it has 32 calls
or takes 4 ms; two or three large layers alone would carry 3 to 5 us of that start each.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))

KEEP_ALL = 1 << 30
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GRAPH_CALLS = 32  # in a graph, if they take less than
GRAPH_US = 4000.0
WARM_US = 30_000.0  # of a method before it is timed
COLD_BYTES = 400 << 20  # what the layers of one measurement hold together at least; several times any L2


def measure(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Microseconds per call. On the CPU, where the scripts are only tried out, one plain run."""
    return measure_together({"": calls}, replays)[""]


def measure_together(methods: dict[str, list[Callable[[], object]]], replays: int = 15) -> dict[str, float]:
    """The same for several methods whose times are to be compared: they take turns, three each.

    A device slows down for all of them alike when it grows warm or its clock drifts. A turn is several replays of one
    method, and those of its first 30 ms do not count: they run at the clock that the method before has left behind, which
    at the power limit of a GPU makes 5 % and more. Each method gets about `replays` replays, or fewer once they have taken
    two seconds.
    """
    if not CUDA:
        result = {}
        for name, calls in methods.items():
            begin = time.perf_counter()
            for call in calls:
                call()
            result[name] = (time.perf_counter() - begin) * 1e6 / len(calls)
        return result
    graphs = {name: _graph(calls) for name, calls in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    turns = 1 if len(methods) == 1 else 3
    for _ in range(turns):
        for name, (graph, count) in graphs.items():
            warm = 0.0
            while warm < WARM_US:
                warm += _replay_us(graph)
            for i in range(-(-replays // turns)):
                if i and sum(times[name]) * count > 2e6:
                    break
                times[name].append(_replay_us(graph) / count)
    return {name: statistics.median(found) for name, found in times.items()}


def _graph(calls: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls, over and over where they are few and short, and how many it has."""
    graph = _capture(calls)
    _replay_us(graph)
    again = min(-(-GRAPH_CALLS // len(calls)), -(-GRAPH_US // _replay_us(graph)))
    if again > 1:
        graph = _capture(calls * int(again))
    return graph, len(calls) * int(again)


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, plans and allocates
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def bandwidth(gigabytes: float = 4.0) -> dict[str, float]:
    """GB/s of this device: `copy`, bytes read plus bytes written, and `read`, a pure read; each the best of a few ways.

    Copies are kernels. A `copy_` inside a CUDA graph becomes a memcpy node, which was measured at little more than half
    of what a kernel reaches; it is reported as `copy_node` and judges nothing.
    """
    n = int(gigabytes * 1e9) // 2 if CUDA else 1 << 16
    source = torch.randn(n, dtype=torch.bfloat16, device=DEVICE)
    target = torch.zeros_like(source)
    ways = {"copy_add": partial(torch.add, source, 0, out=target), **_copiers(source, target)}
    copies = {name: 4 * n / measure([call]) / 1e3 for name, call in ways.items()}
    if CUDA and not torch.equal(source, target):
        raise SystemExit("the copy kernel does not copy")
    copies["copy_node"] = 4 * n / measure([partial(target.copy_, source)]) / 1e3
    del target, ways
    reads = {name: 2 * n / measure([call]) / 1e3 for name, call in _readers(source).items()}
    best_copy = max(rate for name, rate in copies.items() if name != "copy_node")
    return {"copy": best_copy, "read": max(reads.values()), **copies, **reads}


def _copiers(source: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
    if not CUDA:
        return {}
    import triton
    from bandwidth_kernels import copy_kernel

    def copier(block: int) -> Callable[[], object]:
        grid = (triton.cdiv(source.numel(), block),)
        return lambda: copy_kernel[grid](source, target, source.numel(), BLOCK=block, num_warps=8)

    return {f"copy_kernel_{block}": copier(block) for block in (4096, 16384)}


def _readers(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    if not CUDA:
        return {"read_sum": x.sum}
    import triton
    from bandwidth_kernels import read_kernel

    def reader(block: int, repeat: int) -> Callable[[], object]:
        programs = triton.cdiv(x.numel(), block * repeat)
        out = torch.empty(programs, dtype=torch.float32, device=x.device)
        return lambda: read_kernel[(programs,)](x, out, x.numel(), BLOCK=block, REPEAT=repeat, num_warps=8)

    return {f"read_kernel_{block}": reader(block, repeat) for block, repeat in ((4096, 8), (8192, 8))}


@dataclass
class Layer:
    """One layer's pages, and queries for them."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    sink: torch.Tensor
    window: torch.Tensor
    slots: torch.Tensor  # [B, Hkv] used

    @property
    def decode_args(self) -> tuple[torch.Tensor, ...]:
        return (
            self.q, self.k_pages, self.v_pages, self.block_table, self.seq_lens, self.sink, self.window, self.window,
        )  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one decode step reads."""
        return int(self.slots.sum()) * self.q.shape[-1] * 2 * self.q.element_size()


@dataclass
class Shape:
    """Of every layer here: Llama-3.1-8B's, unless tried out on a CPU."""

    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16


def heads_of(
    num_global: int, sink: int, window: int, shape: Shape, layer: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and windows [Hkv]; which heads are global changes from layer to layer."""
    s = torch.full((shape.kv_heads,), sink, dtype=torch.int32)
    w = torch.full((shape.kv_heads,), window, dtype=torch.int32)
    for i in range(num_global):
        h = (3 * i + layer) % shape.kv_heads
        s[h], w[h] = 0, KEEP_ALL
    return s.to(DEVICE), w.to(DEVICE)


def make_layer(
    shape: Shape,
    batch: int,
    stored: int,
    num_global: int,
    sink: int,
    window: int,
    layer: int,
    rows: int = 1,
    room: int = 0,
) -> Layer:
    """Random pages in random order for `stored` tokens in every row, with room for `room` more."""
    gen = torch.Generator(device=DEVICE).manual_seed(layer)
    sinks, windows = heads_of(num_global, sink, window, shape, layer)
    kept = (sinks.long() + windows.long()).expand(batch, -1)
    slots = kept.clamp_max(stored)
    pages = -(-kept.clamp_max(stored + room) // shape.page_size)
    total = int(pages.sum()) + 1
    table = torch.zeros(batch, shape.kv_heads, int(pages.max()), dtype=torch.int32, device=DEVICE)
    order = torch.randperm(total - 1, device=DEVICE, generator=gen).to(torch.int32) + 1
    table[torch.arange(table.shape[2], device=DEVICE) < pages[:, :, None]] = order
    k, v = (
        torch.empty(total, shape.page_size, shape.head_dim, dtype=shape.dtype, device=DEVICE).normal_(generator=gen)
        for _ in range(2)
    )
    q = torch.randn(batch, rows, shape.kv_heads * shape.group, shape.head_dim, device=DEVICE, generator=gen)
    lens = torch.full((batch,), stored, dtype=torch.int32, device=DEVICE)
    return Layer((2 * q).to(shape.dtype).transpose(1, 2), k, v, table, lens, sinks, windows, slots)


def layers_needed(bytes_per_layer: int) -> int:
    """Layers until nothing is left in L2, at most 32; two even of the largest."""
    return 2 if not CUDA else max(2, min(32, COLD_BYTES // max(bytes_per_layer, 1) + 1))


def check_decode(layer: Layer, out: torch.Tensor, scale: float, items: int = 24) -> float:
    """Relative error of some (sequence, head) items against float32 over their own slots. Ends the run above 1 %."""
    batch, kv_heads = layer.slots.shape
    group = layer.q.shape[1] // kv_heads
    worst = 0.0
    step = max(1, batch * kv_heads // items)
    for item in range(0, batch * kv_heads, step):
        b, h = divmod(item, kv_heads)
        n = int(layer.slots[b, h])
        page = layer.block_table[b, h, : -(-n // layer.k_pages.shape[1])].long()
        k, v = (x[page].flatten(0, 1)[:n].float() for x in (layer.k_pages, layer.v_pages))
        own = slice(h * group, (h + 1) * group)
        want = torch.softmax(layer.q[b, own, 0].float() @ k.T * scale, -1) @ v
        worst = max(worst, _relative(out[b, 0, own], want))
    return _fail_above(worst, "decode")


def check_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, first: int, sink: torch.Tensor,
    window: torch.Tensor, scale: float,
) -> float:  # fmt: skip
    """The same for rows of a chunk that starts at position `first`; k, v ``[B, Hkv, first + T, D]`` by position."""
    kv_heads, total = k.shape[1:3]
    group, columns = q.shape[1] // kv_heads, q.shape[2]
    rows = torch.linspace(0, columns - 1, min(columns, 32), device=q.device).long()
    j = torch.arange(total, device=q.device)
    worst = 0.0
    for h in range(kv_heads):
        p = (first + rows)[:, None]
        seen = (j <= p) & ((j < sink[h]) | (j > p - window[h]))
        for head in (h * group, (h + 1) * group - 1):
            score = (q[0, head, rows].float() @ k[0, h].float().T * scale).masked_fill(~seen, float("-inf"))
            worst = max(worst, _relative(out[0, rows, head], torch.softmax(score, -1) @ v[0, h].float()))
    return _fail_above(worst, "prefill")


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    error = ((got.float() - want).norm() / want.norm()).item()
    return error if error == error else float("inf")  # nan would be lost in a maximum


def _fail_above(error: float, what: str, bound: float = 0.01) -> float:
    if not error <= bound:
        raise SystemExit(f"{what}: relative error {error:.4f} against float32, expected at most {bound}: wrong results")
    return error
