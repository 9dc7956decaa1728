"""Rows that are left out and get the mean of what the FFN gives to the others."""

from __future__ import annotations

import pytest
import torch
from sparse_models import CONFIGS, tiny, tokens

from redknot_hf.errors import UnsupportedModel
from redknot_hf.segments import SegmentedPrompt, SegmentStore
from redknot_hf.sparse_ffn import SparseFFN, SparseFFNSchedule
from redknot_hf.sparse_ffn import run as run_module
from redknot_hf.sparse_ffn.structure import find_blocks

SCHEDULE = SparseFFNSchedule(
    keep=0.5, first_layer=1, sink=2, recent=6, boundary=3, query_block=5, bucket=4, min_rows=0, fill="mean"
)


@torch.no_grad()
def with_means(model, ids, passing, sink):
    """Logits by the definition: every FFN runs over all rows; rows that do not pass get a mean of their sequence.

    Args:
        passing: layer -> bool ``[batch, rows]``.
    """
    hooks = []
    for layer, rows in passing.items():

        def fill(module, args, output, rows=rows):
            x = output[0] if isinstance(output, tuple) else output
            x = x.clone()
            for b in range(len(x)):
                counts = rows[b] & (torch.arange(x.shape[1]) >= sink)
                x[b, ~rows[b]] = x[b, counts].mean(0)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        hooks.append(model.get_decoder().layers[layer].mlp.register_forward_hook(fill))
    try:
        return model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "cohere", "gpt_neox"])
def test_rows_left_out_get_the_mean_of_those_that_pass(name, monkeypatch):
    model, ids, chosen = tiny(name), tokens(2, 40), []
    select = run_module.select_rows
    monkeypatch.setattr(run_module, "select_rows", lambda *args: chosen.append(select(*args)) or chosen[-1])
    with torch.no_grad(), SparseFFN(model, SCHEDULE) as context:
        found = model(ids).logits
    assert context.stats.run == [80, 40, 40, 40]
    passing = {}
    for layer, index in zip((1, 2, 3), chosen, strict=True):
        passing[layer] = torch.zeros(80, dtype=torch.bool)
        passing[layer][index] = True
        passing[layer] = passing[layer].view(2, 40)
    expected = with_means(model, ids, passing, 2)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    for wrong in (0, 7):  # the comparison tells which rows the mean is of
        assert (found - with_means(model, ids, passing, wrong)).abs().max() > 1e-3 * expected.abs().max()


def test_a_block_that_norms_what_its_ffn_gives_is_refused():
    assert [block.adds for block in find_blocks(tiny("gemma2"))] == [False] * 4
    assert all(block.adds for name in set(CONFIGS) - {"gemma2"} for block in find_blocks(tiny(name)))
    with pytest.raises(UnsupportedModel, match=r"layer 1 \(Gemma2DecoderLayer\).*fill='nothing'"):
        SparseFFN(tiny("gemma2"), SCHEDULE)
    SparseFFN(tiny("gemma2"), SCHEDULE.replace(keep=1.0))


def test_a_splice_leaves_the_prompts_sinks_out_of_the_mean(monkeypatch):
    model, masks = tiny("llama"), []
    original = run_module.Run._beyond_sinks

    def spy(self, *args):
        masks.append((self.rows.splice.rows.host.copy(), original(self, *args)))
        return masks[-1][1]

    monkeypatch.setattr(run_module.Run, "_beyond_sinks", spy)
    prompt = SegmentedPrompt(model, None, SegmentStore("memory://"), None)
    segments = [prompt.add(tokens(1, 30, seed)[0].tolist()) for seed in (5, 6)]
    with SparseFFN(model, SCHEDULE.replace(sink=32)):
        prompt.build(segments, tokens(1, 12, 7)[0].tolist(), recompute=0.5)
    assert masks
    for position, counts in masks:
        assert counts[0].tolist() == (position >= 32).tolist() and not counts.all()


def test_without_any_row_beyond_the_sinks_nothing_is_filled_in():
    model, ids = tiny("llama"), tokens(1, 40)
    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(keep=0.0, bucket=1, sink=20, recent=0)):
        logits = model(ids).logits
    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(keep=0.0, bucket=1, sink=20, recent=0, fill="nothing")):
        assert torch.equal(logits, model(ids).logits)


def test_what_overflows_in_one_sequence_does_not_reach_another():
    model, ids = tiny("llama"), tokens(2, 40)
    mlp = model.get_decoder().layers[2].mlp

    def overflow(module, args, output):
        output = output.clone()
        output[0, 0] = float("inf")  # the first row that passes is the first sequence's
        return output

    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(sink=0)):
        alone = model(ids[1:]).logits
        hook = mlp.register_forward_hook(overflow)
        try:
            both = model(ids).logits
        finally:
            hook.remove()
    assert not both[0].isfinite().all()
    assert torch.allclose(both[1], alone[0], atol=1e-4)
