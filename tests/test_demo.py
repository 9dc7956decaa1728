"""`redknot demo`: a fair comparison, exact where it must be, and errors that name what is wrong with the input."""

from __future__ import annotations

import importlib.resources
import json

import pytest

from redknot_hf import HeadProfile, RedKnotCache, cli
from redknot_hf.commands import demo
from redknot_hf.demo_compare import Contender, Question, build_prompt, kv_bytes, run_contender

STORY = (
    "The lighthouse of Marrow Bay was built in 1871 by the engineer Ines Carvalho. Its lamp burned oil until 1904. "
    "The keeper's cat was called Admiral, and slept on the stairs. "
) * 4
CAT = Question("What was the keeper's cat called?", "The keeper's cat was called", "Admiral")


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return str(path)


@pytest.fixture
def all_global(smollm2, tmp_path):
    return str(HeadProfile.all_global(smollm2[0].config).save(tmp_path / "profile.json"))


@pytest.fixture(autouse=True)
def keep_threads():
    """The command chooses threads for itself."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_global_answers_like_dynamic_cache(smollm2_path, story, all_global, tmp_path, capsys):
    command = ["demo", "--json", "--model", str(smollm2_path), "--document", story, "--profile", all_global]
    command += ["--question", CAT.text, "--answer-prefix", CAT.answer_prefix, "--max-new-tokens", "6"]
    command += ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    dynamic, ours = report["results"]  # no control: there is no local head
    assert dynamic["answers"][0]["text"].startswith("The keeper's cat was called Admiral")
    assert ours["answers"][0]["text"] == dynamic["answers"][0]["text"]
    assert ours["answers"][0]["tokens"] == dynamic["answers"][0]["tokens"] <= 6
    config = json.loads((smollm2_path / "config.json").read_text())
    cells = config["num_hidden_layers"] * config["num_key_value_heads"]
    assert dynamic["kv_bytes"] == report["document_tokens"] * cells * 64 * 2 * 4  # head_dim, K and V, float32
    assert (tmp_path / "out" / "head_map.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_read_off_the_cache_that_read_the_document(smollm2):
    model, tokenizer = smollm2
    profile = HeadProfile.uniform(model.config, sink=4, window=64, global_heads={(6, 0)})
    made = []

    def make_cache():
        made.append(RedKnotCache(model.config, profile, prefill="full"))
        return made[-1]

    prompt = build_prompt(tokenizer, STORY, [CAT])
    result = run_contender(model, tokenizer, prompt, [CAT], Contender("ours", make_cache, "redknot"), max_new_tokens=2)
    tokens = prompt.document.shape[1]
    assert made[-1].get_seq_length() == tokens  # the question went to a copy
    assert result.kv_live_bytes == kv_bytes(made[-1])[1] < result.kv_bytes
    pages = profile.kv_bytes(tokens, dtype="float32", page_size=made[-1].page_size)
    assert result.kv_live_bytes == pages + made[-1].memory_report().tables


def test_streamed_text_is_the_answer(smollm2):
    from transformers import DynamicCache

    model, tokenizer = smollm2
    pieces: list[str] = []
    layers = []
    result = run_contender(
        model,
        tokenizer,
        build_prompt(tokenizer, STORY, [CAT]),
        [CAT],
        Contender("dynamic", lambda: DynamicCache(config=model.config), "redknot"),
        max_new_tokens=5,
        on_layer=lambda: layers.append(1),
        on_text=pieces.append,
    )
    answer = result.answers[0]
    assert CAT.answer_prefix + "".join(pieces).rstrip() == answer.text
    assert answer.correct is True
    assert len(layers) == model.config.num_hidden_layers  # the document is read once
    assert result.first_token_s == result.read_s + answer.first_token_s


def test_document_tokens_do_not_depend_on_the_question(smollm2):
    _, tokenizer = smollm2
    one = build_prompt(tokenizer, STORY, [CAT])
    other = build_prompt(tokenizer, STORY, [Question("Who built it?")])
    assert one.document.tolist() == other.document.tolist()
    text = tokenizer.decode(one.document[0].tolist() + one.questions[0][0].tolist())
    chat = [
        {
            "role": "user",
            "content": f"Read this article and answer the question.\n\n{STORY.strip()}\n\nQuestion: {CAT.text}",
        }
    ]
    assert text == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + CAT.answer_prefix


def test_shipped_questions_have_their_answers_far_from_the_end():
    """What the demo claims: the answers are in the text and outside a local window (256 tokens, 5 characters each)."""
    text = (importlib.resources.files("redknot_hf") / "data" / demo._DOCUMENT).read_text(encoding="utf-8")
    text = " ".join(text.split())
    for _, _, expected in demo._QUESTIONS:
        assert expected in text
        assert expected not in text[-5 * 256 :]


def test_control_has_no_head_that_keeps_everything(smollm2):
    profile = HeadProfile.uniform(smollm2[0].config, sink=3, window=77, global_heads=demo._RETRIEVAL_HEADS)
    control = demo._all_local(profile)
    assert control.count("local") == 90
    assert {w for row in control.window for w in row} == {77} and {s for row in control.sink for s in row} == {3}
    assert profile.count("local") == 80  # the profile itself is unchanged


@pytest.mark.parametrize(
    "options, message",
    [
        (["--document", "no-such-file.txt", "--question", "x"], "no-such-file.txt: No such file"),
        (["--document", "STORY"], "--question"),
        (["--document", "BINARY", "--question", "x"], "not UTF-8"),
        (["--document", "EMPTY", "--question", "x"], "is empty"),
        (["--device", "no-such-device"], "--device no-such-device"),
        (["--model", "./no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_input_is_one_line(options, message, story, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text(" \n")
    paths = {"STORY": story, "BINARY": str(tmp_path / "binary"), "EMPTY": str(tmp_path / "empty")}
    command = ["demo", "--out", str(tmp_path / "out"), *(paths.get(option, option) for option in options)]
    assert cli.main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("redknot: error:")]
    assert len(errors) == 1 and message in errors[0]


def test_too_long_a_document_is_refused_before_it_is_read(smollm2_path, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("word " * 9000)
    command = ["demo", "--model", str(smollm2_path), "--document", str(tmp_path / "long.txt"), "--question", "x"]
    assert cli.main([*command, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "the model was made for 8192" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_answer_length_must_be_positive(value):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--max-new-tokens", value])
    assert ended.value.code == 2
