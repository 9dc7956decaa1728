"""Saved sessions, the session store and the printed capacity on the compute device: the CPU's bodies on a GPU."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from session_helpers import mixed_profile, prompt, steps_on, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.cli import main
from redknot_hf.errors import PoolExhausted
from redknot_hf.sessions import SessionStore

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
USERS = 100
MEMORY = 1 << 30


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=GPU)])
def model(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return tiny_model(head_dim=64).to(request.param)


def feed(model, cache, ids):
    with torch.no_grad():
        return model(ids.to(model.device), past_key_values=cache, use_cache=True).logits


def make(model, tokens: int, seed: int = 0) -> RedKnotCache:
    cache = RedKnotCache.for_model(model, mixed_profile(model.config), page_size=16)
    feed(model, cache, prompt(1, tokens, seed))
    return cache


def test_100_chats_on_a_device_that_holds_10(model, tmp_path, monkeypatch):
    """Three turns: no token is computed twice, every answer is bit by bit that of a session that never moved."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    users = USERS if model.device.type == "cuda" else 24
    one = sum(pool.allocated_bytes for pool in make(model, 40)._pools.values())
    budget = 10 * one if users == USERS else 3 * one
    store = SessionStore(model, device_bytes=budget, host_bytes=2 * budget, folder=tmp_path)
    alone: dict[int, RedKnotCache] = {}
    for turn in range(3):
        for user in range(users):
            text = prompt(1, 24 if turn == 0 else 5, seed=100 * turn + user)
            reference = alone.setdefault(user, RedKnotCache.for_model(model, mixed_profile(model.config), page_size=16))
            expected = feed(model, reference, text)
            with store.use(
                f"{user}", lambda: RedKnotCache.for_model(model, mixed_profile(model.config), page_size=16)
            ) as c:
                past = c.get_seq_length()
                assert past == (0 if turn == 0 else 24 + 5 * (turn - 1))
                assert torch.equal(feed(model, c, text), expected)
            assert store.report().device_bytes <= budget and store.report().host_bytes <= 2 * budget
    report = store.report()
    assert report.deletions == 0 and report.restores >= 2 * (users - 12) and report.disk and report.host


def test_saved_on_one_device_loaded_on_another(model, tmp_path):
    cache = make(model, 300)
    cache.save(tmp_path / "a", model=model)
    loaded = RedKnotCache.load(tmp_path / "a", model)
    assert next(iter(loaded._pools.values())).k.device.type == model.device.type
    assert torch.equal(steps_on(model, loaded, 20), steps_on(model, cache.fork(), 20))
    elsewhere = RedKnotCache.load(tmp_path / "a", model.config, device="cpu")
    elsewhere.save(tmp_path / "b", model=model)
    back = RedKnotCache.load(tmp_path / "b", model)
    assert torch.equal(steps_on(model, back, 20), steps_on(model, cache, 20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_printed_capacity_is_what_a_gpu_holds(tmp_path, capsys):
    """A process limited to 1 GiB: sessions in caches of their own are prefilled and decoded until there is no memory.

    The CUDA context lies outside such a limit; what is set aside is for the libraries' workspaces.
    """
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1 << 16, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot", dtype=torch.bfloat16).cuda().eval()
    profile = HeadProfile.uniform(config, sink=4, window=252, global_heads=0.25)
    profile.save(tmp_path / "p.json")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    context, memory = 8192, MEMORY
    config.save_pretrained(tmp_path / "model")
    arguments = ["--gpu-memory", str(memory), "--weights-bytes", str(weights), "--context", str(context)]
    arguments += ["--model", str(tmp_path / "model"), "--chunk", str(context), "--reserve", "96MiB"]
    assert main(["show", str(tmp_path / "p.json"), *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["capacity"]
    ids = torch.randint(2, 128, (1, context - 1), device="cuda")
    fits, memories = {}, {}
    every = HeadProfile.all_global(config)
    for name, given, chunk in (
        ("head_aware", profile, context), ("paged", every, context), ("head_aware in chunks", profile, 2048)
    ):  # fmt: skip
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # those of earlier tests, which the reserve counts as this process's
        torch.cuda.empty_cache()
        outside = torch.cuda.memory_allocated() - weights  # what earlier tests left
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((memory + outside) / total)
        caches: list[RedKnotCache] = []
        try:
            while len(caches) <= 2 * printed[name.split()[0]] + 4:
                cache = RedKnotCache.for_model(model, given)
                with torch.no_grad():
                    for start in range(0, context - 1, chunk):
                        model(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
                    model(ids[:, :1], past_key_values=cache)
                caches.append(cache)
        except (PoolExhausted, torch.OutOfMemoryError):
            pass
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        fits[name] = len(caches)
        memories[name] = [
            torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved(), outside
        ]  # fmt: skip
        del caches, cache
    print(json.dumps({"printed": printed, "fits": fits, "memory": memories}))
    assert printed["separate"] <= fits["head_aware"] <= 1.2 * printed["separate"] + 1
    assert printed["separate"] <= fits["head_aware in chunks"]
    assert printed["paged"] <= fits["paged"]
    assert printed["paged"] < printed["separate"] <= printed["head_aware"] <= printed["fixed"]
    # pages of heads that keep everything and contiguous tensors: the same tokens, spare pages against a copy of one layer
    assert printed["paged"] <= printed["dense"] <= 1.2 * printed["paged"]
