"""Tries a few launch parameters per kernel and prints the best: `python tune.py [--only decode,global,local,chunk]`.

What it finds is meant for `choose_config` in decode_kernel.py and prefill_kernel.py; nothing is stored. A configuration
that does not compile or does not fit is reported and skipped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import peers
import torch
from harness import CUDA, DEVICE, KEEP_ALL, Shape, check_decode, layers_needed, make_layer, measure


def best(title: str, configs: Iterable, run: Callable) -> None:
    """Time `run(config)` for each and print them in order."""
    timed = []
    for config in dict.fromkeys(configs):
        try:
            timed.append((run(config), config))
        except Exception as error:  # does not fit, does not compile: the next one
            print(f"  {config}: {type(error).__name__} {str(error)[:80]}")
    print(title)
    for us, config in sorted(timed, key=lambda pair: pair[0])[:5]:
        print(f"  {us:10.2f} us  {config}", flush=True)


def tune_decode(shape: Shape) -> None:
    from segpaged_attention import decode_kernel

    scale = shape.head_dim**-0.5
    for batch, context in ((1, 8 << 10), (1, 128 << 10), (8, 32 << 10), (32, 32 << 10)):
        size = batch * (context + 7 * 320) * shape.head_dim * 4
        layers = [make_layer(shape, batch, context, 1, 64, 256, i) for i in range(layers_needed(size))]
        chosen = decode_kernel.choose_config(
            DEVICE, shape.dtype, shape.head_dim, shape.head_dim, shape.page_size, 1, shape.group, 1
        )
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        tries = [chosen]
        for stages, per_sm, tma, pdl in itertools.product((2, 3), (1, 2), (True, False), (True, False)):
            tries.append(
                replace(chosen, stages=stages, programs=per_sm * sms, tma=tma and chosen.tma, pdl=pdl and chosen.pdl)
            )

        def run(config, layers=layers):
            def call(x):
                return decode_kernel.decode(*x.decode_args, scale, exact_positions=False, config=config)

            check_decode(layers[0], call(layers[0]), scale)
            return measure([lambda x=x: call(x) for x in layers])

        best(f"decode B{batch} {context >> 10}K, 1/8 global, 64+256", tries, run)
        del layers


def tune_prefill(shape: Shape, which: str) -> None:
    """`global` and `local`: 32K from nothing; `chunk`: 512 columns over 32256, global heads."""
    from segpaged_attention import prefill_kernel

    past, columns = (32256, 512) if which == "chunk" else (0, 32 << 10)
    num_global = 0 if which == "local" else 1 if which == "chunk" else shape.kv_heads
    layer = make_layer(shape, 1, past, num_global, 64, 256, 0, room=1)
    k, v = peers.dense_kv(shape, 1, columns, 0)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q = (
        torch.randn(1, columns, shape.kv_heads * shape.group, shape.head_dim, device=DEVICE)
        .to(shape.dtype)
        .transpose(1, 2)
    )
    order = torch.argsort((layer.window < KEEP_ALL).int(), stable=True).int()
    args = (DEVICE, shape.dtype, shape.head_dim, shape.head_dim, shape.page_size, columns)
    big, small = (prefill_kernel.choose_config(*args, big) for big in (True, False))
    if which == "chunk":
        tries = [
            replace(big, splits=s, block_m=m, block_n=min(n, m), warps=w, past_n=p, past_tma=t)
            for s in (4, 8, 16)
            for m, n, w in ((128, 128, 8), (128, 64, 8), (64, 64, 4))
            for p, t in ((64, True), (64, False), (128, False))
        ]
    else:
        base = small if which == "local" else big
        tiles = (
            ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))
            if which == "local"
            else ((128, 128, 8), (128, 64, 8))
        )
        tries = [
            replace(base, block_m=m, block_n=n, past_n=64, warps=w, stages=s, tma=t)
            for (m, n, w), s, t in itertools.product(tiles, (2, 3), (True, False))
        ]

    def run(config):
        pair = (small, config) if which == "local" else (config, small)
        return measure([
            lambda: prefill_kernel.prefill(
                q, k, v, layer.k_pages, layer.v_pages, layer.block_table, layer.seq_lens, layer.sink, layer.window,
                layer.window, shape.head_dim**-0.5, head_order=order, num_global=num_global, past_len_hint=past,
                config=pair,
            )
        ] * 2, 7)  # fmt: skip

    best(f"prefill, {which}: {columns} over {past}", tries, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="decode,global,local,chunk")
    chosen = parser.parse_args().only.split(",")
    if not CUDA:
        parser.error("no CUDA device here; there is nothing to tune")
    for one in chosen:
        tune_decode(Shape()) if one == "decode" else tune_prefill(Shape(), one)


if __name__ == "__main__":
    main()
