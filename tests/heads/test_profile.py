"""`HeadProfile` as data: construction, validation that names the cell, byte counts, fit to a model."""

from __future__ import annotations

import copy
import math
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig

from redknot_hf.errors import RedKnotError
from redknot_hf.heads import HeadProfile, config_hash, describe_config, model_shape
from redknot_hf.heads import profile as profile_module
from redknot_hf.heads.attention_settings import attention_settings

HEADS = 4
SIZE_KEYS = ("vocab_size", "intermediate_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip


def config(**changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": HEADS}
    return LlamaConfig(**{**sizes, **changes})


def make(**changes) -> HeadProfile:
    fields = {
        "num_layers": 4,
        "num_kv_heads": 2,
        "head_class": [["local", "global"], ["local", "local"], ["retrieval", "dense"], ["local", "local"]],
        "sink": 4,
        "window": 100,
        "metadata": {"head_dim": 8},
    }
    return HeadProfile(**{**fields, **changes})


def with_cell(matrix_name: str, layer: int, head: int, value) -> dict:
    profile = make()
    matrix = copy.deepcopy(getattr(profile, matrix_name))
    matrix[layer][head] = value
    return {matrix_name: matrix}


# ---------------------------------------------------------------- construction


def test_all_global_and_uniform():
    everything = HeadProfile.all_global(config())
    assert everything.count("global") == 5 * HEADS and everything.sink == everything.window == [[0] * HEADS] * 5
    windows = HeadProfile.uniform(config(), sink=2, window=64)
    assert windows.head_class == [["local"] * HEADS] * 5
    assert windows.sink == [[2] * HEADS] * 5 and windows.window == [[64] * HEADS] * 5
    some = HeadProfile.uniform(config(), global_heads={(0, 1), (4, 3)})
    assert {(l, h) for l in range(5) for h in range(HEADS) if some.head_class[l][h] == "global"} == {(0, 1), (4, 3)}
    assert some.sink[0] == [4, 0, 4, 4] and some.window[4] == [256, 256, 256, 0]


@given(st.floats(0, 1))
def test_uniform_fraction_is_met_to_rounding_and_deterministic(fraction):
    first = HeadProfile.uniform(config(), global_heads=fraction)
    assert first.count("global") == round(fraction * 5 * HEADS)
    assert first.head_class == HeadProfile.uniform(config(), global_heads=fraction).head_class


def test_uniform_fraction_spreads_over_layers_and_heads():
    profile = HeadProfile.uniform(config(num_hidden_layers=32), global_heads=0.25)
    per_layer = [row.count("global") for row in profile.head_class]
    assert set(per_layer) == {1}
    per_head = [sum(row[h] == "global" for row in profile.head_class) for h in range(HEADS)]
    assert min(per_head) > 0


@pytest.mark.parametrize("bad", [1.5, -0.1, True, math.nan, "0.5", {(0, 9)}, {(9, 0)}, [3], [(0, 0, 0)], [([], 1)]])
def test_uniform_refuses_bad_choices(bad):
    with pytest.raises(RedKnotError, match="global_heads"):
        HeadProfile.uniform(config(), global_heads=bad)


def test_hybrid_config_marks_attention_layers():
    hybrid = config()
    hybrid.layer_types = [
        "linear_attention",
        "full_attention",
        "linear_attention",
        "linear_attention",
        "full_attention",
    ]
    profile = HeadProfile.uniform(hybrid, window=64)
    assert profile.attention_layers == [1, 4]
    assert profile.count("local") == 2 * HEADS and profile.count("global") == 0
    assert profile.stored_tokens(1000)[0] == [0] * HEADS and profile.stored_tokens(1000)[1] == [68] * HEADS
    assert profile.dense_kv_bytes(10) == 2 * HEADS * 10 * 2 * 8 * 2


def test_shape_of_configs_that_say_less():
    class Old:
        num_hidden_layers, num_attention_heads, hidden_size, model_type = 2, 4, 32, "old"

    assert (model_shape(Old()).num_kv_heads, model_shape(Old()).head_dim) == (4, 8)
    Old.multi_query = True
    assert model_shape(Old()).num_kv_heads == 1
    Old.num_key_value_heads = [2, 2]
    assert model_shape(Old()).num_kv_heads == 2
    Old.num_key_value_heads = [2, 4]
    with pytest.raises(RedKnotError, match="different numbers of heads"):
        model_shape(Old())
    del Old.num_attention_heads
    with pytest.raises(RedKnotError, match="num_attention_heads is None"):
        model_shape(Old())


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_cell("head_class", 3, 1, "glboal"), r"head_class\[3\]\[1\] is 'glboal'; expected one of 'global', "),
        (with_cell("head_class", 0, 0, None), r"head_class\[0\]\[0\] is None"),
        (with_cell("head_class", 0, 0, ["local"]), r"head_class\[0\]\[0\] is \['local'\]"),
        (with_cell("window", 1, 0, 0), r"window\[1\]\[0\] of a local head is 0; expected an integer from 1"),
        (with_cell("window", 1, 0, 2**30 + 1), r"window\[1\]\[0\].* is 1073741825; expected .* to 1073741824"),
        (with_cell("window", 1, 0, 10**5000), r"window\[1\]\[0\]"),
        (with_cell("window", 1, 0, 3.0), r"window\[1\]\[0\].* is 3\.0"),
        (with_cell("window", 1, 0, True), r"window\[1\]\[0\].* is True"),
        (with_cell("window", 1, 0, math.nan), r"window\[1\]\[0\].* is nan"),
        (with_cell("window", 1, 0, "64"), r"window\[1\]\[0\].* is '64'"),
        (with_cell("window", 0, 1, -5), r"window\[0\]\[1\] is -5"),
        (with_cell("sink", 1, 1, -1), r"sink\[1\]\[1\] of a local head is -1; expected an integer from 0"),
        ({"sink": [[4, 4]] * 3}, r"sink has 3 rows; expected 4 \(num_layers\)"),
        ({"window": [[4, 4], [4], [4, 4], [4, 4]]}, r"window\[1\] has 1 entries; expected 2 \(num_kv_heads\)"),
        ({"head_class": [["local", "local"], "local", [], []]}, r"head_class\[1\] is 'local'; expected a list"),
        ({"head_class": None}, r"head_class is None; expected 4 rows of 2"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 4.0}, r"num_layers is 4\.0"),
        ({"num_kv_heads": True}, "num_kv_heads is True"),
        ({"metadata": []}, r"metadata is \[\]"),
        ({"metadata": {"attention_layers": [3, 1]}}, "attention_layers"),
        ({"metadata": {"attention_layers": [0, 4]}}, "attention_layers"),
        ({"metadata": {"sliding_layers": [0, True]}}, "sliding_layers"),
        ({"metadata": {"sliding_window": 0}}, r"metadata\['sliding_window'\] is 0"),
        ({"metadata": {"head_dim": "64"}}, r"metadata\['head_dim'\] is '64'"),
        ({"metadata": {"scores": {"gate": [[1, 2]]}}}, r"scores'\]\['gate'\] has 1 rows; expected 4"),
        ({"metadata": {"scores": {"gate": [[1, 2], [3, math.inf], [1, 1], [1, 1]]}}}, r"\[1\]\[1\] is inf"),
    ],
)  # fmt: skip
def test_validation_names_the_cell(changes, message):
    with pytest.raises(RedKnotError, match=message) as error:
        make(**changes)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_validation_sees_later_changes():
    profile = make()
    profile.head_class[3][1] = "glboal"
    for use in (profile.validate, lambda: profile.save("/nonexistent/x"), lambda: profile.validate_for(config())):
        with pytest.raises(RedKnotError, match=r"head_class\[3\]\[1\]"):
            use()


def test_arrays_and_meaningless_cells_become_plain_ints():
    profile = make(sink=np.full((4, 2), 3), window=torch.full((4, 2), 7))
    assert profile.sink == [[3, 0], [3, 3], [0, 0], [3, 3]] and profile.window == [[7, 0], [7, 7], [0, 0], [7, 7]]
    assert type(profile.sink[0][0]) is int
    rows = [["local", "local"]] * 4
    shared = make(head_class=rows)
    shared.head_class[0][0] = "global"
    assert rows[0][0] == "local" and shared.head_class[1][0] == "local"


# ---------------------------------------------------------------- bytes


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 1200), st.integers(1, 3), st.sampled_from([1, 16, 64, 256]), st.integers(0, 40), st.integers(1, 300),
    st.integers(0, 20),
)  # fmt: skip
def test_kv_bytes_is_what_filling_pages_one_token_at_a_time_costs(seq_len, batch, page_size, rollback, window, sink):
    profile = make(sink=sink, window=window)
    pages = 0
    for row in profile.head_class:
        for name in row:
            ring = window + rollback
            touched = set()
            for position in range(seq_len):
                slot = position
                if name == "local" and position >= sink + ring:
                    slot = sink + (position - sink) % ring
                touched.add(slot // page_size)
            pages += len(touched)
    assert profile.kv_bytes(seq_len, batch, torch.float16, page_size, rollback) == batch * pages * page_size * 8 * 2 * 2


def test_kv_bytes_limits():
    profile = make(head_class=[["global", "retrieval"]] * 4)
    assert profile.kv_bytes(640, page_size=64) == profile.dense_kv_bytes(640) == 8 * 640 * 8 * 2 * 2
    assert profile.kv_bytes(641, page_size=64) - profile.kv_bytes(640, page_size=64) == 8 * 64 * 8 * 2 * 2
    assert profile.kv_bytes(100, dtype="float32", page_size=1) == 2 * profile.dense_kv_bytes(100)
    local = make()
    assert local.kv_bytes(10_000) - local.kv_bytes(9_936) == 3 * 64 * 8 * 2 * 2 * 1  # only the three that keep all grow
    assert local.table_bytes(640, batch_size=2) == 4 * 2 * (2 * 10 + 2 * 2 + 2 * 10 + 2 * 2)
    assert make(metadata={}).kv_bytes(64, head_dim=16) == 8 * 64 * 16 * 4
    with pytest.raises(RedKnotError, match="head_dim is unknown"):
        make(metadata={}).kv_bytes(10)
    for bad in ({"seq_len": -1}, {"seq_len": 1.5}, {"page_size": 0}, {"dtype": "float12"}, {"batch_size": -1}):
        with pytest.raises(RedKnotError, match=next(iter(bad))):
            local.kv_bytes(**{"seq_len": 8, **bad})


@pytest.mark.parametrize("sliding", [None, 40, 64])
@pytest.mark.parametrize("seq_len", [1, 16, 54, 55, 200, 513])
@torch.no_grad()
def test_kv_bytes_is_what_the_allocator_reports(seq_len, sliding):
    from transformers import AutoModelForCausalLM

    from redknot_hf import RedKnotCache

    tiny = config(vocab_size=32, intermediate_size=32)
    if sliding:  # a window of the model's own in some layers, narrower or wider than the heads'
        sizes = {key: value for key, value in tiny.to_dict().items() if key in SIZE_KEYS}
        tiny = Gemma2Config(**sizes, head_dim=8, sliding_window=sliding)
        assert tiny.layer_types[:2] == ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(tiny, attn_implementation="redknot").eval()
    profile = HeadProfile.uniform(tiny, window=50, global_heads={(0, 0), (0, 3), (2, 1)})
    cache = RedKnotCache(tiny, profile, page_size=16)
    model(torch.ones(2, seq_len, dtype=torch.long), past_key_values=cache)
    report = cache.memory_report()
    assert report.live - report.tables == profile.kv_bytes(seq_len, 2, torch.float32, 16)
    assert report.tables == profile.table_bytes(seq_len, 2, 16)
    assert report.ideal == profile.kv_bytes(seq_len, 2, torch.float32, page_size=1)
    assert sliding or report.dense == profile.dense_kv_bytes(seq_len, 2, torch.float32)


# ---------------------------------------------------------------- budgets, fit to a model


def test_with_budget_takes_the_highest_scores_and_keeps_windows():
    scores = [[0.1, 0.9], [0.8, 0.8], [0.0, 0.2], [0.3, 0.7]]
    profile = make(metadata={"head_dim": 8, "scores": {"gate": scores}, "validation": {"kl": 1.0}})
    chosen = profile.with_budget(0.5, "gate", sink=1, window=9)
    assert chosen.head_class == [["local", "global"], ["global", "global"], ["local", "local"], ["local", "global"]]
    assert chosen.window == [[100, 0], [0, 0], [9, 9], [100, 0]] and chosen.sink[2] == [1, 1]
    assert "validation" not in chosen.metadata and "validation" in profile.metadata
    with pytest.raises(RedKnotError, match="no score 'x'; it has gate"):
        profile.with_budget(0.5, "x")
    with pytest.raises(RedKnotError, match="fraction"):
        profile.with_budget(1.1, "gate")


def test_validate_for_refuses_other_shapes_and_warns_once_about_other_weights(monkeypatch):
    monkeypatch.setattr(profile_module, "_warned", set())
    mine = config()
    mine._name_or_path, mine._commit_hash = "owner/Model-A", "abc"
    profile = HeadProfile.uniform(mine)
    assert profile.metadata["model"] == "owner/Model-A" and profile.metadata["revision"] == "abc"

    with pytest.raises(RedKnotError, match=r"5 layers x 4 KV heads \(made for owner/Model-A\).*6 layers x 4 KV heads"):
        profile.validate_for(config(num_hidden_layers=6))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.validate_for(mine)
        mirror = copy.deepcopy(mine)
        mirror._name_or_path = "elsewhere/model-a"
        profile.validate_for(mirror)
        profile.validate_for(config())  # no name recorded in the config: nothing to compare

    for change, message in (
        ({"_name_or_path": "owner/Model-B"}, "'owner/Model-A', used with 'owner/Model-B'"),
        ({"_commit_hash": "def"}, "revision 'abc', used with 'def'"),
        ({"vocab_size": 77}, "config hash"),
    ):
        other = copy.deepcopy(mine)
        for key, value in change.items():
            setattr(other, key, value)
        with pytest.warns(UserWarning, match=message):
            profile.validate_for(other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            profile.validate_for(other)


def test_local_copies_do_not_warn(tmp_path):
    mine = config()
    mine._name_or_path = "owner/Model-A"
    profile = HeadProfile.uniform(mine)
    mine._name_or_path = str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.validate_for(mine)


def test_a_profile_is_shown_in_one_line():
    assert repr(make()) == "HeadProfile(4 layers x 2 KV heads: 1 global, 5 local, 1 retrieval, 1 dense)"


def test_config_hash_ignores_what_does_not_change_the_architecture():
    assert config_hash(config()) == config_hash(config(dtype="bfloat16", attention_dropout=0.1))
    assert config_hash(config()) != config_hash(config(hidden_size=128))
    assert set(describe_config(config())) == {"model_type", "config_hash", "head_dim", "attention"}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("rope_parameters", {"rope_theta": 5e5}),
        ("rope_parameters", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("sliding_window", {"sliding_window": 128}),
        ("attention_multiplier", {"attention_multiplier": 0.2}),
    ],
    ids=str,
)
def test_a_profile_warns_about_a_model_whose_heads_look_elsewhere(name, other, tmp_path, monkeypatch):
    """Same shape and a folder's name: nothing but the settings tells the two models apart."""
    monkeypatch.setattr(profile_module, "_warned", set())
    path = HeadProfile.uniform(config()).save(tmp_path / "p.json")
    used = config(**other)
    with pytest.warns(UserWarning, match=f"'{name}' .*, used with "):
        HeadProfile.load(path).validate_for(used)
    assert config_hash(used) == config_hash(config())


def test_settings_that_change_nothing_compare_as_equal():
    """So that a profile made with one version of transformers does not warn with another."""
    plain = attention_settings(config())
    assert plain == {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert attention_settings(config(partial_rotary_factor=1.0, layer_types=["full_attention"] * 5)) == plain
    assert attention_settings(config(use_sliding_window=False, sliding_window=64)) == plain
    assert attention_settings(SimpleNamespace(rope_theta=10000.0, rope_scaling=None)) == plain


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 10**9}, {"num_key_value_heads": 10**9}])
def test_a_config_with_absurd_sizes_is_refused_before_a_row_is_made(sizes):
    """A config comes from whoever made the model; a number in it must not become memory."""
    before = time.monotonic()
    with pytest.raises(RedKnotError, match="expected at most 1,000,000 in all"):
        HeadProfile.all_global(config(**sizes))
    assert time.monotonic() - before < 5
