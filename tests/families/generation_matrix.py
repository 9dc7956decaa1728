"""Every way to generate, for families of every kind: a RedKnotCache with global heads against `DynamicCache`.

`cell(family, mode)` runs both and returns ``"passed"``, ``"failed: ..."`` or ``"not applicable: ..."``; the last only
where the family's own `DynamicCache` cannot do it either, or where a cache of fixed memory is refused by name.
`ROWS_ALONE` is a pass in right-padded batches of families with sliding windows: transformers counts columns there, so
that padding between a prompt and what follows takes places in the window; a RedKnotCache counts tokens, and every row
is what it is without padding.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from family_check import TOLERANCE, difference, trusted
from tiny_families import tiny_model
from transformers import DynamicCache

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import UnsupportedModel

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "phi3",
    "gpt_oss",
    "smollm3",
    "olmo2",
    "cohere2",
    "glm4",
    "gpt2",
    "qwen2_moe",
    "qwen3_next",
]
STEPS = 5


def _ids(count: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 90, (batch, count), generator=torch.Generator().manual_seed(seed))


def _padded(side: str) -> dict[str, torch.Tensor]:
    ids, mask = _ids(18, 2, 2), torch.ones(2, 18, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(11, 18)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _generate(model: Any, cache: Any, ids: torch.Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    if ids is not None:
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(
        **{
            "do_sample": False,
            "max_new_tokens": STEPS,
            "past_key_values": cache,
            "return_dict_in_generate": True,
            "output_logits": True,
            **options,
        }
    )


@functools.cache
def _model(family: str, seed: int = 0) -> Any:
    return tiny_model(family, seed)


def _repeated() -> torch.Tensor:
    return torch.cat([_ids(9)] * 2, 1)


def _multi_turn(model: Any, make: Callable[[], Any]) -> list[Any]:
    cache = make()
    first = _generate(model, cache, _ids(14))
    return [first, _generate(model, cache, torch.cat([first.sequences, _ids(5, seed=8)], 1))]


def _fork(model: Any, make: Callable[..., Any]) -> list[Any]:
    root, text = make(), _ids(16)
    with torch.no_grad():
        model(text, past_key_values=root)
    branch = copy.deepcopy(root)
    return [_generate(model, cache, torch.cat([text, _ids(1, seed=s)], 1)) for cache, s in ((branch, 5), (root, 6))]


def _fixed_memory(model: Any, make: Callable[..., Any]) -> list[Any]:
    cache = make(max_cache_len=40)
    first = _generate(model, cache, **_padded("left"))
    if isinstance(cache, RedKnotCache):
        cache.reset()
    else:  # until transformers 5.19 an ordinary cache that was reset still has its length
        cache = make()
    return [first, _generate(model, cache, _ids(18, 2, 7))]


ROWS_ALONE = "passed, as each row alone"


class _Forward:
    """Logits of one forward and some decode steps, in the form of generate()'s result.

    Args:
        alone: feed each row without its padding instead of both together.
    """

    def __init__(self, model: Any, make: Callable[[], Any], alone: bool = False):
        given = _padded("right")
        if alone:
            rows = [self._row(model, make, given, row) for row in range(2)]
            self.logits = [torch.cat(pair) for pair in zip(*rows, strict=True)]
            self.sequences = torch.zeros(1)
            return
        self.logits, self.sequences = self._run(model, make(), given, [0, 1]), torch.zeros(1)

    def _row(self, model: Any, make: Callable[[], Any], given: dict[str, torch.Tensor], row: int) -> list[torch.Tensor]:
        keep = given["attention_mask"][row].bool()
        return self._run(model, make(), {name: x[row : row + 1, keep] for name, x in given.items()}, [row])

    @staticmethod
    def _run(model: Any, cache: Any, given: dict[str, torch.Tensor], rows: list[int]) -> list[torch.Tensor]:
        mask = given["attention_mask"]
        position = (mask.cumsum(1) - 1).clamp(0)
        with torch.no_grad():
            logits = [model(**given, position_ids=position, past_key_values=cache).logits[mask.bool()]]
            for step in range(3):
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
                position = mask.sum(1, keepdim=True) - 1
                ids = _ids(1, 2, step)[rows]
                out = model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
                logits.append(out.logits[:, -1])
        return logits


MODES: dict[str, Callable[[Any, Callable[..., Any]], list[Any]]] = {
    "greedy": lambda m, c: [_generate(m, c(), _ids(20))],
    "sampling": lambda m, c: [_generate(m, c(), _ids(20), do_sample=True, top_k=8)],
    "beams": lambda m, c: [_generate(m, c(), _ids(20), num_beams=3)],
    "beams, padding": lambda m, c: [_generate(m, c(), **_padded("left"), num_beams=2)],
    "n returns": lambda m, c: [_generate(m, c(), _ids(20), num_beams=3, num_return_sequences=2)],
    "assisted": lambda m, c: [_generate(m, c(), _repeated(), assistant_model=_model("llama", 9))],
    "prompt lookup": lambda m, c: [_generate(m, c(), _repeated(), prompt_lookup_num_tokens=3)],
    "chunked prefill": lambda m, c: [_generate(m, c(), _ids(20), prefill_chunk_size=6)],
    "multi-turn": _multi_turn,
    "left padding": lambda m, c: [_generate(m, c(), **_padded("left"))],
    "right padding": lambda m, c: [_Forward(m, c)],
    "deepcopy fork": _fork,
    # fixed memory: a prompt with padding, its decode steps, and the same memory once more after reset()
    "static": _fixed_memory,
}


def cell(family: str, mode: str) -> str:
    """Compare one family in one mode."""
    logging.disable(logging.WARNING)
    model = _model(family)
    default = _default(family)
    model.set_attn_implementation(default)
    try:
        try:
            want = MODES[mode](model, lambda **fixed: DynamicCache(config=model.config))
        except Exception as problem:
            return f"not applicable: {type(problem).__name__}: {' '.join(str(problem).split())[:140]}"
        model.set_attn_implementation("redknot")
        profile = HeadProfile.all_global(model.config)
        try:
            got = MODES[mode](model, lambda **fixed: RedKnotCache(model.config, profile, page_size=4, **fixed))
        except UnsupportedModel as problem:
            word = "not applicable" if mode == "static" and "static form" in str(problem) else "failed"
            return f"{word}: {type(problem).__name__}: {' '.join(str(problem).split())[:140]}"
        except Exception as problem:
            return f"failed: {type(problem).__name__}: {' '.join(str(problem).split())[:140]}"
        off = max(difference(a, b) for a, b in zip(want, got, strict=True))
        if off > TOLERANCE and mode == "right padding":
            model.set_attn_implementation(default)
            alone = _Forward(model, lambda: DynamicCache(config=model.config), alone=True)
            if difference(alone, got[0]) <= TOLERANCE:
                return ROWS_ALONE
        return "passed" if off <= TOLERANCE else f"failed: off by {off:.1e}"
    finally:
        model.set_attn_implementation(default)
        logging.disable(logging.NOTSET)


@functools.cache
def _default(family: str) -> str:
    return trusted(_model(family))


__all__ = ["FAMILIES", "MODES", "ROWS_ALONE", "cell"]
