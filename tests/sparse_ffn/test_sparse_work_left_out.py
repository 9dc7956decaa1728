"""What a sparse prefill does not do: measure where importance has no say, norm rows that are left out."""

from __future__ import annotations

import pytest
import torch
from sparse_models import CONFIGS, tiny, tokens, with_rows
from transformers import AutoModelForCausalLM

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.sparse_ffn import Band, SparseFFN, SparseFFNSchedule, importance
from redknot_hf.sparse_ffn import run as run_module
from redknot_hf.sparse_ffn.run import Run
from redknot_hf.sparse_ffn.structure import find_blocks

SCHEDULE = SparseFFNSchedule(keep=0.5, first_layer=1, sink=2, recent=6, boundary=3, query_block=5, bucket=4, min_rows=0)


@pytest.fixture
def watched(monkeypatch):
    """(masses that attention gave, rows that were chosen), in order."""
    masses, rows = [], []
    mass, select = run_module.attention_call_mass, run_module.select_rows
    monkeypatch.setattr(run_module, "attention_call_mass", lambda *args: masses.append(mass(*args)) or masses[-1])
    monkeypatch.setattr(run_module, "select_rows", lambda *args: rows.append(select(*args)) or rows[-1])
    return masses, rows


def importances(monkeypatch):
    found, original = {}, Run._importance

    def spy(self, layer, *rest):
        found[layer] = original(self, layer, *rest)
        return found[layer]

    monkeypatch.setattr(Run, "_importance", spy)
    return found


def test_memory_adds_what_the_layers_measured_before_had(watched, monkeypatch):
    model, ids, found = tiny("llama"), tokens(2, 40), importances(monkeypatch)
    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(memory=0.5)):
        model(ids)
    masses = watched[0]
    assert len(masses) == 3
    assert torch.equal(found[1], masses[0])
    assert torch.allclose(found[2], masses[1] + masses[0] / 2, atol=1e-6)
    assert torch.allclose(found[3], masses[2] + masses[1] / 2 + masses[0] / 4, atol=1e-6)
    with torch.no_grad(), SparseFFN(model, SCHEDULE):
        model(ids)
    assert torch.equal(found[3], masses[-1])


@pytest.mark.parametrize("rule", [dict(keep=0.0), dict(keep=None, mass=0.0)])
def test_where_only_rows_pass_that_always_do_nothing_is_measured(rule, watched):
    model, ids = tiny("llama"), tokens(2, 40)
    schedule = SCHEDULE.replace(bucket=4, sink=3, **rule)
    assert schedule.measured(4) == ()
    with torch.no_grad(), SparseFFN(model, schedule):
        model(ids)
    masses, rows = watched
    assert not masses and len(rows) == 1  # one choice for all three layers
    line = [0, 1, 2, *range(31, 40)]  # 3 + 6 rounded up to 12 with the most recent
    assert rows[0].tolist() == line + [40 + row for row in line]
    other = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa").eval()
    with torch.no_grad(), SparseFFN(other, schedule):  # so it needs no attention of ours
        other(ids)


def test_importance_is_measured_where_it_has_a_say():
    bands = (Band(1, keep=0.5), Band(2, keep=0.0), Band(4, keep=1.0), Band(5, keep=0.4), Band(7, mass=0.5))
    schedule = SparseFFNSchedule(bands=bands)
    assert schedule.measured(9) == (1, 5, 6, 7, 8)


# ----------------------------------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_norm_before_the_ffn_is_found_where_it_serves_nothing_else(name):
    expected = {"gemma2": "pre_feedforward_layernorm", "cohere": "", "gpt_neox": ""}
    assert [b.norm for b in find_blocks(tiny(name))] == [expected.get(name, "post_attention_layernorm")] * 4


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_the_norm_runs_on_the_rows_that_pass(name, watched):
    model, ids = tiny(name), tokens(2, 40)
    norm = getattr(model.get_decoder().layers[2], find_blocks(model)[2].norm)
    rows, original = [], norm.forward
    norm.forward = lambda x: rows.append(x.shape[:2]) or original(x)
    try:
        with torch.no_grad(), SparseFFN(model, SCHEDULE):
            found = model(ids).logits
    finally:
        del norm.forward
    assert rows == [(1, 40)]
    passing = {}
    for layer, index in zip((1, 2, 3), watched[1], strict=True):
        passing[layer] = torch.zeros(80, dtype=torch.bool)
        passing[layer][index] = True
        passing[layer] = passing[layer].view(2, 40)
    expected = with_rows(model, ids, passing)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_norm_that_serves_something_else_runs_on_all_rows():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="redknot").eval()
    layer = model.get_decoder().layers[2]

    def forward(hidden_states, **kwargs):
        residual = hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        normed = layer.post_attention_layernorm(residual)
        return residual + layer.mlp(normed) + 0.5 * normed

    layer.forward = forward
    with pytest.raises(Exception, match="layer 2"):  # without its FFN it does not give its residual
        find_blocks(model)

    def beside(hidden_states, **kwargs):
        residual = hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        normed = layer.post_attention_layernorm(residual)
        return residual + layer.mlp(normed) * (normed.shape[1] / hidden_states.shape[1])

    layer.forward = beside
    assert [block.norm for block in find_blocks(model)][1:3] == ["post_attention_layernorm", ""]


def test_a_callable_importance_still_sees_what_the_ffn_gets_of_all_rows():
    model, ids, seen = tiny("llama"), tokens(1, 40), []

    def spy(view):
        seen.append(view.ffn_input)
        return torch.arange(40.0)[None]

    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(importance=spy)) as context:
        model(ids)
    assert [x.shape for x in seen] == [(1, 40, 48)] * 3 and context.stats.run[1:] == [20] * 3


# ------------------------------------------------------------------------------------------------- measuring in pieces


@pytest.mark.parametrize("local", [False, True])
def test_scores_in_pieces_give_the_same(local, monkeypatch, watched):
    model, ids = tiny("llama"), tokens(2, 40)
    profile = HeadProfile.uniform(model.config, sink=3, window=8, global_heads=0.5 if local else 1.0)
    for size in (1 << 26, 1):
        monkeypatch.setitem(importance.SCORES, "cpu", size)
        with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(first_layer=3)):
            model(ids, past_key_values=RedKnotCache(model.config, profile))
    whole, pieces = watched[0]
    assert torch.allclose(whole, pieces, atol=1e-6)
    assert torch.allclose(whole.sum(1), torch.full((2,), 4 * 5.0))  # every query of every head gives one


def test_keys_known_to_be_seen_change_nothing():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 5), (2, 20)))
    seen = (torch.arange(20) <= torch.arange(15, 20)[:, None])[None, None]
    slow = importance.received_mass(q, k, seen, None, 0.3)
    fast = importance.received_mass(q, k, seen, None, 0.3, open_keys=16)
    assert torch.allclose(slow, fast, atol=1e-6)
    weights = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~seen, float("-inf")).softmax(-1)
    assert torch.allclose(fast, weights.sum((1, 2)), atol=1e-5)
