"""What one decoder family makes of RedKnot: exact, refused by name, or wrong.

`check_family(model_type)` builds the tiny model and compares, over a batch of two rows of which one is left-padded,
greedily generated tokens and their logits:

- ``fallback``: attn_implementation="redknot" with the family's ordinary cache, against the family's default;
- ``M0``: "redknot" with a RedKnotCache whose heads are all global, against the same;
- ``M4``: "redknot" with a mixed profile, against attention written out with the dense mask of the visibility rule.

Each of the three comes out as one of `OUTCOMES`.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from dense_reference import NotUnderstood, dense_reference, full_cache
from tiny_families import tiny_model

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError

OUTCOMES = {
    "equal": "the same tokens, logits within the tolerance",
    "refused": "an error that names the cause, before any wrong text",
    "plain": "transformers keeps the family's own attention or cache; results are its own",
    "wrong": "another result without an error",
    "error": "an error that says nothing about RedKnot",
    "no reference": "the comparison itself is not possible",
}
TOLERANCE = 2e-5  # of the largest logit: fp32 sums in another order
LARGEST_SPREAD = 1e-4  # what a family's own fp32 error against fp64 scores may excuse
PROMPT, PADDING, STEPS, SINK, WINDOW = 21, 6, 6, 2, 5


def inputs(vocab: int = 90) -> dict[str, torch.Tensor]:
    """Two prompts of 21 tokens, the first with 6 columns of left padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, vocab, (2, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: Any, cache: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        torch.manual_seed(0)
        return model.generate(
            **{**inputs(), **options},
            past_key_values=cache,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )


def mixed_profile(config: Any) -> HeadProfile:
    """Every other head local with 2 sinks and a window of 5: shorter than the prompt and than the model's windows."""
    shape = HeadProfile.all_global(config)
    layers = enumerate(shape.attention_layers)
    cells = {(l, h) for i, l in layers for h in range(shape.num_kv_heads) if (i + h) % 2 == 0}
    return HeadProfile.uniform(config, sink=SINK, window=WINDOW, global_heads=cells)


def difference(one: Any, other: Any) -> float:
    """Largest difference of two runs' logits as a share of the largest logit; inf where the tokens differ."""
    if not torch.equal(one.sequences, other.sequences):
        return float("inf")
    pairs = list(zip(one.logits, other.logits, strict=True))
    scale = max(1.0, max(a.abs().max().item() for a, _ in pairs))
    worst = max((a - b).abs().max().item() for a, b in pairs)
    return worst / scale if worst == worst else float("inf")


def _compare(base: Any, run: Any, spread: float = 0.0) -> dict[str, Any]:
    """Run and compare; an error of ours is a refusal, any other one is a defect.

    ``spread`` is how far the family's default implementation is from fp64 scores: some amplify rounding.
    """
    try:
        off = difference(base, run())
    except RedKnotError as refusal:
        return {"outcome": "refused", "message": str(refusal)}
    except Exception as problem:
        # the mask object refuses arithmetic on it; some families take no cache, or none but their own, and say so
        named = any(word in str(problem) for word in ("RedKnotCache", "past_key_values", "`model_kwargs` are not used"))
        return {"outcome": "refused" if named else "error", "message": f"{type(problem).__name__}: {problem}"}
    return {"outcome": "equal" if off <= max(TOLERANCE, 3 * spread) else "wrong", "difference": off}


def _spread(model: Any, base: Any) -> float:
    """How far a run is from fp64 scores; inf where the tokens differ, 0 where it cannot be measured."""
    try:
        with dense_reference(model):
            return difference(base, generate(model, full_cache(model.config)))
    except Exception:
        return 0.0


def trusted(model: Any) -> str:
    """The implementation to compare with: the family's default, unless that is wrong and eager is not.

    transformers 5.17 runs gemma2 with sdpa, which leaves out the family's softcap without a word.
    """
    default = model.config.get_text_config(decoder=True)._attn_implementation
    if default != "eager" and _spread(model, generate(model)) > LARGEST_SPREAD:
        model.set_attn_implementation("eager")
        better = _spread(model, generate(model)) <= TOLERANCE
        model.set_attn_implementation(default)
        return "eager" if better else default
    return default


def _own_error(model: Any) -> str | None:
    """What the family's own generate() says with an ordinary cache passed by the user, if it fails there too."""
    try:
        generate(model, full_cache(model.config))
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def check_family(model_type: str) -> dict[str, Any]:
    """All of the above for one family. Never raises; a family that cannot be built says why under ``"not built"``."""
    logging.disable(logging.WARNING)
    try:
        try:
            model = tiny_model(model_type)
            base = generate(model)
        except Exception as problem:
            return {"not built": f"{type(problem).__name__}: {problem}"}
        result: dict[str, Any] = {"default": model.config.get_text_config(decoder=True)._attn_implementation}
        if (instead := trusted(model)) != result["default"]:
            result["compared with"] = instead
            model.set_attn_implementation(instead)
            base = generate(model)
        if not torch.isfinite(torch.stack(base.logits)).all():
            return {"not built": "the tiny model's own logits are not finite"}
        with contextlib.suppress(Exception):
            model.set_attn_implementation("redknot")
        runs_redknot = model.config.get_text_config(decoder=True)._attn_implementation == "redknot"
        result["attention"] = "redknot" if runs_redknot else "own"

        spread = min(_spread(model, base), LARGEST_SPREAD) if runs_redknot else 0.0
        result["spread"] = spread
        result["fallback"] = _compare(base, lambda: generate(model), spread)
        if not runs_redknot:
            result["fallback"]["outcome"] = "plain"
        own = _own_error(model)

        cache: list[RedKnotCache] = []

        def paged(profile: HeadProfile) -> Any:
            cache[:] = [RedKnotCache(model.config, profile, page_size=4)]
            return generate(model, cache[0])

        result["M0"] = _compare(base, lambda: paged(HeadProfile.all_global(model.config)), spread)
        if cache:
            result["layers"] = {
                "paged": sum(layer.pages is not None for layer in cache[0].paged_layers),
                "of": len(cache[0].layers),
            }
        result["M4"] = _m4(model, paged, runs_redknot, spread)
        if cache and not cache[0].seen and not cache[0].get_seq_length() and result["M4"]["outcome"] == "wrong":
            # nothing ever reached the cache: results are the family's own, whatever cache is passed
            result["M0"] = result["M4"] = {
                "outcome": "plain",
                "message": "the model ignores the cache that it is given",
            }
        for rung in ("M0", "M4"):
            if own and result[rung]["outcome"] == "error":
                result[rung] = {"outcome": "no reference", "message": f"with a DynamicCache passed by the user: {own}"}
        return result
    finally:
        logging.disable(logging.NOTSET)


def _m4(model: Any, paged: Any, runs_redknot: bool, spread: float) -> dict[str, Any]:
    try:
        profile = mixed_profile(model.config)
    except RedKnotError as refusal:
        return {"outcome": "refused", "message": str(refusal)}
    if not runs_redknot:  # the dense reference cannot be set either: it must be refused
        return _refusal(paged, profile, {"outcome": "wrong", "message": "local heads without an error"})
    try:
        with dense_reference(model, profile):
            reference = generate(model, full_cache(model.config))
        with dense_reference(model, None):
            unwindowed = generate(model, full_cache(model.config))
    except NotUnderstood as why:
        reference, missing = None, f"the dense reference does not model {why}"
    except Exception as problem:
        reference, missing = None, f"the dense reference fails: {type(problem).__name__}: {problem}"
    if reference is None:
        return _refusal(paged, profile, {"outcome": "no reference", "message": missing})
    found = _compare(reference, lambda: paged(profile), spread)
    found["effect"] = difference(reference, unwindowed)  # how much the windows matter: shows that M4 can fail
    return found


def _refusal(paged: Any, profile: HeadProfile, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The refusal of a run, or ``otherwise`` if it went through."""

    def run() -> Any:
        paged(profile)
        raise _WentThrough

    found = _compare(None, run)
    return otherwise if found["message"].startswith("_WentThrough") else found


class _WentThrough(Exception):
    pass


__all__ = ["OUTCOMES", "check_family", "generate", "inputs", "mixed_profile", "trusted"]
