"""The family's own rotary code as a relocation: for layouts that cos/sin tables of ours cannot express.

The model's rotary module is copied and frozen: its frequencies stay those in use now, without updates by length, and
the magnitude factor that yarn puts on cos and sin is 1 (it is already in the stored key). Asked for the distance as if
it were a position, it gives the cos and sin of the distance, and the family's own `apply_rotary_pos_emb` applies them.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch

__all__ = ["OwnRotary"]


class OwnRotary:
    """Relocation of one layer's keys by the family's own functions. Build with `OwnRotary.of`."""

    def __init__(self, rotary: torch.nn.Module, function: Any, arguments: dict[str, Any]) -> None:
        self._rotary = _frozen(rotary)
        self._function = function
        self._arguments = arguments
        self._pair = list(inspect.signature(function).parameters)[:2] == ["q", "k"]

    @classmethod
    def of(cls, model: torch.nn.Module, layer: int) -> OwnRotary | None:
        """The functions of a model, or None if it has no rotary module with an `apply_rotary_pos_emb` beside it."""
        rotary = _find(model)
        if rotary is None:
            return None
        function = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
        if function is None:
            return None
        forward = inspect.signature(inspect.unwrap(type(rotary).forward))
        config: Any = model.config
        types = getattr(config.get_text_config(), "layer_types", None)
        arguments = {"layer_type": types[layer]} if "layer_type" in forward.parameters and types else {}
        return cls(rotary, function, arguments)

    @torch.no_grad()
    def __call__(self, keys: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """keys [B, H, S, D] moved by delta [S] or [B, S]; fp32 inside, rounded once."""
        x = keys.float()
        distance = delta.to(x.device).expand(x.shape[0], x.shape[2])
        cos, sin = self._rotary.to(x.device)(x, distance, **self._arguments)
        width = cos.shape[-1]
        # Some families slice the rotated part in the attention class, so their function expects exactly that.
        turned = self._apply(x[..., :width], cos, sin)
        return torch.cat((turned, x[..., width:]), -1).to(keys.dtype)

    def _apply(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self._function(x, x, cos, sin)[1] if self._pair else self._function(x, cos, sin)


def _find(model: torch.nn.Module) -> torch.nn.Module | None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("rotary_emb", "rotary_embedding", "rope"):
            return module
    return None


def _frozen(rotary: torch.nn.Module) -> torch.nn.Module:
    frozen: Any = copy.deepcopy(rotary)
    kind = getattr(frozen, "rope_type", None)
    if kind is not None:
        frozen.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    for name, value in list(vars(frozen).items()):
        if name.endswith("attention_scaling"):
            setattr(frozen, name, dict.fromkeys(value, 1.0) if isinstance(value, dict) else 1.0)
    return frozen
