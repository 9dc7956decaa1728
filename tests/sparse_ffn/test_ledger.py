"""FLOPs against counts by hand, and the command that prints them."""

from __future__ import annotations

import json

import pytest
import torch
from sparse_models import SIZES, tiny

from redknot_hf import HeadProfile, cli
from redknot_hf.errors import RedKnotError
from redknot_hf.ledger import measure_prefill, prefill_flops
from redknot_hf.sparse_ffn import SparseFFNSchedule

D, I, H, KV, DIM, L, V = (
    SIZES[name]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_hidden_layers",
        "vocab_size",
    )
)


def pairs(n, sink=0, window=10**9):
    """(query, key) pairs by counting."""
    return sum(sum(j < sink or j > p - window for j in range(p + 1)) for p in range(n))


def test_flops_of_a_dense_prefill_by_hand():
    n = 20
    found = prefill_flops(tiny("llama"), n)
    assert found["projections"] == 2 * n * L * (D * H * DIM * 2 + D * KV * DIM * 2)
    assert found["attention"] == L * H * pairs(n) * 4 * DIM
    assert found["ffn"] == 2 * n * L * 3 * D * I
    assert found["head"] == 2 * D * V and found["selection"] == 0
    assert found["total"] == sum(found[part] for part in ("projections", "attention", "ffn", "head"))


def test_flops_of_head_classes_sparse_rows_experts_and_model_windows():
    n, model = 30, tiny("llama")
    profile = HeadProfile.uniform(model.config, sink=3, window=8, global_heads={(l, 0) for l in range(L)})
    found = prefill_flops(model, n, profile, [1, 1, 0.5, 0], batch=2, observed={2: 5, 3: 5})
    assert found["attention"] == 2 * L * (H // KV) * 4 * DIM * (pairs(n) + pairs(n, 3, 8))
    assert found["ffn"] == 2 * 2 * n * 2.5 * 3 * D * I
    assert found["selection"] == 2 * 2 * n * 2 * 5 * H * DIM
    sparse = prefill_flops(tiny("mixtral"), n)
    assert sparse["ffn"] == 2 * n * L * (2 * 3 * D * I + D * 4)  # two of four experts, and the router
    windows = prefill_flops(tiny("gemma2"), n)
    assert windows["attention"] == H * 4 * DIM * 2 * (pairs(n) + pairs(n, 0, 12))


def test_the_ledger_counts_what_ran():
    model = tiny("llama")
    profile = HeadProfile.uniform(model.config, sink=2, window=8, global_heads=0.5)
    schedule = SparseFFNSchedule(keep=0.25, first_layer=2, bucket=1, recent=4, min_rows=0)
    ledger = measure_prefill(model, 160, {"sparse": schedule}, profile, repeats=2)
    assert [entry.name for entry in ledger.entries] == ["dense", "head classes", "sparse", "head classes + sparse"]
    dense, heads, sparse, both = ledger.entries
    assert dense.ffn_rows == heads.ffn_rows == 1.0 and sparse.ffn_rows == both.ffn_rows == pytest.approx(0.625)
    assert sparse.flops["ffn"] == 0.625 * dense.flops["ffn"] and sparse.flops["attention"] == dense.flops["attention"]
    assert heads.kv_bytes < dense.kv_bytes == sparse.kv_bytes
    assert sparse.moved_bytes == 2 * (4 * 40 + 160) * D * 4 and dense.moved_bytes == 0
    assert all(len(entry.all_seconds) == 2 and entry.seconds > 0 for entry in ledger.entries)
    assert all(set(entry.part_seconds) == {"attention", "ffn", "rest"} for entry in ledger.entries)
    assert ledger.realised(dense) is None
    sparse.seconds, dense.seconds = 0.9, 1.0
    assert ledger.realised(sparse) == pytest.approx(0.1 / ledger.saved_flops(sparse))


def test_measuring_leaves_the_model_as_it_was():
    model, ids = tiny("llama"), torch.arange(1, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        measure_prefill(model, 32, {"sparse": SparseFFNSchedule(keep=0.2)}, repeats=1)
        assert torch.equal(model(ids).logits, before)
    with pytest.raises(RedKnotError, match="tokens=1"):
        measure_prefill(model, 1, {})


@pytest.fixture
def model_folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_prints_a_table_and_json(model_folder, capsys):
    options = [model_folder, "--tokens", "300", "--repeats", "1", "--device", "cpu", "--first-layer", "2"]
    assert cli.main(["bench", "prefill", *options]) == 0
    text = capsys.readouterr().out
    for word in ("realised", "head classes + sparse FFN", "FLOPs by part", "KV bytes"):
        assert word in text
    assert cli.main(["bench", "prefill", *options, "--profile", "none", "--random-weights", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in report["configurations"]] == ["dense", "sparse FFN"]
    assert report["configurations"][1]["saved_flops"] > 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--keep", "2"], "keep=2.0"),
        (["--preset", "fast"], "preset='fast'"),
        (["--preset", "a", "--keep", "0.3"], "--preset and --keep"),
        (["--params", "/nowhere.json"], "no such file"),
        (["--device", "nothing"], "--device 'nothing'"),
        (["--dtype", "int8"], "--dtype 'int8'"),
        (["/nowhere/at/all"], "no model '/nowhere/at/all'"),
    ],
)
def test_mistakes_are_one_line(options, words, capsys, tmp_path):
    model = [] if options[0].startswith("/nowhere/at") else [str(tmp_path)]
    assert cli.main(["bench", "prefill", *model, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and error.startswith("redknot: error:") and "\n" not in error
