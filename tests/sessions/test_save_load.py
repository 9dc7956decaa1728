"""A saved session goes on bit by bit (M8), and its file holds live tokens only."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from session_helpers import feed, make, mixed_profile, prompt, rows_of, steps, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.errors import CacheError, RollbackExceeded, UnsupportedModel
from redknot_hf.sessions import describe, files


def reload(cache, path, config, **options):
    cache.save(path)
    return RedKnotCache.load(path, config, **options)


def assert_goes_on(model, cache, other, mask=None, count=12):
    assert other.get_seq_length() == cache.get_seq_length()
    assert torch.equal(steps(model, cache, count, mask), steps(model, other, count, mask))


@pytest.mark.parametrize("tokens", [1, 7, 11, 12, 40, 100])
@pytest.mark.parametrize("rows", [1, 3])
def test_goes_on_bit_by_bit(tiny, profile, tmp_path, tokens, rows):
    cache = make(tiny, profile, rows, tokens)
    assert_goes_on(tiny, cache, reload(cache, tmp_path / "a", tiny.config))


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("kind", ["global", "local", "default"])
def test_any_page_size_and_any_classes(tiny, tmp_path, page_size, kind):
    profile = {
        "global": HeadProfile.all_global(tiny.config),
        "local": HeadProfile.uniform(tiny.config, sink=0, window=5),
        "default": None,
    }[kind]
    cache = make(tiny, profile, 2, 30, page_size=page_size)
    other = reload(cache, tmp_path / "a", tiny.config)
    assert other.profile == cache.profile and other.page_size == page_size
    assert_goes_on(tiny, cache, other)


def test_an_empty_cache(tiny, profile, tmp_path):
    cache = RedKnotCache(tiny.config, profile, page_size=8)
    other = reload(cache, tmp_path / "a", tiny.config)
    ids = prompt(2, 20)
    assert torch.equal(feed(tiny, cache, ids), feed(tiny, other, ids))


def test_after_decoding_and_with_a_second_turn(tiny, profile, tmp_path):
    cache = make(tiny, profile, 2, 20)
    steps(tiny, cache, 15)
    other = reload(cache, tmp_path / "a", tiny.config)
    turn = prompt(2, 25, seed=4)
    assert torch.equal(feed(tiny, cache, turn), feed(tiny, other, turn))
    assert_goes_on(tiny, cache, other)


def test_with_padding(tiny, profile, tmp_path):
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :17], mask[1, :4] = 0, 0
    cache = make(tiny, profile, 3, 30, mask)
    other = reload(cache, tmp_path / "a", tiny.config)
    mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    mask[2, 30:33] = 0  # a second padded turn
    turn = prompt(3, 5, seed=2)
    assert torch.equal(feed(tiny, cache, turn, mask), feed(tiny, other, turn, mask))
    again = reload(other, tmp_path / "b", tiny.config)
    for one in (cache, other, again):
        assert torch.equal(one.layers[0].keys, cache.layers[0].keys)
    assert_goes_on(tiny, cache, again, mask)


def test_with_rollback(tiny, profile, tmp_path):
    cache = make(tiny, profile, 2, 40, rollback=6)
    other = reload(cache, tmp_path / "a", tiny.config)
    for one in (cache, other):
        one.crop(-4)
    again = reload(other, tmp_path / "b", tiny.config)  # saved with a ring that is not full
    for one in (cache, other, again):
        with pytest.raises(RollbackExceeded):
            one.crop(-4)
        one.crop(-2)
    first = steps(tiny, cache)
    assert torch.equal(first, steps(tiny, other)) and torch.equal(first, steps(tiny, again))


def test_while_assisted_decoding_records(tiny, profile, tmp_path):
    cache = make(tiny, profile, 1, 40)
    cache.activate_past_recording()
    steps(tiny, cache, 20)
    other = reload(cache, tmp_path / "a", tiny.config)
    assert other.recording and other.layers[0].rollback == cache.layers[0].rollback
    for one in (cache, other):
        one.crop(-10)
    assert_goes_on(tiny, cache, other)


def test_rows_that_share_pages_are_saved_once(tiny, profile, tmp_path):
    cache = make(tiny, profile, 1, 200)
    alone = cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(4)
    assert cache.save(tmp_path / "four") < 1.25 * alone
    other = RedKnotCache.load(tmp_path / "four", tiny.config)
    assert other.memory_report().live - other.memory_report().tables == (
        cache.memory_report().live - cache.memory_report().tables
    )
    rows = torch.arange(4)[:, None] + 10  # the rows part ways: copy on write
    assert torch.equal(feed(tiny, cache, rows), feed(tiny, other, rows))
    assert_goes_on(tiny, cache, other)
    again = reload(other, tmp_path / "again", tiny.config)
    assert_goes_on(tiny, other, again)


def test_forks_are_saved_apart_and_stay_apart(tiny, profile, tmp_path):
    cache = make(tiny, profile, 2, 60)
    fork = cache.fork()
    steps(tiny, fork, 3)
    first, second = reload(cache, tmp_path / "a", tiny.config), reload(fork, tmp_path / "b", tiny.config)
    assert_goes_on(tiny, fork, second)
    assert_goes_on(tiny, cache, first)


def test_generate_continues(tiny, profile, tmp_path):
    ids = prompt(2, 33)
    cache = RedKnotCache(tiny.config, profile, page_size=8)
    first = tiny.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    other = reload(cache, tmp_path / "a", tiny.config)
    # without a mask generate() makes one from the pad token, which the tiny model may well have said
    options = {"attention_mask": torch.ones_like(first), "max_new_tokens": 4, "do_sample": False}
    one, two = (tiny.generate(first, past_key_values=c, **options) for c in (cache, other))
    assert torch.equal(one, two) and one.shape[1] == first.shape[1] + 4


def test_only_live_tokens_are_written(tiny, profile, tmp_path):
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[0, :100] = 0
    cache = make(tiny, profile, 2, 300, mask, page_size=64)
    size = cache.save(tmp_path / "a")
    tokens = 0
    for layer in range(3):
        for head in range(2):
            local = profile.head_class[layer][head] == "local"
            tokens += 2 * 11 if local else 200 + 300
    ideal = tokens * 16 * 2 * 4
    assert cache.memory_report().ideal == ideal
    with safe_open(tmp_path / "a", "pt") as file:  # any safetensors reader opens it
        rows = sum(file.get_tensor(name).nbytes for name in file.keys() if name[-2:] in (".k", ".v"))  # noqa: SIM118
    assert rows == ideal
    assert size < ideal + 8192


def test_cropped_tokens_are_not_written(tiny, profile, tmp_path):
    """After a crop the ring holds slots of tokens that are no more, and fewer old ones than it could."""
    cache = make(tiny, profile, 1, 60, rollback=6)
    cache.crop(-4)
    cache.save(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        rows = len(file.get_tensor("layers.2.k"))
    assert rows == 2 * (2 + (56 - (60 - 15)))  # two heads: the sinks, and the ring of 15 less the four


def test_the_file_describes_itself(tiny, profile, tmp_path):
    cache = make(tiny, profile, 2, 20)
    cache.save(tmp_path / "a", model=tiny, label="chat 7")
    said = describe(tmp_path / "a")
    assert said["label"] == "chat 7" and said["version"] == files.VERSION and said["seen"] == 20 and said["batch"] == 2
    assert len(said["model"]["weights"]) == 64


def test_bfloat16(profile, tmp_path):
    model = tiny_model().to(torch.bfloat16)
    cache = make(model, profile, 2, 50)
    assert_goes_on(model, cache, reload(cache, tmp_path / "a", model))


def test_sliding_window_of_the_model(tmp_path):
    values = {**tiny_config().to_diff_dict(), "sliding_window": 12}
    values = {key: value for key, value in values.items() if key not in ("model_type", "rope_parameters")}
    config = AutoConfig.for_model("gemma3_text", **values)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()
    cache = make(model, mixed_profile(config), 2, 40)
    assert_goes_on(model, cache, reload(cache, tmp_path / "a", config))


# ------------------------------------------------------------------------------------ layers left to transformers
def hybrid_model(**changes):
    values = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_next", **{**values, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()


def test_linear_layers_of_a_hybrid(tmp_path):
    model = hybrid_model()
    cache = make(model, HeadProfile.uniform(model.config, sink=2, window=9), 2, 40)
    other = reload(cache, tmp_path / "a", model.config)
    assert any(type(layer).__name__ == "LinearAttentionLayer" for layer in other.layers)
    assert_goes_on(model, cache, other)


def test_a_state_that_is_not_understood_is_refused_by_name(tiny, profile, tmp_path):
    cache = make(tiny, profile, 1, 10)

    class Strange:
        def flush(self): ...

    cache.layers.append(Strange())
    with pytest.raises(UnsupportedModel, match="layer 3 is a Strange"):
        cache.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------------------- another model
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_another_architecture_is_one_clear_line(tiny, profile, tmp_path, changes):
    make(tiny, profile, 1, 10).save(tmp_path / "a")
    with pytest.raises(CacheError, match="saved from another model") as caught:
        RedKnotCache.load(tmp_path / "a", tiny_config(**changes))
    assert "\n" not in str(caught.value)


def test_other_weights_are_one_clear_line(tiny, profile, tmp_path):
    make(tiny, profile, 1, 10).save(tmp_path / "a", model=tiny)
    RedKnotCache.load(tmp_path / "a", tiny)
    other = tiny_model()
    with torch.no_grad():
        next(other.parameters()).view(-1)[3] += 1
    with pytest.raises(CacheError, match="other weights"):
        RedKnotCache.load(tmp_path / "a", other)
    RedKnotCache.load(tmp_path / "a", other.config)  # the config alone cannot tell


def test_another_dtype_is_one_clear_line(tiny, profile, tmp_path):
    make(tiny, profile, 1, 10).save(tmp_path / "a")
    half = tiny_model().to(torch.bfloat16)
    with pytest.raises(CacheError, match=r"holds torch.float32, the model runs in torch.bfloat16"):
        RedKnotCache.load(tmp_path / "a", half)
    cache = RedKnotCache.load(tmp_path / "a", half.config)
    with pytest.raises(CacheError, match=r"in torch.float32, but"):
        steps(half, cache, 1)


def test_a_batch_of_another_size_is_refused(tiny, profile, tmp_path):
    cache = reload(make(tiny, profile, 2, 10), tmp_path / "a", tiny.config)
    assert rows_of(cache) == 2
    with pytest.raises(CacheError, match="holds 2 row"):
        feed(tiny, cache, prompt(3, 4))


def test_an_interrupted_forward_is_not_saved(tiny, profile, tmp_path):
    cache = make(tiny, profile, 1, 10)
    hook = tiny.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        feed(tiny, cache, prompt(1, 3))
    hook.remove()
    with pytest.raises(CacheError, match="interrupted"):
        cache.save(tmp_path / "a")


def test_a_newer_version_is_named(tiny, profile, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "VERSION", 99)
        make(tiny, profile, 1, 10).save(tmp_path / "a")
    with pytest.raises(RedKnotError, match="version is 99; this release reads version 2"):
        RedKnotCache.load(tmp_path / "a", tiny.config)


def test_a_plain_safetensors_file_is_refused(tiny, tmp_path):
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(RedKnotError, match="not a saved session"):
        RedKnotCache.load(tmp_path / "a", tiny.config)


def test_the_original_is_untouched_by_saving(tiny, profile, tmp_path):
    cache, twin = make(tiny, profile, 2, 30), make(tiny, profile, 2, 30)
    before = cache.memory_report()
    cache.save(tmp_path / "a")
    assert cache.memory_report() == before
    assert_goes_on(tiny, cache, twin)


def test_a_loaded_cache_needs_its_file_no_more(tiny, profile, tmp_path):
    cache = make(tiny, profile, 2, 30)
    other = reload(cache, tmp_path / "a", tiny.config)
    (tmp_path / "a").write_bytes(b"gone")
    assert_goes_on(tiny, cache, other)


def test_the_real_model(smollm2, tmp_path):
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is Paris. " * 8, return_tensors="pt").input_ids
    profile = HeadProfile.uniform(model.config, sink=4, window=32, global_heads=0.25)
    cache = RedKnotCache(model.config, profile)
    text = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    other = reload(cache, tmp_path / "a", model.config)
    one, two = (model.generate(text, past_key_values=c, max_new_tokens=4, do_sample=False) for c in (cache, other))
    assert torch.equal(one, two)
    # and it is the text of the model itself where nothing is evicted
    whole = RedKnotCache(model.config, HeadProfile.all_global(model.config))
    model.generate(ids, past_key_values=whole, max_new_tokens=4, do_sample=False)
    kept = reload(whole, tmp_path / "b", model.config)
    text = model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(text[:, :-4], past_key_values=kept, max_new_tokens=4, do_sample=False), text)
