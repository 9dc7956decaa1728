"""Every rule for choosing global heads that the comparison knows: a name and an order of heads, most important first.

All rules but ours give local heads one window (256 tokens, or 512); ours spends the same number of tokens unevenly. All see
the same calibration prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from redknot_hf.heads.profiler.collect import Measured
from redknot_hf.heads.profiler.intercept import DecoderLayout
from redknot_hf.heads.profiler.many_maps import map_costs
from redknot_hf.heads.profiler.validation import Prompts
from redknot_hf.heads.profiler.visibility import KEEP_ALL, HeadMap

WINDOW = 256
SINK = 4

RULES = {
    "ours": "candidates from gates and predicted joint KL, then a search over all heads and windows together",
    "gates": "gate optimisation alone, ties by output error on needles",
    "ablation": "KL at needle answers with this head alone local",
    "ablation (text)": "KL on text with this head alone local",
    "retrieval score": "attention of answer rows on the needle, best query head",
    "output error (needle)": "|full - windowed| / |full| at o_proj input, answer rows",
    "output error (text)": "the same on text rows",
    "attention mass": "the original paper's rule: most attention outside sink + window (worst query head and prompt); "
    "its prefix shift, as the total variation between attention with and without the far prefix, is the same number",
    "depth": "deepest layers first, as in the maps the original ships",
    "random 1": "a random order",
    "random 2": "a random order",
    "random 3": "a random order",
}


def orders(
    measured: Measured,
    layout: DecoderLayout,
    ablation: tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]],
    window: int = WINDOW,
) -> dict[str, list[tuple[int, int]]]:
    """Heads by rule, most important first; "ours" is not here (it is not one order)."""
    means = measured.scores.means()
    middle = measured.scores.windows.index(window)
    cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]

    def by(score: Any) -> list[tuple[int, int]]:
        return sorted(cells, key=lambda cell: -float(score(*cell)))

    error = means["needle_error"][..., middle]
    mass = torch.maximum(means["needle_max_far_mass"], means["text_max_far_mass"])[..., middle]
    assert measured.gates is not None
    gates = measured.gates
    found = {
        "gates": by(lambda l, h: gates[l, h] + 1e-6 * error[l, h]),
        "ablation": by(lambda l, h: ablation[0][l, h]),
        "ablation (text)": by(lambda l, h: ablation[1][l, h]),
        "retrieval score": by(lambda l, h: means["retrieval"][l, h]),
        "output error (needle)": by(lambda l, h: error[l, h]),
        "output error (text)": by(lambda l, h: means["text_error"][l, h, middle]),
        "attention mass": by(lambda l, h: mass[l, h]),
        "depth": by(lambda l, h: l),
    }
    for draw in (1, 2, 3):
        shuffled = list(cells)
        random.Random(draw).shuffle(shuffled)
        found[f"random {draw}"] = shuffled
    return found


def ablate(
    model: Any, layout: DecoderLayout, prompts: Sequence[Prompts], window: int = WINDOW
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
    """KL at the answers, and on text, with one head local and all others global, eviction before the question."""
    cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]
    costs = map_costs(model, prompts, [uniform_map(layout, [c for c in cells if c != cell], window) for cell in cells])
    return dict(zip(cells, costs[:, 1].tolist(), strict=True)), dict(zip(cells, costs[:, 0].tolist(), strict=True))


def uniform_map(layout: DecoderLayout, chosen: Sequence[tuple[int, int]], window: int = WINDOW) -> HeadMap:
    """`chosen` global, all others local with the one window."""
    return HeadMap.uniform(layout.num_layers, layout.num_kv_heads, SINK, window, keep=chosen)


def kv_fraction(visible: HeadMap, layout: DecoderLayout, tokens: int) -> float:
    """KV tokens kept after `tokens` tokens, as a share of the full cache's."""
    kept = 0
    for l in layout.layers:
        for h in range(layout.num_kv_heads):
            window = visible.window[l][h]
            kept += tokens if window >= KEEP_ALL else min(tokens, visible.sink[l][h] + window)
    return kept / (tokens * len(layout.layers) * layout.num_kv_heads)
