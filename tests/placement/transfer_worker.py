"""The other process of `test_two_processes.py`: prefills and publishes, or fetches and decodes, and says so in JSON lines.

    python transfer_worker.py write|read KEY STORES [SLEEP]

STORES is a JSON list of [url, options]. A reader sleeps SLEEP seconds between fetching and decoding.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.distributed import CacheMissing, fetch, publish
from redknot_hf.segments.stores import SegmentStore

CONFIG = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
GREEDY = dict(do_sample=False, max_new_tokens=10)


def make_model(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIG, **changes}), attn_implementation="redknot").eval()


def make_profile(model: torch.nn.Module) -> HeadProfile:
    return HeadProfile.uniform(model.config, sink=4, window=16, global_heads={(0, 0), (1, 2), (2, 3)})


def prompt(length: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch with padding: rows of ``length`` and ``length - 61`` tokens."""
    ids = torch.randint(2, 96, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, :61] = 0
    return ids * mask, mask


def prefill(model, profile, length: int = 200, **options) -> tuple[RedKnotCache, torch.Tensor]:
    """A cache of the prompt, and the ids with one more token."""
    ids, mask = (tensor.to(model.device) for tensor in prompt(length))
    cache = RedKnotCache(model.config, profile, **options)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=1)
    return cache, out


def decode(model, cache, ids) -> torch.Tensor:
    seen = cache.get_seq_length()
    mask = torch.cat([prompt(seen)[1], torch.ones(2, ids.shape[1] - seen, dtype=torch.int64)], 1)
    return model.generate(ids, attention_mask=mask.to(ids.device), past_key_values=cache, **GREEDY)


def say(**what) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    role, key, stores = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    model = make_model()
    for url, options in stores:
        with SegmentStore(url, **options) as store:
            if role == "write":
                cache, ids = prefill(model, make_profile(model))
                done = publish(cache, store, key, tokens=ids, model=model)
                say(url=url, published=done.nbytes, dense=done.dense_nbytes)
                continue
            try:
                found = fetch(store, key, model)
            except CacheMissing as error:
                say(url=url, missing=str(error))
                continue
            say(url=url, fetched=found.nbytes)
            time.sleep(pause)
            text = model.generate(**found.inputs, past_key_values=found.cache, **GREEDY)
            say(url=url, text=text.tolist())


if __name__ == "__main__":
    main()
