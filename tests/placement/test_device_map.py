"""device_map: pages live where a layer runs, whatever holds its weights."""

from __future__ import annotations

import logging

import pytest
import torch
from transfer_worker import GREEDY, decode, make_model, make_profile, prefill
from transformers import AutoModelForCausalLM

from redknot_hf import RedKnotCache
from redknot_hf.distributed import fetch, publish
from redknot_hf.distributed.fetching import layer_devices
from redknot_hf.errors import RedKnotError
from redknot_hf.segments.stores import SegmentStore

ENDS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def device_map(ends, *layers):
    return {**dict.fromkeys(ENDS, ends), **{f"model.layers.{i}": device for i, device in enumerate(layers)}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    model = make_model()
    return decode(model, *prefill(model, make_profile(model)))


def check(model, expected, tmp_path, devices):
    """The same text; pages on ``devices``; saved, published and fetched caches go there again."""
    profile = make_profile(model)
    cache, ids = prefill(model, profile)
    pools = {layer.pages.pool.k.device for layer in cache.paged_layers}
    assert [str(layer.pages.pool.k.device) for layer in cache.paged_layers] == devices
    assert {str(device) for device in pools} == set(devices)
    assert [str(device) for _, device in layer_devices(model)] == devices
    cache.save(tmp_path / "session.safetensors")
    store = SegmentStore("memory://")
    publish(cache, store, "prompt", tokens=ids)
    loaded = RedKnotCache.load(tmp_path / "session.safetensors", model.config)
    fetched = fetch(store, "prompt", model).cache
    first = model.hf_device_map["model.embed_tokens"]
    for name, each in (("itself", cache), ("loaded", loaded), ("fetched", fetched)):
        assert [str(layer.pages.pool.k.device) for layer in each.paged_layers] == devices, name
        given = ids if first in ("cpu", "disk") else ids.to(first)
        assert torch.equal(decode(model, each, given).cpu(), expected), name
        assert each.memory_report().live > 0


@pytest.mark.parametrize("layers", [("cpu", "disk", "cpu"), ("disk", "disk", "disk")])
def test_weights_on_disk(checkpoint, expected, tmp_path, layers, caplog):
    """accelerate brings a layer's weights in for its forward alone; its pages stay on the device it runs on."""
    caplog.set_level(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="redknot", device_map=device_map("cpu", *layers), offload_folder=tmp_path / "w"
    )
    on_disk = [i for i, device in enumerate(layers) if device == "disk"]
    assert all(next(model.model.layers[i].parameters()).is_meta for i in on_disk)
    check(model, expected, tmp_path, ["cpu"] * 3)
    cache, ids = prefill(model, make_profile(model))
    store = SegmentStore("memory://")
    with pytest.raises(RedKnotError, match=r"offloaded and cannot be compared"):
        publish(cache, store, "prompt", tokens=ids, model=model)
    assert torch.equal(model.generate(ids, past_key_values=None, **GREEDY)[:, : ids.shape[1]], ids)


# On a GPU the model has a head dimension that the kernels serve.
@pytest.fixture(scope="module")
def gpu_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    make_model(hidden_size=512).save_pretrained(folder)
    return folder


def on_gpu(folder, tmp_path, dtype, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="redknot", dtype=dtype, **options).eval()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_wait_on_the_host_and_on_the_disk(gpu_checkpoint, tmp_path, dtype):
    """They are brought to the GPU for their layer's forward, so the pages are there, too."""
    one = on_gpu(gpu_checkpoint, tmp_path, dtype, device_map={"": 0})
    want = decode(one, *prefill(one, make_profile(one))).cpu()
    layers = device_map(0, 0, "cpu", "disk")
    model = on_gpu(gpu_checkpoint, tmp_path, dtype, device_map=layers, offload_folder=tmp_path / "w")
    check(model, want, tmp_path, ["cuda:0"] * 3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_on_two_gpus(gpu_checkpoint, tmp_path, dtype):
    one = on_gpu(gpu_checkpoint, tmp_path, dtype, device_map={"": 0})
    want = decode(one, *prefill(one, make_profile(one))).cpu()
    model = on_gpu(gpu_checkpoint, tmp_path, dtype, device_map=device_map(0, 0, 1, 0))
    check(model, want, tmp_path, ["cuda:0", "cuda:1", "cuda:0"])
    assert torch.cuda.current_device() == 0
