"""What a build has used is given back when the build is done, not when the garbage collector comes by: on a GPU it is
gigabytes that the next build would otherwise have to ask the driver for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.segments import entry, placing, prompt, splice
from redknot_hf.segments.prompt import SegmentedPrompt

HEADER, QUERY = [2, 3, 4], [5, 6, 7]
DOCUMENTS = [[8 + i, 9, 10 + i] * 9 for i in range(3)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()


@pytest.mark.parametrize("selector", ["boundary", "blend", "kv_deviation"])
@pytest.mark.parametrize("windowed", [False, True])
def test_nothing_of_a_build_waits_for_the_garbage_collector(model, tmp_path, monkeypatch, selector, windowed):
    profile = HeadProfile.uniform(model.config, sink=1, window=8) if windowed else HeadProfile.all_global(model.config)
    builder = SegmentedPrompt(model, None, f"file://{tmp_path}", profile, header=HEADER)
    builder.build(DOCUMENTS, QUERY, 0.3, selector)  # everything is stored now
    seen: list[weakref.ref] = []
    for kind in (entry.SegmentRows, splice.SpliceCache, placing.Loader, prompt.Upload, RedKnotCache):

        def noted(self, *args, made=kind.__init__, **kwargs):
            seen.append(weakref.ref(self))
            made(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        built = builder.build(DOCUMENTS, QUERY, 0.3, selector)
        alive = [type(thing()).__name__ for thing in seen if thing() is not None]
        assert alive == ["RedKnotCache"], "the result, and nothing that it was made from"
        del built
        assert [thing() for thing in seen if thing() is not None] == []
    finally:
        gc.enable()
    assert len(seen) > 6
