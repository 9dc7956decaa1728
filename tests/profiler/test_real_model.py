"""SmolLM2-135M-Instruct: the heads that are known to carry retrieval must come out on top.

(18, 2), (7, 2) and (23, 0) are the three heads whose loss alone changes its answers most.
"""

from __future__ import annotations

import pytest
import torch

from redknot_hf.heads import HeadProfile
from redknot_hf.heads.profiler.collect import build_prompts, frozen
from redknot_hf.heads.profiler.curvature import score_batch
from redknot_hf.heads.profiler.intercept import decoder_layout
from redknot_hf.heads.profiler.local_model import option_map
from redknot_hf.heads.profiler.many_maps import map_costs
from redknot_hf.heads.profiler.objective import Objective
from redknot_hf.heads.profiler.refine import refine, search_on
from redknot_hf.heads.profiler.scores import HeadScores
from redknot_hf.heads.profiler.tasks import collate
from redknot_hf.heads.profiler.validation import full_reference, measure
from redknot_hf.heads.profiler.visibility import HeadMap

KNOWN = {(18, 2), (7, 2), (23, 0)}


def test_the_shipped_profile_keeps_the_known_heads():
    profile = HeadProfile.load("SmolLM2-135M-Instruct")
    assert all(profile.head_class[l][h] == "global" for l, h in KNOWN)
    assert profile.metadata["budget"]["global_heads"] <= 0.25 * 90 + 1
    local = [w for row in profile.window for w in row if w]
    assert sum(local) <= profile.metadata["budget"]["mean_window"] * len(local)


@pytest.fixture(scope="module")
def needles(smollm2):
    """Two prompts of 640 tokens, both answered by the full cache."""
    return build_prompts(smollm2[1], None, "profile", 2, 1, 640, 32, seed=0)[0]


@pytest.mark.slow
def test_known_heads_rank_on_top(smollm2, needles):
    """About 20 s of one core."""
    model, _ = smollm2
    layout = decoder_layout(model)
    scores = HeadScores(layout.num_layers, layout.num_kv_heads, (256,), 4)
    with frozen(model):
        prompts = [full_reference(model, collate([needle])) for needle in needles]
        for prompt in prompts:
            score_batch(model, prompt.cache, prompt.batch, scores, sketches=0, seed=0, windows=(256,), sink=4)
        cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]

        def kl_without(head):
            visible = HeadMap.uniform(30, 3, 4, 256, keep=[cell for cell in cells if cell != head])
            return sum(row.kl for prompt in prompts for row in measure(model, prompt, visible, "full"))

        cost = {head: kl_without(head) for head in [*sorted(KNOWN), (2, 0), (12, 1), (27, 2)]}
    retrieval = scores.means()["retrieval"]
    top = {divmod(int(i), 3) for i in retrieval.flatten().topk(10).indices}
    assert top >= KNOWN
    assert max(cost, key=cost.__getitem__) == (18, 2)
    assert torch.isfinite(retrieval).all()


@pytest.mark.slow
def test_the_search_brings_the_known_heads_back(smollm2, needles):
    """About 20 s of one core: fourteen global heads, none of them known; one round."""
    model, _ = smollm2
    layout = decoder_layout(model)
    cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]
    windows = (64, 256)
    start = torch.full((90,), 1)
    start[[i for i, cell in enumerate(cells) if cell not in KNOWN][:14]] = 2
    with frozen(model):
        prompts = [full_reference(model, collate([needle])) for needle in needles]
        search = search_on(
            model, layout, prompts, windows=windows, sink=4, objective=Objective(), sketches=1, seed=0, mode="full",
            rounds=1, lengths=(3, 8), singles=0,
        )  # fmt: skip
        best, history = refine(start, 256 * 76, search)
    kept = {cell for cell, option in zip(cells, best.tolist(), strict=True) if option == 2}
    assert (18, 2) in kept and len(kept) == 14 and len(kept & KNOWN) >= 2
    assert history[1]["cost"] < 0.5 * history[0]["cost"]


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_the_search_pays_for_answers_what_it_is_told(smollm2, weight):
    model, tokenizer = smollm2
    layout = decoder_layout(model)
    cells = [(l, h) for l in layout.layers for h in range(layout.num_kv_heads)]
    windows, everything = (64, 256), build_prompts(tokenizer, None, "profile", 2, 1, 640, 32, seed=0)
    choice = torch.full((90,), 0)
    with frozen(model):
        prompts = [full_reference(model, collate([sample])) for kind in everything for sample in kind]
        search = search_on(
            model, layout, prompts, windows=windows, sink=4, objective=Objective.weighted(weight), sketches=1, seed=0,
            mode="full", rounds=0, lengths=(), singles=0,
        )  # fmt: skip
        found = search.cost([choice])[0]
        shape = (layout.num_layers, layout.num_kv_heads)
        text, kl, misses = map_costs(model, prompts, [option_map(choice, shape, cells, windows, 4)])[0].tolist()
    assert text > 0 and kl > 1 and misses > 0.5  # all heads are local: the needles are lost
    assert found == pytest.approx(text + weight * (0.5 * kl + 0.25 * misses))
