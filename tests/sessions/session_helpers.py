"""Tiny models and the one question most of these tests ask: does it go on bit by bit like the one that never moved?"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache

VOCABULARY = 97


def tiny_config(**changes) -> LlamaConfig:
    values = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    return LlamaConfig(**{**values, **changes})


def tiny_model(**changes):
    torch.manual_seed(7)
    config = tiny_config(**changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # the usual initialisation gives nearly uniform attention, which hides errors
    return model.eval()


def mixed_profile(config, sink=2, window=9):
    """Global and local heads in every layer but the last, which is all local."""
    return HeadProfile.uniform(config, sink=sink, window=window, global_heads=[(0, 0), (1, 1)])


def prompt(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model, cache, ids, mask=None):
    """Logits ``[rows, tokens, vocabulary]`` of feeding ``ids`` behind what the cache holds."""
    past = cache.get_seq_length()
    position_ids = None
    if mask is not None:
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past : past + ids.shape[1]]
    return model(ids, past_key_values=cache, attention_mask=mask, position_ids=position_ids, use_cache=True).logits


def steps(model, cache, count=12, mask=None):
    """Logits of ``count`` greedy steps, starting from a fixed token."""
    ids = torch.full((rows_of(cache), 1), 5)
    found = []
    for _ in range(count):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = feed(model, cache, ids, mask)
        found.append(logits)
        ids = logits[:, -1:].argmax(-1)
    return torch.cat(found, 1)


def rows_of(cache) -> int:
    return next(layer.batch_size for layer in cache.paged_layers if layer.is_initialized)


def make(model, profile, rows=1, tokens=40, mask=None, seed=0, **options) -> RedKnotCache:
    cache = RedKnotCache(model.config, profile, page_size=options.pop("page_size", 8), **options)
    feed(model, cache, prompt(rows, tokens, seed), mask)
    return cache


@torch.no_grad()
def steps_on(model, cache, count=12):
    """`steps` for a model on any device."""
    ids = torch.full((rows_of(cache), 1), 5, device=model.device)
    found = []
    for _ in range(count):
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        found.append(logits)
        ids = logits[:, -1:].argmax(-1)
    return torch.cat(found, 1)
