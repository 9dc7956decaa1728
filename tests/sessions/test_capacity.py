"""The capacity that `redknot show` prints is what really fits into a pool that may not grow."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.cli import main
from redknot_hf.errors import PoolExhausted
from redknot_hf.heads.capacity import capacity
from redknot_hf.paging.pages import LayerPages
from redknot_hf.paging.pool import PagePool

LAYERS, HEADS, DIM = 6, 3, 16


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
    said = capacity(profile, context, memory, 0, page_size=page_size, utilization=1.0)
    fits, size = fill(profile, context, memory, page_size, monkeypatch)
    assert size == said.head_aware_bytes
    assert fits == said.head_aware > 0
    if kind == "global":
        assert said.paged == said.head_aware


def test_the_printed_figure(monkeypatch, tmp_path, capsys):
    profile = HeadProfile.uniform(config(), sink=4, window=60, global_heads=0.25)
    profile.save(tmp_path / "p.json")
    memory = 2 << 20
    arguments = ["--gpu-memory", str(memory + 1), "--weights-bytes", "1", "--context", "500", "--utilization", "1"]
    assert main(["show", str(tmp_path / "p.json"), *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["capacity"]["head_aware"]
    assert printed == fill(profile, 500, memory, 64, monkeypatch)[0]


def test_the_weights_of_a_model_are_counted(smollm2, smollm2_path, monkeypatch, tmp_path, capsys):
    """``--model``: the parameters as they are loaded, tied ones once, and sessions that fit into what they leave."""
    model, _ = smollm2
    profile = HeadProfile.uniform(model.config, sink=4, window=252, global_heads=0.25)
    profile.save(tmp_path / "p.json")
    context, memory = 2048, 1 << 30
    arguments = ["show", str(tmp_path / "p.json"), "--model", str(smollm2_path), "--gpu-memory", "1GiB"]
    assert main([*arguments, "--context", "2k", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["capacity"]
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2  # its config says bfloat16
    assert printed["weights"] == weights
    left = int(0.9 * memory) - weights
    assert printed["available"] == left
    keys = torch.zeros(1, 3, context, 64, dtype=torch.bfloat16)
    live = []
    for given in (profile, HeadProfile.all_global(model.config)):
        cache = RedKnotCache(model.config, given)
        cache.adopt(((keys, keys) for _ in range(30)), context)
        live.append(cache.memory_report())
    assert [printed["head_aware_bytes"], printed["paged_bytes"]] == [report.live for report in live]
    assert printed["head_aware"] == left // live[0].live > printed["paged"] == left // live[1].live
    assert printed["dense"] == left // live[0].dense
