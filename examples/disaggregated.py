"""Prefill in one process, decode in another: the cache goes through a store, and only what is visible travels.

    python examples/disaggregated.py                                     # both, over a folder
    python examples/disaggregated.py --store valkey://127.0.0.1:6379     # both, over a server

or one process each, on machines that reach the same store:

    python examples/disaggregated.py --role prefill --store valkey://cache.example:6379
    python examples/disaggregated.py --role decode  --store valkey://cache.example:6379
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

import torch

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.demo_model import get_demo_model
from redknot_hf.distributed import CacheMissing, fetch, publish

KEY = "request-1"
PROMPT = (
    "The log of the lighthouse. " + " ".join(f"Day {n}: {n % 7} ships passed, the lamp was lit." for n in range(1, 26))
    + " On day 12 the keeper counted ships: the number was"
)  # fmt: skip


def prefill(store: str) -> None:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    cache = RedKnotCache(model.config, HeadProfile.load("SmolLM2-135M-Instruct"))
    begin = time.perf_counter()
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    middle = time.perf_counter()
    sent = publish(cache, store, KEY, tokens=first, model=model)
    print(f"prefill: {first.shape[1] - 1} tokens in {middle - begin:.1f} s; published {sent}")


def decode(store: str) -> torch.Tensor:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    options = {"max_new_tokens": 16, "do_sample": False}
    try:
        begin = time.perf_counter()
        found = fetch(store, KEY, model)
        print(f"decode: fetched {found.nbytes:,} bytes in {time.perf_counter() - begin:.2f} s")
        text = model.generate(**found.inputs, past_key_values=found.cache, **options)
    except CacheMissing as error:  # never a wrong cache: feed the prompt here
        print(f"decode: {error}")
        inputs = tokenizer(PROMPT, return_tensors="pt")
        cache = RedKnotCache(model.config, HeadProfile.load("SmolLM2-135M-Instruct"))
        text = model.generate(**inputs, past_key_values=cache, max_new_tokens=17, do_sample=False)
    print("decode:", tokenizer.decode(text[0, -17:]).strip())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=["prefill", "decode", "both"], default="both")
    parser.add_argument("--store", help="URL of a segment store that both sides reach; a folder of its own by default")
    args = parser.parse_args()
    if args.role != "both":
        if args.store is None:
            parser.error("--role needs the --store that both sides reach")
        prefill(args.store) if args.role == "prefill" else decode(args.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = args.store or f"file://{folder}"
        decode(store)  # nothing is there yet: the prompt is fed
        subprocess.run([sys.executable, __file__, "--role", "prefill", "--store", store], check=True, timeout=600)
        decode(store)


if __name__ == "__main__":
    main()
