"""RedKnotLM under lm-evaluation-harness, on tasks with local data; skips where the harness is not installed."""

from __future__ import annotations

import json

import pytest
import torch

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import ProfileError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra lm-eval)")

from redknot_hf.eval.harness import RedKnotLM  # noqa: E402

GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["~~"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
task: local_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["ab", "zz"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def texts():
    return [" ".join(f"word{(i * 7 + j) % 23}" for j in range(40 + 5 * i)) for i in range(3)]


@pytest.fixture
def harness(tiny_model, own_tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    own_tokenizer.pad_token, own_tokenizer.eos_token = "!", "!"

    def make(profile):
        return RedKnotLM(tiny_model, profile, page_size=16, tokenizer=own_tokenizer, batch_size=2, max_length=1024)

    return make


def request(*arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def test_likelihoods_are_those_of_reading_with_the_cache(harness, tiny_model, byte_tokenizer, texts):
    """Against a loop over single tokens, so neither batching nor padding can hide in it."""
    profile = HeadProfile.uniform(tiny_model.config, sink=2, window=20, global_heads={(0, 1)})
    found = harness(profile).loglikelihood([request(text, " and then") for text in texts], disable_tqdm=True)
    dense = harness(HeadProfile.all_global(tiny_model.config)).loglikelihood(
        [request(text, " and then") for text in texts], disable_tqdm=True
    )
    for text, (value, greedy), (other, _) in zip(texts, found, dense, strict=True):
        ids = byte_tokenizer(text + " and then")["input_ids"]
        start, total, right = len(byte_tokenizer(text)["input_ids"]), 0.0, True
        cache = RedKnotCache(tiny_model.config, profile, page_size=16)
        with torch.no_grad():
            for at, token in enumerate(ids[:-1]):
                logits = tiny_model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].float()
                if at + 1 >= start:
                    total += float(logits.log_softmax(-1)[ids[at + 1]])
                    right = right and int(logits.argmax()) == ids[at + 1]
        assert value == pytest.approx(total, abs=1e-3) and greedy is right
        assert abs(value - other) > 1e-2, "windows that change nothing would prove nothing"


def test_all_global_is_the_harness_own_model(harness, tiny_model, own_tokenizer, texts):
    from lm_eval.models.huggingface import HFLM

    ours = harness(HeadProfile.all_global(tiny_model.config))
    plain = HFLM(tiny_model, tokenizer=own_tokenizer, batch_size=2, max_length=1024)
    requests = [request(text, " and then") for text in texts]
    for a, b in zip(
        ours.loglikelihood(requests, disable_tqdm=True), plain.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]


def test_tasks_run_unchanged(harness, tiny_model, byte_tokenizer, texts, tmp_path):
    from lm_eval.tasks import TaskManager

    profile = HeadProfile.uniform(tiny_model.config, sink=2, window=20, global_heads={(0, 1)})
    answers = []
    for text in texts:
        ids = torch.tensor([byte_tokenizer(text)["input_ids"]])
        cache = RedKnotCache(tiny_model.config, profile, page_size=16)
        out = tiny_model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answers.append(byte_tokenizer.decode(out[0, ids.shape[1] :]))
    answers[-1] = "something else"  # a score that cannot be wrong is none
    data = tmp_path / "data.jsonl"
    rows = [{"text": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "generate.yaml").write_text(GENERATE.format(data=data))
    (tmp_path / "choose.yaml").write_text(CHOOSE.format(data=data))
    results = lm_eval.simple_evaluate(
        model=harness(profile),
        tasks=["local_generate", "local_choose"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert results["local_generate"]["exact_match,none"] == pytest.approx(2 / 3)
    assert 0.0 <= results["local_choose"]["acc,none"] <= 1.0


def test_the_name_is_registered_and_a_wrong_profile_refused(harness, tiny_model):
    from lm_eval.api.registry import get_model

    assert get_model("redknot") is RedKnotLM
    other = HeadProfile(3, 2, [["global"] * 2] * 3)
    with pytest.raises(ProfileError, match="3 layers x 2 KV heads"):
        harness(other)
