"""Relocation equals recomputation: M3 of the exactness ladder, on tiny random models of every rotary layout."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from redknot_hf.errors import UnsupportedModel
from redknot_hf.segments.rope import LayerRope, Relocator, RopeSignature, rotate
from redknot_hf.segments.rope_own import OwnRotary
from redknot_hf.segments.rope_probe import probe

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


def rope(kind: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
SUPPORTED = {
    "default": ("Llama", {}),
    "linear": ("Llama", rope("linear", factor=4.0)),
    "llama3": ("Llama", LLAMA3),
    "yarn": ("Llama", rope("yarn", factor=8.0, original_max_position_embeddings=512)),
    "longrope-one-regime": (
        "Llama",
        rope(
            "longrope", factor=8.0, original_max_position_embeddings=512, short_factor=[1.5] * 8, long_factor=[1.5] * 8
        ),
    ),
    "partial-phi": ("Phi", {}),
    "partial-stablelm": ("StableLm", {}),
    "interleaved-cohere": ("Cohere", {}),
    "interleaved-partial-glm": ("Glm", {"head_dim": 32, "attention_bias": True}),
    "interleaved-table-gptj": (
        "GPTJ",
        dict(n_positions=2048, n_embd=64, n_layer=3, n_head=4, n_inner=96, rotary_dim=8, vocab_size=128),
    ),
    "two-thetas-gemma3": ("Gemma3", {"head_dim": 32, "sliding_window": 64, "num_hidden_layers": 6}),
    "nope-smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "neox-partial": ("GPTNeoX", {}),
    "sliding-and-nope-cohere2": ("Cohere2", {"head_dim": 16, "sliding_window": 8}),
    "yarn-gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    kind, options = SUPPORTED[name]
    if kind == "GPTJ":
        torch.manual_seed(0)
        return transformers.GPTJForCausalLM(transformers.GPTJConfig(**options)).to(dtype).eval()
    if kind == "Gemma3":
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(**{**SIZES, **options})
        return transformers.Gemma3ForCausalLM(config).to(dtype).eval()
    return build(kind, dtype, **options)


@torch.no_grad()
def keys_at(model, ids: torch.Tensor, first: int) -> list[torch.Tensor]:
    cache = DynamicCache()  # without the config: no sliding layer drops anything
    positions = torch.arange(first, first + ids.shape[1])[None].expand(ids.shape[0], -1)
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


def ids_of(length: int = 24, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SUPPORTED)
def test_relocated_keys_equal_recomputed_keys(name):
    """M3: a segment with nothing before it, shifted by a distance that the probe did not see."""
    model = make(name)
    relocator = Relocator.from_model(model)
    at_0, at_137, at_900 = (keys_at(model, ids_of(), p) for p in (0, 137, 900))
    steps = torch.arange(24)
    for i, (a, b, c) in enumerate(zip(at_0, at_137, at_900, strict=True)):
        scale = a.abs().max()
        torch.testing.assert_close(relocator.relocate(a, 137, i, source=steps), b, rtol=0, atol=2e-5 * scale)
        torch.testing.assert_close(relocator.relocate(c, -763, i, source=steps + 900), b, rtol=0, atol=2e-5 * scale)
        if i not in relocator.nope_layers:
            assert (a - b).abs().max() > 0.05 * scale, "the shift moves keys: the comparison means something"


@pytest.mark.parametrize("name", SUPPORTED)
def test_probe_confirms_it(name):
    report = probe(make(name))
    assert report.relative_error < 1e-4 < report.moved


def test_what_is_measured_is_what_the_families_do():
    def layers(name):
        return RopeSignature.of(make(name)).layers

    assert layers("default") == ("half:16/16",) * 3
    assert layers("partial-phi") == ("half:8/16",) * 3
    assert layers("partial-stablelm") == ("half:4/16",) * 3
    assert layers("interleaved-cohere") == ("interleaved:16/16",) * 3
    assert layers("interleaved-partial-glm") == ("interleaved:16/32",) * 3
    assert layers("interleaved-table-gptj") == ("interleaved:8/16",) * 3
    assert layers("nope-smollm3") == ("half:16/16",) * 3 + ("none",)
    gemma = Relocator.from_model(make("two-thetas-gemma3"))
    assert gemma.groups == [0, 0, 0, 0, 0, 5], "five local layers share one theta, the global one has its own"
    assert gemma.layers[0].inv_freq[1] > gemma.layers[5].inv_freq[1]


def test_nope_layers_are_left_alone():
    model = make("nope-smollm3")
    relocator = Relocator.from_model(model)
    keys = keys_at(model, ids_of(), 0)[3]
    assert relocator.nope_layers == [3]
    assert relocator.relocate(keys, 500, 3) is keys and relocator.tables(500, 3) is None
    assert relocator.groups[3] == -1


@pytest.mark.parametrize("name", ["default", "interleaved-partial-glm", "two-thetas-gemma3", "nope-smollm3"])
def test_bf16_models_are_measured_and_keys_are_rounded_once(name):
    model = make(name, torch.bfloat16)
    relocator = Relocator.from_model(model)
    assert [r and (r.layout, r.rotary_dim) for r in relocator.layers] == [
        r and (r.layout, r.rotary_dim) for r in Relocator.from_model(make(name)).layers
    ]
    for i, (a, b) in enumerate(zip(keys_at(model, ids_of(), 0), keys_at(model, ids_of(), 137), strict=True)):
        moved = relocator.relocate(a, 137, i, source=torch.arange(24))
        assert moved.dtype == torch.bfloat16
        if i == 0:
            # Layer 0 sees equal inputs, so only three bf16 roundings separate the two: cos/sin and key of the model,
            # key of ours.
            torch.testing.assert_close(moved.float(), b.float(), rtol=0, atol=3 * 2**-8 * a.abs().max().item())
        exact = relocator.relocate(a.float(), 137, i, source=torch.arange(24))
        assert torch.equal(moved, exact.to(torch.bfloat16)), "one rounding from fp32"


def test_per_token_distances_of_a_batch():
    model = make("default")
    relocator = Relocator.from_model(model)
    ids = ids_of(10)
    here = keys_at(model, ids, 0)[0]
    there = {d: keys_at(model, ids, d)[0] for d in (5, 700)}
    delta = torch.tensor([[5] * 4 + [700] * 6, [700] * 10])
    moved = relocator.relocate(here, delta, 0, source=torch.arange(10).expand(2, -1))
    torch.testing.assert_close(moved[0, :, :4], there[5][0, :, :4], rtol=0, atol=2e-5)
    torch.testing.assert_close(moved[0, :, 4:], there[700][0, :, 4:], rtol=0, atol=2e-5)
    torch.testing.assert_close(moved[1], there[700][1], rtol=0, atol=2e-5)


def test_nothing_moves_by_zero_and_there_and_back_is_one_rounding():
    relocator = Relocator.from_model(make("default"))
    keys = torch.randn(1, 2, 9, 16)
    assert relocator.relocate(keys, 0, 0) is keys
    assert torch.equal(relocator.relocate(keys, torch.zeros(9, dtype=torch.int64), 0), keys)
    there = relocator.relocate(keys, 1000, 0)
    torch.testing.assert_close(relocator.relocate(there, -1000, 0, source=1000), keys, rtol=0, atol=1e-5)


def test_with_the_source_known_the_error_does_not_grow_with_the_position():
    """At 100,000 the model's own fp32 angles are off by up to 4e-3 rad. Recomputation has that error; so must we."""
    model = build("Llama", max_position_embeddings=200_000)
    relocator = Relocator.from_model(model)
    ids = ids_of(24, rows=1)
    base, far = keys_at(model, ids, 3)[0], keys_at(model, ids, 100_003)[0]
    known = relocator.relocate(base, 100_000, 0, source=torch.arange(3, 27))
    unknown = relocator.relocate(base, 100_000, 0)
    scale = far.abs().max()
    assert (known - far).abs().max() < 2e-6 * scale
    assert (known - far).abs().max() < (unknown - far).abs().max() < 1e-2 * scale


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_tables_give_what_a_kernel_needs(layout):
    """cos and sin [.., R/2] in fp32, and the layout flag; the textbook rotation of complex numbers is the judge."""
    freq = torch.tensor([1.0, 0.25, 0.01])
    relocator = Relocator([LayerRope(layout, 6, 8, freq)], RopeSignature(""))
    delta = torch.tensor([[0, 3, -7]])
    cos, sin = relocator.tables(delta, 0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (1, 3, 3)
    keys = torch.randn(1, 2, 3, 8)
    re, im = (keys[..., :3], keys[..., 3:6]) if layout == "half" else (keys[..., 0:6:2], keys[..., 1:6:2])
    turned = torch.complex(re, im).to(torch.complex128) * torch.exp(
        1j * delta[:, None, :, None].double() * freq.double()
    )
    want = (
        torch.cat((turned.real, turned.imag), -1)
        if layout == "half"
        else torch.stack((turned.real, turned.imag), -1).flatten(-2)
    )
    got = rotate(keys, cos[:, None], sin[:, None], layout)
    torch.testing.assert_close(got[..., :6].double(), want, rtol=0, atol=1e-6)
    assert torch.equal(got[..., 6:], keys[..., 6:]), "what is not rotary stays as it is"


@pytest.mark.parametrize("name", ["default", "yarn", "partial-phi", "interleaved-cohere", "interleaved-partial-glm"])
def test_the_families_own_function_agrees_with_the_tables(name):
    """Two independent ways: the measured layout with our tables, and the model's frozen module with its function."""
    model = make(name)
    keys = keys_at(model, ids_of(), 0)[1]
    own = OwnRotary.of(model, 1)(keys, torch.full((24,), 137))
    torch.testing.assert_close(own, Relocator.from_model(model).relocate(keys, 137, 1), rtol=0, atol=1e-5)


REFUSED = {
    "dynamic": (lambda: build("Llama", **rope("dynamic", factor=4.0)), "dynamic NTK"),
    "longrope": (
        lambda: build(
            "Llama",
            **rope(
                "longrope",
                factor=8.0,
                original_max_position_embeddings=512,
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
            ),
        ),
        "longrope",
    ),
    "learned": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=512)
        ).eval(),
        "learned or absolute positions",
    ),
    "alibi": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128)
        ).eval(),
        "ALiBi",
    ),
    "mla": (
        lambda: build(
            "DeepseekV3",
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            n_shared_experts=1,
        ),
        "MLA",
    ),
    "states-that-depend-on-the-position": (
        lambda: transformers.RecurrentGemmaForCausalLM(
            transformers.RecurrentGemmaConfig(
                vocab_size=128,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=96,
                lru_width=64,
            )
        ).eval(),
        "not by a rotation",
    ),
    "no-rotary-at-all": (lambda: build("SmolLM3", num_hidden_layers=2, no_rope_layers=[0, 0]), "no rotary embedding"),
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
        ),
        "encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_moved_is_refused_by_name(name):
    build_it, reason = REFUSED[name]
    model = build_it()
    with pytest.raises(UnsupportedModel, match=reason):
        Relocator.from_model(model)
    with pytest.raises(UnsupportedModel, match=reason):
        RopeSignature.of(model)


def test_models_that_see_images_may_move_text_only():
    text = {**SIZES, **rope("default", mrope_section=[2, 3, 3])}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2)
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    assert Relocator.from_model(model).text_only and probe(model).relative_error < 1e-4
    assert not Relocator.from_model(make("default")).text_only


def test_image_positions_are_refused():
    relocator = Relocator.from_model(make("default"))
    with pytest.raises(UnsupportedModel, match="several axes"):
        relocator.relocate(torch.randn(1, 2, 4, 16), torch.zeros(3, 1, 4, dtype=torch.int64), 0)


def test_signatures_tell_ropes_apart_and_are_stable():
    one, same = RopeSignature.of(make("default")), RopeSignature.of(make("default"))
    assert one == same and one.digest == same.digest and hash(one) == hash(same) and len(one.digest) == 64
    digests = {RopeSignature.of(make(name)).digest for name in SUPPORTED}
    assert len(digests) == len(SUPPORTED)
    assert RopeSignature.of(make("default", torch.bfloat16)).digest != one.digest, (
        "frequencies cast to bf16 turn differently"
    )
    assert RopeSignature.of(make("default").config) != one


def test_the_relocator_is_remembered_until_the_frequencies_change():
    model = make("default")
    first = Relocator.from_model(model)
    assert Relocator.from_model(model) is first
    model.model.rotary_emb.inv_freq.mul_(0.5)
    changed = Relocator.from_model(model)
    assert changed is not first
    torch.testing.assert_close(changed.layers[0].inv_freq, first.layers[0].inv_freq * 0.5)


def test_measuring_leaves_the_model_as_it_was():
    model = make("default").train()
    state = torch.random.get_rng_state()
    Relocator.from_model(model)
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_a_document_of_smollm2_moved_by_137(smollm2):
    """M3 on a real model: equals recomputation at 137, within what fp32 rounding does to recomputation itself."""
    model, tokenizer = smollm2
    text = "The lighthouse of Alexandria stood on the island of Pharos and was about a hundred metres tall. " * 4
    ids = tokenizer(text, return_tensors="pt").input_ids
    relocator = Relocator.from_model(model)
    steps = torch.arange(ids.shape[1])
    worst = 0.0
    for i, (a, b) in enumerate(zip(keys_at(model, ids, 0), keys_at(model, ids, 137), strict=True)):
        moved = relocator.relocate(a, 137, i, source=steps)
        worst = max(worst, ((moved - b).norm() / b.norm()).item())
        assert ((a - b).norm() / b.norm()) > 0.1
    assert worst < 1e-4
