"""A hundred chats on memory for ten: every one goes on without being computed again.

    python benchmarks/sessions/many_chats.py --tokens 4096 --out benchmarks/results/h200      # on a GPU
    python benchmarks/sessions/many_chats.py --tokens 256 --threads 2 --out benchmarks/results/cpu

Every chat begins with ``--tokens`` tokens of text of its own and has ``--turns`` further turns of 16 tokens, in an order
drawn at random, so that any chat may be anywhere. The device's budget is that of ten chats, the host's that of thirty; the
others are files. The logits of every turn must be those of a chat that never moved (compared for ``--checked`` chats,
bit by bit), and the model must have been fed each token once. Reported: how long a chat takes to come back from where it was
(median, with the step that follows), and how long computing it again takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: the demo model")
    parser.add_argument("--chats", type=int, default=100)
    parser.add_argument("--on-device", type=int, default=10)
    parser.add_argument("--on-host", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--checked", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", help="for the files; default: a temporary one")
    parser.add_argument("--out", help="folder for many_chats.json")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import pydoc_data.topics
    import random

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import redknot_hf
    from redknot_hf import HeadProfile, RedKnotCache
    from redknot_hf.demo_model import get_demo_model_path
    from redknot_hf.sessions import SessionStore

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.model or str(get_demo_model_path())
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="redknot", dtype=dtype).to(device).eval()
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = (
        AutoTokenizer.from_pretrained(path)(text[: 16 * args.tokens + 40_000], return_tensors="pt")
        .input_ids[0]
        .to(device)
    )
    profile = HeadProfile.uniform(model.config, sink=4, window=252, global_heads=0.25)
    stride = max(1, (len(ids) - args.tokens - 16 * args.turns) // args.chats)
    fed = 0

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def make() -> Any:
        return RedKnotCache.for_model(model, profile)

    def part(chat: int, start: int, count: int) -> Any:
        return ids[chat * stride + start : chat * stride + start + count][None]

    @torch.no_grad()
    def feed(cache: Any, tokens: Any) -> Any:
        nonlocal fed
        fed += tokens.shape[1]
        return model(tokens, past_key_values=cache, logits_to_keep=1).logits

    feed(make(), part(0, 0, args.tokens))  # kernels are chosen
    fed, begin = 0, clock()
    one = make()
    feed(one, part(0, 0, args.tokens))
    compute = [clock() - begin]
    fed = 0
    size = sum(pool.allocated_bytes for pool in one._pools.values())
    del one
    references: dict[int, Any] = {}
    ways: dict[str, list[float]] = {"device": [], "host": [], "disk": []}
    with tempfile.TemporaryDirectory() as temporary:
        store = SessionStore(
            model,
            device_bytes=round(size * (args.on_device + 0.5)),
            host_bytes=round(size * (args.on_host + 0.5)),
            folder=args.folder or temporary,
        )
        for chat in range(args.chats):
            with store.use(f"{chat}", make) as cache:
                begin = clock()
                feed(cache, part(chat, 0, args.tokens))
                compute.append(clock() - begin)
                if chat < args.checked:
                    references[chat] = cache.fork()
                    references[chat].offload()  # a copy of its own that the store knows nothing of
        first = store.report()
        order = [chat for _ in range(args.turns) for chat in range(args.chats)]
        random.Random(0).shuffle(order)
        done = dict.fromkeys(range(args.chats), 0)
        checked = 0
        for chat in order:
            report = store.report()
            where = next(name for name in ways if f"{chat}" in getattr(report, name))
            tokens = part(chat, args.tokens + 16 * done[chat], 16)
            begin = clock()
            with store.use(f"{chat}") as cache:
                assert cache.get_seq_length() == args.tokens + 16 * done[chat]
                logits = feed(cache, tokens)
                ways[where].append(clock() - begin)
            done[chat] += 1
            if chat in references:
                fed -= 16
                assert torch.equal(logits, feed(references[chat], tokens)), f"chat {chat} answers otherwise"
                references[chat].offload()
                checked += 1
            now = store.report()
            assert now.device_bytes <= store.device_bytes and now.host_bytes <= store.host_bytes
        report = store.report()
    assert fed == args.chats * (args.tokens + 16 * args.turns), "something was computed twice"
    assert report.deletions == 0
    row = {
        "chats": args.chats, "tokens": args.tokens, "turns": args.turns, "bytes_of_a_chat": size,
        "device_bytes": store.device_bytes, "host_bytes": store.host_bytes,
        "after_the_first_turn": {name: len(getattr(first, name)) for name in ways},
        "moves": {name: getattr(report, name) for name in ("offloads", "saves", "restores", "deletions")},
        "tokens_fed": fed, "turns_compared_bit_by_bit": checked,
        "compute_ms": round(1e3 * statistics.median(compute), 2),
        "back_and_16_tokens_ms": {
            name: {"turns": len(times), "median": round(1e3 * statistics.median(times), 2)}
            for name, times in ways.items() if times
        },
        "model": f"{model.config.model_type}, {model.config.num_hidden_layers} layers, {model.num_parameters() / 1e6:.0f}M "
        "parameters", "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "redknot_hf": redknot_hf.__version__},
        "command": "python benchmarks/sessions/many_chats.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "many_chats.json").write_text(json.dumps(row, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
