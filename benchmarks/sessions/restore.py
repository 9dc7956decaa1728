"""Restoring a saved session against computing it again, and the bytes of a compressed prefix, on the CPU.

    python benchmarks/sessions/restore.py --tokens 8192 --threads 2 --out benchmarks/results/cpu

One prompt of real text is fed to a `RedKnotCache`, saved, offloaded, loaded and prefetched; each way is timed
``--rounds`` times and the median is reported. The restored cache must give the very tokens of the original. Loading
reads a file that was just written, so it comes from the page cache; ``--cold-read`` asks the system to forget it first.

The second table needs no weights: the bytes of a compressed prefix at page 64 against the ragged ideal (exactly the rows
that each head keeps, in the dtype in which it keeps them), before and after `RedKnotCache.freeze`.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder; default: the demo model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compute-rounds", type=int, default=1)
    parser.add_argument(
        "--global-share", type=float, default=0.25, help="share of global heads; the rest 4 + 252 tokens"
    )
    parser.add_argument("--cold-read", action="store_true", help="drop the file from the page cache before each load")
    parser.add_argument("--out", default=None, help="folder for restore.json")
    parser.add_argument("--bytes-only", action="store_true", help="the second table alone")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import pydoc_data.topics

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import redknot_hf
    from redknot_hf import HeadProfile, RedKnotCache
    from redknot_hf.demo_model import get_demo_model_path

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    path = args.model or str(get_demo_model_path())
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="redknot", dtype=dtype).eval()
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = AutoTokenizer.from_pretrained(path)(text[: args.tokens * 8], return_tensors="pt").input_ids
    ids = ids[:, : args.tokens]
    assert ids.shape[1] == args.tokens, f"the text has only {ids.shape[1]} tokens"

    profiles = {
        "all_global": HeadProfile.all_global(model.config),
        "head_aware": HeadProfile.uniform(model.config, sink=4, window=252, global_heads=args.global_share),
    }
    results = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name, profile in ({} if args.bytes_only else profiles).items():
            results[name] = measure(model, profile, ids, Path(folder) / "session", args)
            print(name, json.dumps(results[name]), flush=True)
    report = {
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_name(), "threads": args.threads, "platform": platform.platform()},
        "versions": {
            "redknot_hf": redknot_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": Path(path).name,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "restore": results,
        "compressed_prefix": compressed_bytes(RedKnotCache, HeadProfile, model.config, torch),
    }
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "restore.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in report["compressed_prefix"]:
        print(
            f"{row['tokens']:6} tokens, {row['global_share']:.0%} global, {row['sink']} + {row['window']}, "
            f"{row['kv_dtype'] or 'bfloat16'}: {row['live_bytes']:,} bytes, {row['above_ideal']:.2%} above the ideal "
            f"({row['above_ideal_in_pages']:.2%} in whole pages), {row['live_bytes'] / row['dense_bytes']:.1%} of dense"
        )
    return 0


def measure(model, profile, ids, path: Path, args) -> dict:
    """Medians in seconds, sizes in bytes, and whether every way gave the same next tokens."""
    from redknot_hf import RedKnotCache

    times: dict[str, list[float]] = {
        way: [] for way in ("compute", "save", "load", "load_unverified", "offload", "prefetch")
    }
    for _ in range(args.compute_rounds):
        cache = RedKnotCache(model.config, profile)
        timed(times["compute"], lambda: model(ids, past_key_values=cache, logits_to_keep=1))  # noqa: B023
    wanted = next_tokens(model, cache.fork())
    size = 0
    same = True
    for _ in range(args.rounds):
        size = timed(times["save"], lambda: cache.save(path))
        for way, verify in (("load", True), ("load_unverified", False)):
            if args.cold_read:
                forget(path)
            loaded = timed(times[way], lambda: RedKnotCache.load(path, model.config, verify=verify))  # noqa: B023
        same = same and next_tokens(model, loaded) == wanted
        del loaded
        timed(times["offload"], cache.offload)
        timed(times["prefetch"], cache.prefetch)
    same = same and next_tokens(model, cache.fork()) == wanted
    medians = {f"{way}_s": statistics.median(values) for way, values in times.items()}
    report = cache.memory_report()
    return {
        **medians,
        "load_speedup": medians["compute_s"] / medians["load_s"],
        "prefetch_speedup": medians["compute_s"] / medians["prefetch_s"],
        "file_bytes": size,
        "live_bytes": report.live,
        "ideal_bytes": report.ideal,
        "same_tokens": same,
    }


def command() -> str:
    """How this was called, without the paths of this machine."""
    words = sys.argv[1:]
    hidden = {words.index(name) + 1 for name in ("--model",) if name in words}
    return " ".join(
        ["python benchmarks/sessions/restore.py", *("..." if i in hidden else w for i, w in enumerate(words))]
    )


def timed(into: list[float], call):
    start = time.perf_counter()
    result = call()
    into.append(time.perf_counter() - start)
    return result


def next_tokens(model, cache, count: int = 5) -> list[int]:
    import torch

    ids, found = torch.tensor([[1]]), []
    for _ in range(count):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def compressed_bytes(RedKnotCache, HeadProfile, config, torch) -> list[dict]:
    """Bytes of a compressed prefix against the ragged ideal at page 64, for the shape of ``config`` in bfloat16."""
    rows = []
    heads = config.num_key_value_heads
    dim = config.head_dim or config.hidden_size // config.num_attention_heads
    for tokens in (8192, 32768):
        keys = torch.zeros(1, heads, tokens, dim, dtype=torch.bfloat16)
        for share, sink, window in (
            (0.15, 4, 252), (0.15, 4, 256), (0.15, 64, 256), (0.15, 64, 4096), (0.25, 4, 256), (0.5, 4, 256)
        ):  # fmt: skip
            for kv_dtype in (None, "int8", "fp8"):
                profile = HeadProfile.uniform(config, sink=sink, window=window, global_heads=share)
                cache = RedKnotCache(config, profile, prefill="full", kv_dtype=kv_dtype)
                cache.adopt(((keys, keys) for _ in range(config.num_hidden_layers)), tokens)
                paged = cache.memory_report()
                cache.freeze()
                report = cache.memory_report()
                rows.append(
                    {
                        "tokens": tokens,
                        "global_share": share,
                        "sink": sink,
                        "window": window,
                        "kv_dtype": kv_dtype,
                        "live_bytes": report.live,
                        "allocated_bytes": report.allocated,
                        "ideal_bytes": report.ideal,
                        "dense_bytes": report.dense,
                        "above_ideal": report.live / report.ideal - 1,
                        "above_ideal_in_pages": paged.live / paged.ideal - 1,
                    }
                )
    return rows


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
