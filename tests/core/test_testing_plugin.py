"""`redknot_hf.testing`: RedKnot becomes the default, suites written for transformers run, and everything is put back."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from core_models import SIZES, padded, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    DynamicCache,
    EncoderDecoderCache,
    FalconConfig,
    LlamaConfig,
    MambaConfig,
)
from transformers.generation import utils as generation
from transformers.modeling_utils import PreTrainedModel

from redknot_hf import RedKnotCache
from redknot_hf.testing import redknot_by_default

NAMES = [
    (generation, "DynamicCache"),
    (generation, "EncoderDecoderCache"),
    (PreTrainedModel, "get_correct_attn_implementation"),
]


@pytest.fixture(autouse=True)
def everything_is_put_back():
    before = [getattr(owner, name) for owner, name in NAMES]
    yield
    assert [getattr(owner, name) for owner, name in NAMES] == before


def llama(**options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), **options).eval()


def text(model, ids, **options):
    return model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options)


def test_generate_uses_redknot_and_says_the_same():
    want = text(llama(), tokens(20))
    with redknot_by_default() as made:
        model = llama()
        assert model.config._attn_implementation == "redknot"
        got = text(model, tokens(20))
    assert isinstance(got.past_key_values, RedKnotCache) and torch.equal(got.sequences, want.sequences)
    assert isinstance(got.past_key_values, DynamicCache) and not got.past_key_values.is_compileable
    assert (made.caches, made.models) == (1, 1) and not made.refused and not made.kept
    assert llama().config._attn_implementation == "sdpa"
    assert type(text(llama(), tokens(5)).past_key_values) is DynamicCache


def test_what_is_asked_for_by_name_is_left_alone():
    own = DynamicCache()
    with redknot_by_default():
        model = llama(attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        assert text(llama(), tokens(9), past_key_values=own).past_key_values is own
        assert isinstance(text(model, tokens(9)).past_key_values, RedKnotCache)  # exact under eager, too


def test_it_is_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), redknot_by_default():
        raise ZeroDivisionError


def test_encoder_decoder_models_get_it_for_self_attention():
    config = BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, decoder_start_token_id=1, forced_eos_token_id=None, init_std=0.3,
    )  # fmt: skip
    ids, mask = padded([12, 7])
    outs = []
    for active in (False, True):
        torch.manual_seed(0)
        with redknot_by_default() if active else torch.no_grad():
            model = AutoModelForSeq2SeqLM.from_config(config).eval()
            outs.append(text(model, ids, attention_mask=mask, num_beams=2))
    cache = outs[1].past_key_values
    assert type(cache) is EncoderDecoderCache
    assert isinstance(cache.self_attention_cache, RedKnotCache) and type(cache.cross_attention_cache) is DynamicCache
    assert torch.equal(outs[0].sequences, outs[1].sequences)


def test_families_that_cannot_be_served_keep_what_they_have_and_are_counted():
    with redknot_by_default() as made:
        falcon = AutoModelForCausalLM.from_config(
            FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        )
        mamba = AutoModelForCausalLM.from_config(
            MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=None)
        )
        text(falcon, tokens(5), pad_token_id=0)
        assert not isinstance(text(mamba, tokens(5), pad_token_id=0).get("past_key_values"), RedKnotCache)
    assert made.kept["FalconForCausalLM"] and made.caches == 1
    assert any("attention heads" in why for why in made.refused)
    assert "kept its own attention" in str(made)


SUITE = '''
    """What transformers' own mixin does: build from a config, generate, look at the cache."""
    import copy, pytest, torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, GptOssConfig, Gemma3TextConfig
    from transformers.cache_utils import Cache, DynamicCache
    SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None)

    @pytest.fixture(params=[LlamaConfig, Qwen3Config, GptOssConfig, Gemma3TextConfig])
    def model(request):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(request.param(**SIZES)).eval()

    IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    GREEDY = dict(do_sample=False, max_new_tokens=5, return_dict_in_generate=True, attention_mask=torch.ones_like(IDS))

    def test_redknot_is_what_runs(model):
        from redknot_hf import RedKnotCache
        assert model.config._attn_implementation == "redknot"
        assert isinstance(model.generate(IDS, **GREEDY).past_key_values, RedKnotCache)

    @pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(num_beams=3, num_return_sequences=2)])
    def test_past_key_values_format(model, options):
        out = model.generate(IDS, **GREEDY, **options)
        cache, rows = out.past_key_values, 2 * options.get("num_beams", 1)
        assert isinstance(cache, Cache) and len(cache) == len(cache.layers) == 2
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape == (rows, 2, 15, 16)

    def test_generate_continue_from_past_key_values(model):
        whole = model.generate(IDS, **{**GREEDY, "max_new_tokens": 8})
        first = model.generate(IDS, **{**GREEDY, "max_new_tokens": 4})
        rest = {**GREEDY, "max_new_tokens": 4, "attention_mask": torch.ones_like(first.sequences)}
        out = model.generate(first.sequences, past_key_values=copy.deepcopy(first.past_key_values), **rest)
        assert torch.equal(out.sequences, whole.sequences)

    def test_assisted_and_prompt_lookup(model):
        one = {**GREEDY, "attention_mask": torch.ones_like(IDS[:1])}
        want = model.generate(IDS[:1], **one).sequences
        assert torch.equal(model.generate(IDS[:1], assistant_model=copy.deepcopy(model), **one).sequences, want)
        assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=2, **one).sequences, want)

    def test_without_cache_equals_with(model):
        assert torch.equal(model.generate(IDS, use_cache=False, **GREEDY).sequences, model.generate(IDS, **GREEDY).sequences)
'''


def test_a_suite_written_for_transformers_runs_against_redknot(tmp_path):
    (tmp_path / "test_suite.py").write_text(textwrap.dedent(SUITE))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "redknot_hf.testing", "-p", "no:cacheprovider", "."]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "28 passed" in done.stdout
    assert "redknot by default" in done.stdout and "caches were RedKnotCaches" in done.stdout
