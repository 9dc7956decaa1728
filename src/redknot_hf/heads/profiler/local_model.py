"""The objective around a head map: what every change of one head, and every set of changes, is predicted to cost.

`curvature` expands KL around full attention, where a profile with few global heads is far away. Here the expansion point
is a map: one backward pass gives the objective's slope along every head's change to every other window (or to global),
and random cotangents of the softmax's Fisher matrix, as in `curvature`, give the second order with all interactions.
`LocalModel` then prices swaps and exchanges without running the model; a search measures only what looks good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .context import gradients, run_suffix
from .intercept import AttentionCall
from .objective import Objective, prompt_terms
from .scores import ring_attention
from .validation import Prompts
from .visibility import HeadMap, visible_attention

__all__ = ["LocalModel", "linearise"]


@dataclass
class LocalModel:
    """Predicted change of the objective for any choice of options, relative to the map it was made at.

    An option of a head is a window (index 0 to W - 1) or global (index W).

    Attributes:
        linear: fp64 `[heads, options]` slope along each change; 0 at the current option.
        second: fp64 `[heads, options, heads, options]` second moments, shrunk towards independent heads.
    """

    linear: Tensor
    second: Tensor

    @classmethod
    def from_rows(cls, linear: Tensor, rows: Tensor, shrinkage: float | None = None) -> LocalModel:
        """Model from slopes and Fisher rows.

        Args:
            linear: `[heads, options]`.
            rows: `[rows, heads, options]`, scaled so that 1/2 of the sum over rows of (sum over heads)^2 is the second
                order.
            shrinkage: 0 trusts the interactions, 1 treats heads as independent. A few hundred random rows cannot resolve
                all cancellations between a hundred heads; unshrunk, a search finds maps that look free only to these
                rows. None takes 1 / (1 + rows / (12 heads)): on held-out text of a 135M model (90 heads, 60 to 100 rows)
                0.85 to 1 was best and 0.3 a quarter worse.
        """
        count, heads, options = rows.shape
        if shrinkage is None:
            shrinkage = 1 / (1 + count / (12 * heads))
        flat = rows.double().flatten(1)
        second = (flat.T @ flat).reshape(heads, options, heads, options) * (1 - shrinkage)
        own = torch.einsum("nhk,nhj->hkj", rows.double(), rows.double())
        index = torch.arange(heads)
        second[index, :, index, :] = own
        return cls(linear.double(), second)

    def total(self, choice: Tensor) -> Tensor:
        """fp64 `[heads, options]`: what all heads in `choice` together do to each option; the costly part of `field`."""
        heads, options = self.linear.shape
        index = torch.arange(heads)
        # Symmetric: rows instead of columns, because rows are contiguous.
        return self.second.reshape(heads * options, -1)[index * options + choice].sum(0).reshape(heads, options)

    def moved(self, total: Tensor, head: int, old: int, new: int) -> Tensor:
        """`total` after one head went from option `old` to `new`."""
        return total + self.second[head, new] - self.second[head, old]

    def field(self, choice: Tensor, total: Tensor | None = None) -> Tensor:
        """fp64 `[heads, options]`: the objective's part that depends on one head, all others as in `choice`, whose
        `total` may be known."""
        total = self.total(choice) if total is None else total
        return self.linear + total - self._own[torch.arange(len(choice)), choice] + self._half

    @cached_property
    def _own(self) -> Tensor:
        """`[heads, options, options]`: every head's block of `second` with itself."""
        index = torch.arange(len(self.second))
        return self.second[index, :, index].contiguous()

    @cached_property
    def _half(self) -> Tensor:
        """`[heads, options]`: half of every option's second order with itself."""
        return 0.5 * self._own.diagonal(dim1=1, dim2=2)

    def predict(self, choice: Tensor) -> float:
        """The change of the objective for `choice` `[heads]` of options."""
        heads = torch.arange(len(choice))
        pairs = self.second[heads, choice][:, heads, choice]
        return float(self.linear[heads, choice].sum() + 0.5 * pairs.sum())

    def swap_gains(self, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every exchange of a global and a local head; the window changes hands.

        Returns:
            global heads `[g]`, local heads `[l]`, and fp64 `[g, l]` predicted change of the objective.
        """
        last = self.linear.shape[1] - 1
        one, two = (choice == last).nonzero()[:, 0], (choice < last).nonzero()[:, 0]
        price = self.field(choice)
        window = choice[two]
        drop = price[one][:, window] - price[one, last][:, None]
        add = price[two, last] - price[two, window]
        second = self.second
        a = second[one[:, None], window[None], two[None], last]
        b = second[one[:, None], window[None], two[None], window[None]]
        c = second[one[:, None], last, two[None], last]
        d = second[one[:, None], last, two[None], window[None]]
        return one, two, drop + add[None] + a - b - c + d


def linearise(
    model: Any,
    prompts: Sequence[Prompts],
    choice: Tensor,
    shape: tuple[int, int],
    cells: Sequence[tuple[int, int]],
    *,
    objective: Objective,
    windows: Sequence[int],
    sink: int,
    sketches: int,
    seed: int,
    step: Callable[[], None] = lambda: None,
) -> LocalModel:
    """Expand the objective around a map, eviction before the question.

    Args:
        model: the decoder; its parameters must not require gradients.
        prompts: batches, each of one kind.
        choice: int64 `[heads]` options of the map: a window's index, or `len(windows)` for global.
        shape: layers, KV heads.
        cells: (layer, head) of every entry of `choice`.
        objective: weights.
        windows, sink: tokens.
        sketches: random backward passes per batch.
        seed: of the cotangents.
        step: called after every batch.
    """
    visible = option_map(choice, shape, cells, windows, sink)
    layers, heads = shape
    options = len(windows) + 1
    current = torch.full(shape, options - 1)
    for (l, h), k in zip(cells, choice.tolist(), strict=True):
        current[l, h] = k
    counts = {True: 0, False: 0}
    for prompt in prompts:
        counts[prompt.batch.kinds[0] == "text"] += len(prompt.batch)
    device = prompts[0].batch.context.device
    linear = torch.zeros(layers, heads, options, device=device)
    rows: list[Tensor] = []
    for number, prompt in enumerate(prompts):
        batch, text = prompt.batch, prompt.batch.kinds[0] == "text"
        changes: dict[int, Tensor] = {}
        probes: dict[int, Tensor] = {}

        def handler(
            call: AttentionCall, changes: dict[int, Tensor] = changes, probes: dict[int, Tensor] = probes
        ) -> Tensor:
            detached = AttentionCall(
                call.layer, call.query.detach(), call.key.detach(), call.value.detach(),
                call.scaling, call.model_window, call.softcap, call.sink_logits,
            )  # fmt: skip
            rings = ring_attention(detached, sink, windows)
            every = torch.cat([rings.windowed, rings.full[None]])  # [options, batch, query_heads, rows, dim]
            index = current[call.layer].to(every.device).repeat_interleave(call.groups)
            here = every[index, :, torch.arange(len(index), device=every.device)].transpose(0, 1)
            out = visible_attention(call, visible.sink[call.layer], visible.window[call.layer])
            changes[call.layer] = every - here
            probes[call.layer] = torch.zeros_like(out, requires_grad=True)
            return out + probes[call.layer]

        def along(gradient: Tensor, layer: int, changes: dict[int, Tensor] = changes) -> Tensor:
            """`[batch, heads, options]`."""
            dots = torch.einsum("kbhrd,bhrd->bhk", changes[layer], gradient)
            return dots.reshape(len(dots), heads, -1, options).sum(2)

        with torch.enable_grad():
            logits = run_suffix(model, prompt.cache, batch.suffix, handler)
            picked = logits[batch.target].float()
            log_probs = picked.log_softmax(-1)
            kl, miss = prompt_terms(log_probs, prompt.log_probs.float(), batch)
            loss = objective.text_kl * kl.sum() if text else (
                objective.needle_kl * kl.sum() + objective.needle_misses * miss.sum()
            )  # fmt: skip
        order = sorted(probes)
        wanted = [probes[layer] for layer in order]
        slopes = gradients(loss / counts[text], wanted, retain_graph=sketches > 0)
        for layer, gradient in zip(order, slopes, strict=True):
            linear[layer] += along(gradient, layer).sum(0)
        weight = (objective.text_kl if text else objective.needle_kl) / (counts[text] * max(sketches, 1))
        generator = torch.Generator(device=picked.device).manual_seed(seed * 100_003 + number)
        with torch.no_grad():
            probability = log_probs.exp()
            root = probability.sqrt()
            scale = (weight / batch.target.sum(1).float()).sqrt()[:, None].expand(batch.target.shape)
            scale = scale[batch.target][:, None]
        found = torch.zeros(len(batch), sketches, layers, heads, options, device=picked.device)
        for s in range(sketches):
            with torch.no_grad():
                sign = torch.randint(0, 2, picked.shape, generator=generator, dtype=torch.int8, device=picked.device)
                noise = root * (2 * sign - 1)
                cotangent = scale * (noise - probability * noise.sum(-1, keepdim=True))
            along_noise = gradients(picked, wanted, cotangent, retain_graph=s + 1 < sketches)
            for layer, gradient in zip(order, along_noise, strict=True):
                found[:, s, layer] = along(gradient, layer)
        rows.append(found.flatten(0, 1).cpu())
        step()
    index = torch.tensor([l * heads + h for l, h in cells])
    return LocalModel.from_rows(linear.cpu().flatten(0, 1)[index], torch.cat(rows).flatten(1, 2)[:, index])


def option_map(
    choice: Tensor, shape: tuple[int, int], cells: Sequence[tuple[int, int]], windows: Sequence[int], sink: int
) -> HeadMap:
    """The head map of a choice of options; heads outside `cells` keep everything."""
    from .visibility import KEEP_ALL

    window = [[KEEP_ALL] * shape[1] for _ in range(shape[0])]
    sinks = [[0] * shape[1] for _ in range(shape[0])]
    for (l, h), k in zip(cells, choice.tolist(), strict=True):
        if k < len(windows):
            window[l][h], sinks[l][h] = windows[k], sink
    return HeadMap(tuple(map(tuple, sinks)), tuple(map(tuple, window)))
