"""Scores of every KV head from one pass, streamed over key blocks.

For the rows of a suffix the keys fall into rings: sinks plus the smallest window, then what each larger window adds,
then the far rest. Each ring gets its own softmax partial (maximum, sum, weighted values) in fp32, accumulated over key
blocks; merging the first rings gives the output under each window and merging all gives full attention, so every
window is scored for the price of one attention. Memory is one block of scores plus O(rows) per layer: no attention
matrix exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .intercept import AttentionCall

__all__ = ["HeadScores", "RingOutputs", "ring_attention"]

_KEY_BLOCK = 2048
_EMPTY = -1e30  # finite, so that exp(-inf - _EMPTY) is 0 and not NaN


@dataclass
class RingOutputs:
    """Attention of some rows under each window and in full.

    Attributes:
        windowed: fp32 `[windows, batch, query_heads, rows, dim]`.
        full: fp32 `[batch, query_heads, rows, dim]`.
        far_mass: fp32 `[windows, batch, query_heads, rows]`: attention outside sink + window.
        far_value_mass: the same with every key weighted by the norm of its value.
        lse: fp32 `[batch, query_heads, rows]`: log of the full softmax denominator.
    """

    windowed: Tensor
    full: Tensor
    far_mass: Tensor
    far_value_mass: Tensor
    lse: Tensor


def _scores(call: AttentionCall, key: Tensor) -> Tensor:
    """fp32 `[batch, query_heads, rows, keys]`."""
    batch, heads, rows, dim = call.query.shape
    kv_heads = key.shape[1]
    folded = call.query.float().reshape(batch, kv_heads, call.groups * rows, dim)
    scores = (folded @ key.float().transpose(2, 3)) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores.reshape(batch, heads, rows, -1)


@torch.no_grad()
def ring_attention(call: AttentionCall, sink: int, windows: Sequence[int], key_block: int = _KEY_BLOCK) -> RingOutputs:
    """Full attention and attention under every window, for the rows of `call`.

    Args:
        call: a layer's inputs.
        sink: tokens that every window sees besides.
        windows: increasing window sizes in tokens.
        key_block: keys per block.
    """
    batch, heads, rows, _ = call.query.shape
    kv_heads, total, dim = call.key.shape[1], call.key.shape[2], call.value.shape[3]
    device = call.query.device
    positions = torch.arange(call.offset, total, device=device)[:, None]
    rings = len(windows) + 1
    top = torch.full((rings, batch, heads, rows, 1), _EMPTY, device=device)
    mass = torch.zeros_like(top)
    # The values carry their norm as one more column: its weighted sum is the value-weighted mass.
    acc = torch.zeros(rings, batch, heads, rows, dim + 1, device=device)
    bounds = [0, *windows, total + 1]

    # Which keys a ring can reach is arithmetic on positions, so every ring reads its own slice: the sinks, then from the
    # oldest key of the first row to the newest of the last one. The far ring is the long one.
    reach = [(0, 0, min(sink, total))]
    for ring in range(rings):
        low, high = max(sink, call.offset - bounds[ring + 1] + 1), min(total, total - bounds[ring])
        reach += [(ring, low, high)]
    for ring, low, high in reach:
        for start in range(low, high, key_block):
            stop = min(start + key_block, high)
            keys = torch.arange(start, stop, device=device)[None]
            value = call.value[:, :, start:stop].float()
            value = torch.cat([value, value.norm(dim=-1, keepdim=True)], dim=-1)
            age = positions - keys
            inside = age >= 0
            if call.model_window:
                inside &= age < call.model_window
            if start >= sink:
                inside &= (age >= bounds[ring]) & (age < bounds[ring + 1])
            masked = _scores(call, call.key[:, :, start:stop]).masked_fill_(~inside, float("-inf"))
            new_top = torch.maximum(top[ring], masked.amax(-1, keepdim=True))
            shrink = torch.exp(top[ring] - new_top)
            weights = masked.sub_(new_top).exp_()
            mass[ring] = mass[ring] * shrink + weights.sum(-1, keepdim=True)
            folded = weights.reshape(batch, kv_heads, call.groups * rows, -1) @ value
            acc[ring] = acc[ring] * shrink + folded.reshape(batch, heads, rows, dim + 1)
            top[ring] = new_top

    highest = top.amax(0)
    if call.sink_logits is not None:
        highest = torch.maximum(highest, call.sink_logits.float().reshape(1, heads, 1, 1))
    scale = torch.exp(top - highest)
    mass, acc = (mass * scale).cumsum(0), (acc * scale).cumsum(0)
    extra = torch.zeros_like(highest)
    if call.sink_logits is not None:
        extra = torch.exp(call.sink_logits.float().reshape(1, heads, 1, 1) - highest)
    out = acc / (mass + extra).clamp_min(1e-30)
    full_mass, full_norm = mass[-1], acc[-1, ..., -1:]
    return RingOutputs(
        windowed=out[:-1, ..., :-1],
        full=out[-1, ..., :-1],
        far_mass=(1 - mass[:-1] / full_mass.clamp_min(1e-30)).squeeze(-1).clamp(0, 1),
        far_value_mass=(1 - acc[:-1, ..., -1:] / full_norm.clamp_min(1e-30)).squeeze(-1).clamp(0, 1),
        lse=(highest + torch.log(full_mass + extra)).squeeze(-1),
    )


@dataclass
class HeadScores:
    """Sums over rows, one number per (layer, KV head[, window]); `means()` turns them into scores.

    A KV head's score joins its query heads: errors as ratios of summed squares, masses as means and maxima.

    Attributes:
        layers, heads: the profile's shape.
        windows: window sizes in tokens, increasing.
        sink: tokens.
    """

    layers: int
    heads: int
    windows: tuple[int, ...]
    sink: int
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sums:
            shape = (self.layers, self.heads, len(self.windows))
            for kind in ("text", "needle"):
                self.sums[f"{kind}_error"] = torch.zeros(shape, dtype=torch.float64)
                self.sums[f"{kind}_far_value_mass"] = torch.zeros(shape, dtype=torch.float64)
                self.sums[f"{kind}_far_mass"] = torch.zeros(shape, dtype=torch.float64)
                self.sums[f"{kind}_norm"] = torch.zeros(self.layers, self.heads, dtype=torch.float64)
                self.sums[f"{kind}_max_far_mass"] = torch.zeros(shape, dtype=torch.float64)
                self.sums[f"{kind}_rows"] = torch.zeros(self.layers, dtype=torch.float64)
            self.sums["retrieval"] = torch.zeros(self.layers, self.heads, dtype=torch.float64)
            self.sums["retrieval_rows"] = torch.zeros(self.layers, dtype=torch.float64)

    def add(
        self, kind: str, call: AttentionCall, rings: RingOutputs, target: Tensor, needles: Sequence[tuple[int, int]]
    ) -> None:
        """Count one layer of one batch.

        Args:
            kind: "text" or "needle".
            call: the layer's inputs.
            rings: from `ring_attention`.
            target: bool `[batch, rows]`: the rows that count.
            needles: per sample, the context positions of the needle; (0, 0) for text.
        """
        layer, groups = call.layer, call.groups
        kv_heads = call.key.shape[1]
        weight = target[:, None, :].double()

        def per_kv_head(values: Tensor) -> Tensor:  # [..., batch, query_heads, rows] -> [..., kv_heads]
            summed = (values.double() * weight).sum(-1)
            return summed.unflatten(-1, (kv_heads, groups)).sum(-1).sum(-2)

        # Per sample and query head the mean over rows; then the worst query head and sample.
        mean = (rings.far_mass.double() * weight).sum(-1) / weight.sum(-1).clamp_min(1)
        worst = mean.unflatten(-1, (kv_heads, groups)).amax(-1).amax(-2)
        parts = [
            per_kv_head(rings.full.square().sum(-1))[None],
            per_kv_head(torch.stack([(rings.full - one).square().sum(-1) for one in rings.windowed])),
            per_kv_head(rings.far_mass),
            per_kv_head(rings.far_value_mass),
            worst,
            target.sum().double().expand(1, kv_heads),
        ]
        known = [last > first for first, last in needles]
        if any(known):
            parts.append(self._retrieval(call, rings, target, needles))
        # One copy for everything: every copy makes Python wait for the device.
        norm, error, mass, value_mass, worst, count, *retrieval = torch.cat(parts).cpu().split([len(p) for p in parts])
        self.sums[f"{kind}_norm"][layer] += norm[0]
        self.sums[f"{kind}_rows"][layer] += count[0, 0] * groups
        self.sums[f"{kind}_error"][layer] += error.T
        self.sums[f"{kind}_far_mass"][layer] += mass.T
        self.sums[f"{kind}_far_value_mass"][layer] += value_mass.T
        highest = self.sums[f"{kind}_max_far_mass"][layer]
        self.sums[f"{kind}_max_far_mass"][layer] = torch.maximum(highest, worst.T)
        if retrieval:
            self.sums["retrieval"][layer] += retrieval[0][0]
            self.sums["retrieval_rows"][layer] += retrieval[0][1, 0]

    @staticmethod
    def _retrieval(
        call: AttentionCall, rings: RingOutputs, target: Tensor, needles: Sequence[tuple[int, int]]
    ) -> Tensor:
        """`[2, kv_heads]`: attention of the target rows on the needles, best query head, summed over samples; samples
        that have needle and targets."""
        device, groups = target.device, call.groups
        longest = max(1, *(last - first for first, last in needles))
        spans = torch.tensor(needles).to(device)
        index = spans[:, :1] + torch.arange(longest, device=device)
        inside = index < spans[:, 1:]  # [batch, longest]
        index = index.clamp_max(call.key.shape[2] - 1)[:, None, :, None]
        key = call.key.gather(2, index.expand(-1, call.key.shape[1], -1, call.key.shape[3]))
        weights = torch.exp(_scores(call, key) - rings.lse[..., None])
        mass = weights.masked_fill(~inside[:, None, None], 0.0).sum(-1)
        count = target.sum(1)
        mass = (mass * target[:, None]).sum(-1) / count.clamp_min(1)[:, None]
        best = mass.unflatten(-1, (-1, groups)).amax(-1).double()  # [batch, kv_heads]
        used = (inside.any(1) & (count > 0)).double()
        return torch.stack([used @ best, used.sum().expand(best.shape[1])])

    def means(self) -> dict[str, Tensor]:
        """Scores: `*_error` `[layers, heads, windows]` (relative, at o_proj input), `*_far_mass`, `*_far_value_mass`
        (shares of attention), `*_max_far_mass` (worst query head and prompt), `retrieval` `[layers, heads]` (attention
        of answer rows on the needle, best query head)."""
        out: dict[str, Tensor] = {}
        for kind in ("text", "needle"):
            rows = self.sums[f"{kind}_rows"].clamp_min(1)[:, None, None]
            norm = self.sums[f"{kind}_norm"].clamp_min(1e-30)[..., None]
            out[f"{kind}_error"] = (self.sums[f"{kind}_error"] / norm).sqrt()
            out[f"{kind}_far_mass"] = self.sums[f"{kind}_far_mass"] / rows
            out[f"{kind}_far_value_mass"] = self.sums[f"{kind}_far_value_mass"] / rows
            out[f"{kind}_max_far_mass"] = self.sums[f"{kind}_max_far_mass"].clone()
        out["retrieval"] = self.sums["retrieval"] / self.sums["retrieval_rows"].clamp_min(1)[:, None]
        return out
