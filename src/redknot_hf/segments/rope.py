"""Relocation: cached keys moved to another position by one rotation, R(p + d) = R(d) R(p).

A decoder puts *rotated* keys into its cache. Since rotations add up, a key computed at position p becomes the key of
position p + d when it is rotated by d, and values do not depend on the position at all. Three facts about a layer
suffice: which coordinates form a plane, how many of them are rotated, and how fast each plane turns. They are not
looked up by family but measured on the model itself (`rope_probe`), so there is no per-model code.

The rotation is done in fp32 from the stored key and rounded once. Kernels take `Relocator.tables` and do the same.

What this module does not know: families whose frequencies change with the length of the sequence (dynamic NTK, longrope
across its switch), learned positions, ALiBi, MLA latents and image positions. `Relocator.from_model` refuses them by
name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch

from redknot_hf.errors import RedKnotError, UnsupportedModel
from redknot_hf.segments.keys import hash_fields

__all__ = ["LayerRope", "Relocator", "RopeSignature", "rotate", "rotate_into"]

Layout = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True)
class LayerRope:
    """How one layer rotates its keys.

    Attributes:
        layout: `"half"`: coordinate i forms a plane with i + R/2 (llama). `"interleaved"`: 2i with 2i + 1 (GPT-J, GLM,
            Cohere).
        rotary_dim: R; the first R coordinates of a key turn, the rest do not.
        head_dim: coordinates of a key.
        inv_freq: fp32 [R/2] on the CPU; radians per position of each plane.
    """

    layout: Layout
    rotary_dim: int
    head_dim: int
    inv_freq: torch.Tensor = dataclasses.field(compare=False)

    def same_as(self, other: LayerRope | None) -> bool:
        """Whether both rotate alike, so that one pair of tables serves both layers."""
        return self == other and other is not None and torch.equal(self.inv_freq, other.inv_freq)


@dataclasses.dataclass(frozen=True)
class RopeSignature:
    """What decides whether the stored keys of one model can be moved by another: part of every `SegmentKey`.

    Two processes that load the same model get equal signatures, on any device. A signature of a config lacks what only
    the model can tell (`layers` is empty) and is not equal to the signature of the model; keys are built from the
    latter.

    Attributes:
        parameters: the declared parameters (types, theta, scaling, partial factor, layer types, NoPE layers) as
            canonical JSON.
        precision: dtype of the frequencies in use; a model that was cast as a whole turns differently.
        layers: per layer as measured, e.g. `"half:64/64"`, `"interleaved:32/128"`, or `"none"` for a NoPE layer.
    """

    parameters: str
    precision: str = ""
    layers: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """64 hex digits."""
        fields = [self.parameters, self.precision, *self.layers]
        return hash_fields("redknot-hf/rope-signature/1", [f.encode() for f in fields])

    @classmethod
    def of(cls, source: Any) -> RopeSignature:
        """The signature of a model (measured once and remembered) or of a config.

        Raises:
            UnsupportedModel: if keys of such a model cannot be relocated; the message names the reason.
        """
        from redknot_hf.segments.rope_probe import declared_parameters, refuse_by_config

        if isinstance(source, torch.nn.Module):
            return Relocator.from_model(source).signature
        refuse_by_config(source)
        return cls(declared_parameters(source))


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rotate the first R coordinates of every key: the reference of the fused page copy.

    Args:
        keys: [..., D], any float dtype.
        cos, sin: fp32, broadcastable to [..., R/2].
        layout: which coordinates form a plane.

    Returns:
        Like `keys`; computed in fp32, rounded once.
    """
    x = keys.float()
    r = 2 * cos.shape[-1]
    if layout == "half":
        a, b = x[..., : r // 2], x[..., r // 2 : r]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = x[..., 0:r:2], x[..., 1:r:2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., r:]), -1).to(keys.dtype)


def rotate_into(out: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Layout) -> None:
    """`rotate` with the result in ``out``, which must not be ``keys``; fp32 in two halves needs no other memory."""
    r = 2 * cos.shape[-1]
    if layout != "half" or keys.dtype != torch.float32 or out.dtype != torch.float32:
        out.copy_(rotate(keys, cos, sin, layout))
        return
    a, b = keys[..., : r // 2], keys[..., r // 2 : r]
    for target, x, y, sign in ((out[..., : r // 2], a, b, -1), (out[..., r // 2 : r], b, a, 1)):
        torch.mul(x, cos, out=target)
        target.addcmul_(y, sin, value=sign)
    out[..., r:] = keys[..., r:]


_known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, Relocator]] = weakref.WeakKeyDictionary()


class Relocator:
    """Moves cached keys of one model.

    Args:
        layers: per layer how it rotates, or None if it does not (NoPE): keys of such a layer are left alone.
        signature: goes into the keys of stored segments.
        text_only: the model places images on several axes; only segments without images may be moved.
        own: per layer, the family's own rotary function where the layout is none that we know (see `rope_own`).
    """

    def __init__(
        self,
        layers: Sequence[LayerRope | None],
        signature: RopeSignature,
        *,
        text_only: bool = False,
        own: dict[int, Any] | None = None,
    ) -> None:
        self.layers = list(layers)
        self.signature = signature
        self.text_only = text_only
        self._own = own or {}
        self.groups = _group(self.layers)

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> Relocator:
        """Measure how a model rotates its keys: a few forwards over 16 tokens, once per model object.

        Raises:
            UnsupportedModel: if its keys cannot be relocated; the message names the reason.
        """
        from redknot_hf.segments.rope_probe import measure, state_token

        token = state_token(model)
        known = _known.get(model)
        if known is None or known[0] != token:
            known = (token, measure(model))
            _known[model] = known
        return known[1]

    @property
    def nope_layers(self) -> list[int]:
        """Layers without a rotary embedding: their keys are the same at every position."""
        return [i for i, rope in enumerate(self.layers) if rope is None and i not in self._own]

    def rope(self, layer: int) -> LayerRope | None:
        """How a layer rotates; None for NoPE.

        Raises:
            UnsupportedModel: if the layer's layout can only be moved by `relocate`.
        """
        if layer in self._own:
            raise UnsupportedModel(f"layer {layer}: its rotary layout has no tables; use Relocator.relocate")
        return self.layers[layer]

    def tables(
        self,
        delta: torch.Tensor | int,
        layer: int,
        *,
        source: torch.Tensor | int = 0,
        device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin of the rotation by `delta`, for a kernel that rotates while it copies.

        Layers of one group (`groups[layer]`) have equal tables: compute them once.

        Args:
            delta: integer distance, any shape; negative moves to the left.
            layer: layer index.
            source: positions at which the keys were computed, broadcastable to `delta`. A model rounds each angle to
                fp32; with the source known the difference of its own two rounded angles is taken, and the result equals
                recomputation at any position. Without it the error grows to 4e-3 rad at 100,000 tokens.
            device: of the result; by default that of `delta`.

        Returns:
            Two fp32 tensors [*delta.shape, R/2], or None for a NoPE layer.
        """
        rope = self.rope(layer)
        if rope is None:
            return None
        distance = torch.as_tensor(delta)
        target = device if device is not None else distance.device
        if distance.dtype.is_floating_point:
            raise RedKnotError(f"delta must hold integers, got {distance.dtype}")
        # MPS has no float64; these tables are small.
        work = torch.device("cpu") if torch.device(target).type == "mps" else torch.device(target)
        start = torch.as_tensor(source).to(work)[..., None]
        end = start + distance.to(work)[..., None]
        freq = rope.inv_freq.to(work)
        # Products in fp32, as every model computes them; their difference and its cosine in float64.
        angle = (end.float() * freq).double() - (start.float() * freq).double()
        return angle.cos().float().to(target), angle.sin().float().to(target)

    def relocate(
        self,
        keys: torch.Tensor,
        delta: torch.Tensor | int,
        layer: int,
        *,
        source: torch.Tensor | int = 0,
    ) -> torch.Tensor:
        """Keys as if they had been computed `delta` positions further on.

        Args:
            keys: [B, H, S, D] rotated keys of one layer.
            delta: int, or integers [S] or [B, S].
            layer: layer index.
            source: positions at which they were computed, same shapes as `delta`; see `tables`.

        Returns:
            Like `keys`, fp32 inside, rounded once. `keys` itself if nothing moves.
        """
        if isinstance(delta, int):
            if delta == 0:
                return keys
            delta = torch.full((keys.shape[2],), delta, device=keys.device)
        if delta.dim() > 2:
            raise UnsupportedModel(
                f"delta has shape {tuple(delta.shape)}: positions of images have several axes and cannot be moved; "
                "only segments of text can"
            )
        if layer in self._own:
            return self._own[layer](keys, delta)
        tables = self.tables(delta, layer, source=source, device=keys.device)
        if tables is None:
            return keys
        cos, sin = (t[None, None] if t.dim() == 2 else t[:, None] for t in tables)
        return rotate(keys, cos, sin, self.layers[layer].layout)  # type: ignore[union-attr]


def _group(layers: Sequence[LayerRope | None]) -> list[int]:
    """For each layer the first layer that rotates alike; -1 for NoPE."""
    result = []
    for i, rope in enumerate(layers):
        result.append(-1 if rope is None else next(j for j in range(i + 1) if rope.same_as(layers[j])))
    return result


def canonical_json(value: Any) -> str:
    """JSON that does not depend on the order of insertion; tensors and dtypes as text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
