"""Find out by measurement how a model rotates its keys, and refuse what cannot be relocated by name.

Shifting all positions of a prompt by the same distance leaves the hidden states of a rotary model unchanged, so the
cached keys at p + d must be the ones at p, rotated by d. The probe runs a short random prompt at two positions and
looks, layer by layer, for the layout and the model's own frequency vector that explain the difference. A layer that
does not move has no rotary embedding. A model that moves in a way no rotation explains (learned positions) is refused.

Nothing is known here about families; the config is only read for what a short prompt cannot show (frequencies that
change with length).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch

from redknot_hf.errors import UnsupportedModel
from redknot_hf.segments.rope import LayerRope, Layout, Relocator, RopeSignature, canonical_json

__all__ = ["ProbeReport", "declared_parameters", "measure", "probe", "refuse_by_config", "state_token"]

_TOKENS = 16
_SHIFT = 211
_LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")
_ROPE_FIELDS = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "rope_type", "rotary_dim", "rotary_pct",
    "rotary_emb_base", "partial_rotary_factor", "head_dim", "hidden_size", "num_attention_heads", "layer_types",
    "no_rope_layers", "no_rope_layer_interval", "max_position_embeddings", "original_max_position_embeddings",
    "model_type",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProbeReport:
    """What `probe` found.

    Attributes:
        max_error: largest |relocated - recomputed| of any key coordinate, over all layers and both directions.
        relative_error: the largest per-layer L2 error, relative to the keys.
        moved: smallest relative distance by which the shift itself changed a rotary layer: what the error has to be
            compared with.
        layers: per layer as in `RopeSignature.layers`.
        nope_layers: layers whose keys do not depend on the position.
        text_only: images cannot be moved.
    """

    max_error: float
    relative_error: float
    moved: float
    layers: tuple[str, ...]
    nope_layers: tuple[int, ...]
    text_only: bool


def probe(model: torch.nn.Module, delta: int = 37) -> ProbeReport:
    """Compare relocation with recomputation on this very model, at distances that were not used to measure it.

    Args:
        model: a causal decoder with its weights in memory.
        delta: positions to move by.

    Raises:
        UnsupportedModel: if the keys cannot be relocated.
    """
    relocator = Relocator.from_model(model)
    at_0, at_d, far = (_keys_at(model, p) for p in (0, delta, _far(model)))
    worst_abs, worst_rel, moved = 0.0, 0.0, math.inf
    for i, rope in enumerate(relocator.layers):
        a, b, c = at_0[i], at_d[i], far[i]
        if a is None or b is None or c is None:
            continue
        back = delta - _far(model)
        steps = _positions(a)
        for got in (
            relocator.relocate(a, delta, i, source=steps),
            relocator.relocate(c, back, i, source=steps + _far(model)),
        ):
            worst_abs = max(worst_abs, (got - b).abs().max().item())
            worst_rel = max(worst_rel, _relative(got, b))
        if rope is not None:
            moved = min(moved, _relative(a, b))
    return ProbeReport(
        worst_abs, worst_rel, moved, relocator.signature.layers, tuple(relocator.nope_layers), relocator.text_only
    )


def measure(model: torch.nn.Module) -> Relocator:
    """Build the `Relocator` of a model. Use `Relocator.from_model`, which remembers it.

    Raises:
        UnsupportedModel: with the reason.
    """
    from redknot_hf.segments.rope_own import OwnRotary

    config = model.config
    name = getattr(config, "model_type", type(model).__name__)
    refuse_by_config(config)
    # Same hidden states at both places, so the keys differ by the rotation alone.
    near, far = _keys_at(model, 0), _keys_at(model, _far(model))
    tolerance = _tolerance(model)
    candidates = _frequencies(model)
    layers: list[LayerRope | None] = []
    own: dict[int, Any] = {}
    for i, (a, b) in enumerate(zip(near, far, strict=True)):
        if a is None or b is None or _relative(a, b) < tolerance:
            layers.append(None)
            continue
        found = _explain(a, b, _far(model), candidates, tolerance)
        if found is None:
            found = _estimate(model, i, a, tolerance)
        if found is None:
            function = OwnRotary.of(model, i)
            if function is None or _relative(function(a, torch.full((a.shape[2],), _far(model))), b) > tolerance:
                raise UnsupportedModel(
                    f"model: the keys of layer {i} of {name} change with the position, but not by a rotation "
                    "(learned or absolute positions, or states that depend on them); its segments cannot be moved"
                )
            own[i] = function
        layers.append(found)
    if all(rope is None for rope in layers) and not own:
        raise UnsupportedModel(
            f"model: no layer's keys of {name} change with the position: it has no rotary embedding (ALiBi, relative "
            "bias or none at all), so there is nothing to relocate by"
        )
    names = tuple(
        f"own:{i in own}" if i in own else "none" if r is None else f"{r.layout}:{r.rotary_dim}/{r.head_dim}"
        for i, r in enumerate(layers)
    )
    precision = next((str(f.dtype).removeprefix("torch.") for f in candidates), "")
    signature = RopeSignature(declared_parameters(config), precision, names)
    return Relocator(layers, signature, text_only="mrope_section" in signature.parameters, own=own)


# ---------------------------------------------------------------------------------------------------------------------
# What the config says
# ---------------------------------------------------------------------------------------------------------------------


def declared_parameters(config: Any) -> str:
    """Everything a config says about positions, as canonical JSON."""
    text = config.get_text_config()
    return canonical_json({name: getattr(text, name) for name in _ROPE_FIELDS if getattr(text, name, None) is not None})


def refuse_by_config(config: Any) -> None:
    """Refuse what a short prompt cannot show to be wrong.

    Raises:
        UnsupportedModel: dynamic NTK, longrope with two regimes, MLA, ALiBi, encoder-decoders.
    """
    text = config.get_text_config()
    name = getattr(text, "model_type", type(text).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model: {name} is an encoder-decoder; segments are for decoders")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModel(
            f"model: {name} uses MLA (kv_lora_rank={text.kv_lora_rank}): it caches latents, which cannot be relocated"
        )
    if _uses_alibi(text):
        raise UnsupportedModel(f"model: {name} uses ALiBi, a bias by distance instead of rotated keys")
    for parameters in _rope_dicts(text):
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        if "dynamic" in kind or kind == "ntk":
            raise UnsupportedModel(
                f"model: rope_type {kind!r} (dynamic NTK) changes its frequencies with the length of the sequence, so "
                "cached keys cannot be relocated; use 'yarn' or 'linear' scaling"
            )
        if kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor"):
            raise UnsupportedModel(
                "model: rope_type 'longrope' switches its frequencies at original_max_position_embeddings, so keys "
                "of one regime cannot be relocated into the other"
            )


def _rope_dicts(text: Any) -> Iterator[dict[str, Any]]:
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(text, name, None)
        if isinstance(value, dict):
            yield value
            yield from (v for v in value.values() if isinstance(v, dict))


def _uses_alibi(text: Any) -> bool:
    nested = getattr(text, "attn_config", None)
    flags = (
        getattr(text, "alibi", False),
        getattr(nested, "alibi", False),
        getattr(text, "use_alibi", False),
        str(getattr(text, "position_embedding_type", "")).lower() == "alibi",
    )
    return any(flag is True for flag in flags)


# ---------------------------------------------------------------------------------------------------------------------
# What the model does
# ---------------------------------------------------------------------------------------------------------------------


def state_token(model: torch.nn.Module) -> str:
    """Changes when the frequencies of a model are replaced (another dtype, another device, edited rope)."""
    return ";".join(f"{n}:{b.dtype}:{b.data_ptr()}:{b._version}" for n, b in _frequency_buffers(model))


def _frequency_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1 and buffer.numel():
            yield name, buffer


def _frequencies(model: torch.nn.Module) -> list[torch.Tensor]:
    """The model's distinct frequency vectors, in the dtype they are kept in."""
    distinct: list[torch.Tensor] = []
    for _, buffer in _frequency_buffers(model):
        vector = buffer.detach().cpu().clone()  # ours: the model may write to its buffer
        if not any(v.shape == vector.shape and torch.equal(v, vector) for v in distinct):
            distinct.append(vector)
    return distinct


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _far(model: torch.nn.Module) -> int:
    longest = getattr(_text_config(model), "max_position_embeddings", None) or 4096
    return max(1, min(_SHIFT, longest - _TOKENS - 1))


def _tolerance(model: torch.nn.Module) -> float:
    """Relative L2 error that rounding explains. In half precision every layer adds some."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    return {torch.float64: 1e-3, torch.float32: 1e-3}.get(dtype, 0.08)


@torch.no_grad()
def _keys_at(model: torch.nn.Module, first: int) -> list[torch.Tensor | None]:
    """Per layer the cached keys [1, H, S, D], fp32 on the CPU, of a fixed random prompt that starts at `first`."""
    from transformers import DynamicCache

    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(
            f"model: {type(model).__name__} takes no position_ids (ALiBi or learned positions), so keys cannot be "
            "computed elsewhere and compared"
        )
    vocabulary = _text_config(model).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), min(vocabulary, 1000), (1, _TOKENS), generator=generator)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    positions = torch.arange(first, first + _TOKENS)[None]
    cache = DynamicCache(config=model.config)
    with _evaluating(model):
        model(
            input_ids=ids.to(device), position_ids=positions.to(device), past_key_values=cache, use_cache=True
        )  # fmt: skip
    keys: list[torch.Tensor | None] = []
    for layer in cache.layers:
        k: Any = getattr(layer, "keys", None)
        usable = isinstance(k, torch.Tensor) and k.dim() == 4 and k.numel() > 0
        keys.append(k.float().cpu() if usable else None)
    return keys


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout would make two runs differ."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _positions(keys: torch.Tensor) -> torch.Tensor:
    """Positions of the kept keys; a sliding-window layer keeps only the last ones of the prompt."""
    return torch.arange(_TOKENS - keys.shape[2], _TOKENS)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def _explain(
    near: torch.Tensor, far: torch.Tensor, shift: int, candidates: list[torch.Tensor], tolerance: float
) -> LayerRope | None:
    """The layout and frequency vector under which `near`, moved by `shift`, is `far`; None if none fits."""
    best: tuple[float, LayerRope | None] = (tolerance, None)
    for layout in _LAYOUTS:
        for vector in candidates:
            rope = LayerRope(layout, 2 * vector.numel(), near.shape[-1], vector.float())
            if rope.rotary_dim > rope.head_dim:
                continue
            error = _relative(_moved(rope, near, shift), far)
            if error < best[0]:
                best = (error, rope)
    return best[1]


def _moved(rope: LayerRope, keys: torch.Tensor, shift: int) -> torch.Tensor:
    relocator = Relocator([rope], RopeSignature(""))
    return relocator.relocate(keys, shift, 0, source=_positions(keys))


def _estimate(model: torch.nn.Module, layer: int, near: torch.Tensor, tolerance: float) -> LayerRope | None:
    """Frequencies from the keys themselves, for models that keep no frequency vector (GPT-J has a table of sines).

    The angle of a plane after one step gives its frequency roughly; after 8, 64, 512 steps the full turns are known
    from the step before and the error is divided by 8 each time. Needs fp32 keys.
    """
    if tolerance > 1e-3:
        return None
    longest = getattr(_text_config(model), "max_position_embeddings", None) or 4096
    shifts = [d for d in (1, 8, 64, 512) if d + _TOKENS < longest]
    observed = {d: _keys_at(model, d)[layer] for d in shifts}
    last = observed[shifts[-1]]
    assert last is not None
    changed = ((last - near).abs().amax((0, 1, 2)) > 1e-4 * near.abs().amax()).nonzero().flatten()
    if changed.numel() == 0:
        return None
    rotary_dim = 2 * math.ceil((int(changed[-1]) + 1) / 2)
    for layout in _LAYOUTS:
        freq = torch.zeros(rotary_dim // 2, dtype=torch.float64)
        for d in shifts:
            keys = observed[d]
            assert keys is not None
            phase = torch.angle(
                (_planes(keys, rotary_dim, layout) * _planes(near, rotary_dim, layout).conj()).sum((0, 1, 2))
            )
            turns = ((freq * d - phase) / (2 * math.pi)).round() if d > 1 else 0
            freq = (phase + 2 * math.pi * turns) / d
        rope = LayerRope(layout, rotary_dim, near.shape[-1], freq.float())
        if _relative(_moved(rope, near, shifts[-1]), last) < tolerance:
            return rope
    return None


def _planes(keys: torch.Tensor, rotary_dim: int, layout: Layout) -> torch.Tensor:
    """The rotated coordinates as complex numbers [..., R/2]."""
    x = keys[..., :rotary_dim].double()
    if layout == "half":
        return torch.complex(x[..., : rotary_dim // 2], x[..., rotary_dim // 2 :])
    return torch.complex(x[..., 0::2], x[..., 1::2])
