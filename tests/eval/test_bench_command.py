"""`redknot bench`: the caches side by side, and the name of a measurement that may be left out."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.cli import main
from redknot_hf.commands.bench import complete
from redknot_hf.errors import RedKnotError
from redknot_hf.eval.speed import contenders, measure_caches, tensor_bytes


@pytest.fixture(scope="module")
def profile(tiny_model):
    return HeadProfile.uniform(tiny_model.config, sink=4, window=60, global_heads={(0, 1), (1, 0)})


@pytest.mark.parametrize(
    "given, meant",
    [
        ([], ["caches"]),
        (["./model", "--json"], ["caches", "./model", "--json"]),
        (["--tokens", "2k", "./model"], ["caches", "--tokens", "2k", "./model"]),
        (["prefill", "./model"], ["prefill", "./model"]),
        (["caches", "prefill"], ["caches", "prefill"]),
        (["--help"], ["--help"]),
    ],
)
def test_the_measurement_may_be_left_out(given, meant):
    assert complete(given) == meant


def test_the_command_prints_a_table_and_json(tiny_folder, profile, tmp_path, capsys):
    path = str(profile.save(tmp_path / "p.json"))
    arguments = ["bench", tiny_folder, "--profile", path, "--tokens", "600", "--new-tokens", "3", "--repeats", "1"]
    arguments += [
        "--device",
        "cpu",
        "--memory",
        "1M",
        "--caches",
        "dynamic,static,ours,ours-global,offloaded,quantized",
    ]
    picture = tmp_path / "caches.png"
    assert main([*arguments, "--json", "--plot", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    token = 4 * 2 * 8 * 4  # four heads, K and V of 8 numbers of 4 bytes
    dynamic, static = rows["DynamicCache, sdpa"], rows["StaticCache"]
    assert dynamic["kv_bytes"] == 600 * token and static["kv_bytes"] >= 603 * token
    assert dynamic["kv_bytes"] > rows["RedKnotCache"]["kv_bytes"]
    assert dynamic["fits"] == int((0.9 * 2**20 - found["weights"]) // (600 * token)) > 0
    assert dynamic["agrees"] == static["agrees"] == rows["RedKnotCache, all heads global"]["agrees"] == 1.0
    assert rows["DynamicCache, offloaded"]["note"] == "offloading needs a CUDA device"
    assert all(row["first_token_s"] > 0 and row["decode_ms"] > 0 for row in rows.values() if not row["note"])
    assert any(row["key"] == "quantized" for row in rows.values())
    assert picture.stat().st_size > 5000

    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "DynamicCache, sdpa" in text and "not measured: offloading needs a CUDA device" in text


def test_a_cache_that_answers_otherwise_shows(tiny_model, profile):
    """`agrees` must be able to fall: windows of one token change the greedy tokens."""
    narrow = HeadProfile.uniform(tiny_model.config, sink=0, window=1)
    table = measure_caches(
        tiny_model, 300, 8, contenders(tiny_model, narrow, ["dynamic", "ours", "ours-global"]), repeats=1
    )
    dynamic, ours, exact = table.rows
    assert dynamic.agrees == exact.agrees == 1.0 and ours.agrees < 1.0
    assert tiny_model.config._attn_implementation == "redknot", "set back"


def test_a_backend_that_fails_is_a_note_and_ours_is_an_error(tiny_model, profile):
    def broken(tokens):
        raise ImportError("no such backend")

    (dynamic,) = contenders(tiny_model, profile, ["dynamic"])
    (ours,) = contenders(tiny_model, profile, ["ours"])
    bad = type(dynamic)("quantized", "broken", broken, "sdpa")
    table = measure_caches(tiny_model, 64, 2, [dynamic, bad], repeats=1)
    assert table.rows[1].note == "ImportError: no such backend" and table.rows[1].decode_ms is None
    with pytest.raises(ImportError):
        measure_caches(tiny_model, 64, 2, [type(ours)("ours", "broken", broken, "redknot")], repeats=1)


def test_bytes_are_those_of_the_tensors(tiny_model, profile):
    ids = torch.zeros(2, 100, dtype=torch.long)
    device = torch.device("cpu")
    token = 4 * 2 * 8 * 4
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = DynamicCache(config=tiny_model.config)
        tiny_model(ids, past_key_values=cache)
        assert tensor_bytes(cache, device) == (200 * token, 0)
        cache = StaticCache(config=tiny_model.config, max_cache_len=128)
        tiny_model(ids, past_key_values=cache)
        assert 256 * token <= tensor_bytes(cache, device)[0] < 257 * token
        cache = RedKnotCache(tiny_model.config, profile)
        tiny_model(ids, past_key_values=cache)
        assert tensor_bytes(cache, device) == (cache.memory_report().allocated, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--caches", "magic"], "--caches 'magic'"),
        (["--tokens", "4k", "--new-tokens", "8"], "exceed the model's 4096 positions"),
        (["--new-tokens", "1"], "expected at least"),
        (["--device", "toaster"], "--device 'toaster'"),
    ],
)
def test_bad_input_is_one_line(tiny_folder, capsys, change, message):
    assert main(["bench", tiny_folder, "--device", "cpu", *change]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("redknot: error:")]
    assert len(lines) == 1 and message in lines[0]


def test_unknown_names_are_refused(tiny_model, profile):
    with pytest.raises(RedKnotError, match="'magic' is unknown"):
        contenders(tiny_model, profile, ["magic"])


def test_prefill_still_runs(tiny_folder, profile, tmp_path, capsys):
    path = str(profile.save(tmp_path / "p.json"))
    assert (
        main(["bench", "prefill", tiny_folder, "--profile", path, "--tokens", "200", "--repeats", "1", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["tokens"] == 200


def test_a_folder_of_any_name_gets_the_profile_of_its_architecture(tmp_path):
    """By the name first; a folder whose name is no model's by its config, which the source says; a Hub id never."""
    from redknot_hf.commands._models import find_profile

    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "rope_theta": 100000.0,
    }  # fmt: skip
    shipped = HeadProfile.load("SmolLM2-135M-Instruct")

    def found(name, **other):
        config = LlamaConfig(**{**shape, **other})
        config._name_or_path = name
        return find_profile(None, config, name)

    (tmp_path / "hf").mkdir()
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    profile, source = found(str(tmp_path / "hf"))
    assert profile == shipped
    assert source == "shipped for SmolLM2-135M-Instruct, whose architecture the folder's config has"
    assert found(str(tmp_path / "SmolLM2-135M-Instruct")) == (shipped, "shipped for this model")
    assert found(str(tmp_path / "hf"), intermediate_size=1024) == (None, "none")
    # of the same shape, but its heads look elsewhere
    assert found(str(tmp_path / "hf"), rope_theta=10000.0) == (None, "none")
    assert found(str(tmp_path / "hf"), rope_scaling={"rope_type": "linear", "factor": 2.0}) == (None, "none")
    assert found(str(tmp_path / "hf"), sliding_window=512) == (None, "none")
    assert found("someone/fine-tuned") == (None, "none")
    assert find_profile(None, LlamaConfig(**shape), None)[0] == shipped


def test_random_weights_are_named_as_such(tiny_folder, profile, tmp_path, capsys):
    arguments = ["bench", tiny_folder, "--profile", str(profile.save(tmp_path / "p.json")), "--device", "cpu", "--json"]
    arguments += ["--tokens", "64", "--new-tokens", "2", "--repeats", "1", "--caches", "ours"]
    for more, name in (([], "tiny"), (["--random-weights"], "tiny, random weights")):
        assert main([*arguments, *more]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == name
