"""The capacity that `redknot show` prints is what really fits into a pool that may not grow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.cli import main
from redknot_hf.errors import PoolExhausted
from redknot_hf.heads.capacity import Activations, _segment, capacity
from redknot_hf.paging.pages import LayerPages
from redknot_hf.paging.pool import PagePool

LAYERS, HEADS, DIM = 6, 3, 16
NONE = Activations(0, 0)
RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=HEADS, num_hidden_layers=LAYERS, head_dim=DIM,
        vocab_size=8, intermediate_size=8,
    )  # fmt: skip


def fill(profile, context: int, memory: int, page_size: int, monkeypatch) -> tuple[int, int]:
    """(sessions whose pages and tables fit into ``memory`` bytes, bytes of one)."""
    token = 2 * DIM * 2
    pool = PagePool(page_size, DIM, DIM, torch.bfloat16, torch.device("cpu"), memory // (page_size * token))

    def new_pages(cache, layer):  # as on a GPU: pages wherever they are free
        return LayerPages(pool, layer.sink, layer.window, layer.batch_size, layer.rollback, contiguous=False)

    monkeypatch.setattr(RedKnotCache, "new_pages", new_pages)
    keys = torch.zeros(1, HEADS, context, DIM, dtype=torch.bfloat16)
    caches: list[RedKnotCache] = []
    held = 0
    while True:
        cache = RedKnotCache(config(), profile, page_size=page_size)
        try:
            cache.adopt(((keys, keys) for _ in range(LAYERS)), context)
        except PoolExhausted:
            break
        held += cache.memory_report().live
        if held > memory:
            break
        caches.append(cache)
    return len(caches), held // (len(caches) + (held > memory))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("context", [100, 1000])
@pytest.mark.parametrize("kind", ["mixed", "global"])
def test_capacity_is_what_fits(monkeypatch, page_size, context, kind):
    profile = {
        "mixed": HeadProfile.uniform(config(), sink=4, window=60, global_heads=0.25),
        "global": HeadProfile.all_global(config()),
    }[kind]
    memory = 3 << 20
    said = capacity(profile, context, memory, 0, page_size=page_size, runtime=0, activations=NONE)
    fits, size = fill(profile, context, memory, page_size, monkeypatch)
    assert size == said.head_aware_bytes
    assert fits == said.fixed > 0
    if kind == "global":
        assert said.paged == said.head_aware and said.paged_bytes == size


@pytest.mark.parametrize("chunk", [64, 500])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["mixed", "global"])
def test_pools_that_grow_take_no_more_than_is_said(monkeypatch, rows, chunk, kind):
    """Slabs after a prompt in chunks and some steps, and one of them twice while the last growth goes on."""
    shape = config()
    profile = {
        "mixed": HeadProfile.uniform(shape, sink=4, window=60, global_heads=0.25),
        "global": HeadProfile.all_global(shape),
    }[kind]
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="redknot", dtype=torch.bfloat16).eval()

    def new_pages(cache, layer):  # as on a GPU: pages wherever they are free
        return LayerPages(
            cache.pool(layer), layer.sink, layer.window, layer.batch_size, layer.rollback, contiguous=False
        )

    monkeypatch.setattr(RedKnotCache, "new_pages", new_pages)
    cache = RedKnotCache(shape, profile)
    context, most = 3000, 0
    with torch.no_grad():
        for start in range(0, context - 8, chunk):
            ids = torch.ones(rows, min(chunk, context - 8 - start), dtype=torch.long)
            model(ids, past_key_values=cache, logits_to_keep=1)
        for _ in range(8):
            model(ids[:, :1], past_key_values=cache)
            most = max(most, cache.memory_report().allocated)
    slab = max(pool.k.nbytes for pool in cache._pools.values())
    said = capacity(profile, context, 1 << 30, 0, runtime=0, activations=NONE)
    scratch = LAYERS * 2 * 64 * DIM * 2 * 2  # page 0 of every layer
    assert most + slab - scratch <= rows * (said.head_aware_bytes + said.head_aware_extra)
    assert rows * said.head_aware_bytes <= most


def test_activations_and_what_the_allocator_rounds():
    shape = config()
    found = Activations.of(shape, chunk=100)
    token = 6 * 96 + 2 * (6 + 2 * HEADS) * DIM + 3 * 8
    assert found == Activations(250 * token * 2 + 8 * 6, 8 * 6)  # what the allocator keeps: two and a half times
    mib = 1 << 20
    assert [_segment(n * mib) for n in (1, 2, 4, 9, 10, 11, 33)] == [n * mib for n in (1, 2, 4, 10, 10, 12, 34)]
    assert _segment(4 * mib + 1) == 5 * mib and _segment(1) == 512
    said = capacity(HeadProfile.all_global(shape), 4096, 1 << 31, 100, activations=found)
    assert said.available == (1 << 31) - 100 - said.runtime


def test_what_an_h200_held():
    """The batches that fitted on a GPU, from the committed run: printed is never more, and within 3 % (a session) of it."""
    report = json.loads((RESULTS / "h200" / "decode.json").read_text())
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=32, head_dim=128,
    )  # fmt: skip
    one_of_eight = {(layer, layer % 8) for layer in range(32)}  # as benchmarks/decode/bench.py has it
    profile = HeadProfile.uniform(shape, sink=64, window=256, global_heads=one_of_eight)
    names = {"DynamicCache": "dense", "RedKnotCache 1/8": "head_aware", "RedKnotCache 1/8 static": "fixed"}
    compared = 0
    for row in report["rows"]:
        if row.get("capacity") not in names or "trials" not in row:
            continue
        weights = int(row["trials"][0]["before_gb"] * 1e9)
        said = capacity(
            profile, row["context"], int(report["memory_gb"] * 1e9), weights, activations=Activations.of(shape)
        )
        printed, fits = getattr(said, names[row["capacity"]]), row["largest_batch"]
        assert 0.97 * fits - 1 < printed <= fits, row["capacity"]
        compared += 1
    assert compared == 3


def test_what_a_process_on_an_h100_held():
    """Caches of their own in a process limited to 12 GiB (the run is older than the formula: what it printed is not ours)."""
    rows = [json.loads(line) for line in (RESULTS / "h100" / "capacity.jsonl").read_text().splitlines()]
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=4, head_dim=128,
    )  # fmt: skip
    profile = HeadProfile.uniform(shape, sink=64, window=256, global_heads={(layer, layer % 8) for layer in range(4)})
    for row in rows:
        said = capacity(
            profile, row["context"], row["memory"], row["weights"], runtime=row["reserve"],
            activations=Activations.of(shape),
        )  # fmt: skip
        if row["kind"] == "separate":
            assert 0.97 * row["fits"] <= said.separate <= row["fits"]
    assert {row["kind"] for row in rows} >= {"separate"}


def test_the_printed_figure(monkeypatch, tmp_path, capsys):
    profile = HeadProfile.uniform(config(), sink=4, window=60, global_heads=0.25)
    profile.save(tmp_path / "p.json")
    memory = 2 << 20
    arguments = ["--gpu-memory", str(memory + 2), "--weights-bytes", "1", "--context", "500", "--reserve", "1"]
    assert main(["show", str(tmp_path / "p.json"), *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["capacity"]["fixed"]
    assert printed == fill(profile, 500, memory, 64, monkeypatch)[0]


def test_the_weights_of_a_model_are_counted(smollm2, smollm2_path, monkeypatch, tmp_path, capsys):
    """``--model``: the parameters as they are loaded, tied ones once, and sessions that fit into what they leave."""
    model, _ = smollm2
    profile = HeadProfile.uniform(model.config, sink=4, window=252, global_heads=0.25)
    profile.save(tmp_path / "p.json")
    context, memory = 2048, 1 << 30
    arguments = ["show", str(tmp_path / "p.json"), "--model", str(smollm2_path), "--gpu-memory", "1GiB"]
    arguments += ["--reserve", "64MiB"]
    assert main([*arguments, "--context", "2k", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["capacity"]
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2  # its config says bfloat16
    assert printed["weights"] == weights
    activations = Activations.of(model.config)
    left = memory - weights - (64 << 20)
    assert printed["available"] == left and printed["activations"] == activations.prompt < 128 << 20
    left -= activations.prompt
    keys = torch.zeros(1, 3, context, 64, dtype=torch.bfloat16)
    live = []
    for given in (profile, HeadProfile.all_global(model.config)):
        cache = RedKnotCache(model.config, given)
        cache.adopt(((keys, keys) for _ in range(30)), context)
        live.append(cache.memory_report())
    assert [printed["head_aware_bytes"], printed["paged_bytes"]] == [report.live for report in live]
    logits = activations.session
    assert printed["fixed"] == left // (live[0].live + logits) >= printed["head_aware"] > printed["paged"]
    assert 0.9 * left // live[0].dense <= printed["dense"] <= left // (live[0].dense + logits)
