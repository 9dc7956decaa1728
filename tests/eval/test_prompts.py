"""Prompts: exact lengths, the same for the same seed, and what the answer needs is where it should be."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from redknot_hf.errors import RedKnotError
from redknot_hf.eval.documents import Question
from redknot_hf.eval.prompts import NOISE, PromptMaker
from redknot_hf.eval.tasks import TASKS, make_examples

GENERATED = [name for name in TASKS if name != "qa"]
LONG = 4096  # bytes: the byte tokenizer needs more of them than a real one


def texts(tokenizer, example):
    return tokenizer.decode(example.context), tokenizer.decode(example.question)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", GENERATED)
def test_contexts_have_the_length_that_was_asked_for_and_come_from_the_seed(
    name, chat, byte_tokenizer, plain_tokenizer
):
    tokenizer = byte_tokenizer if chat else plain_tokenizer
    for tokens in (LONG, LONG + 13):
        first = make_examples(name, PromptMaker(tokenizer, tokens, seed=1), 3)
        assert [len(example.context) for example in first] == [tokens] * 3
        assert make_examples(name, PromptMaker(tokenizer, tokens, seed=1), 3) == first
        assert [e.index for e in first] == [0, 1, 2]
    other = make_examples(name, PromptMaker(tokenizer, tokens, seed=2), 3)
    assert all(a.context != b.context for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", [name for name in GENERATED if name not in ("ppl",)])
def test_the_answer_is_in_the_context_and_not_in_the_question(name, byte_tokenizer):
    for example in make_examples(name, PromptMaker(byte_tokenizer, LONG), 4):
        context, question = texts(byte_tokenizer, example)
        body = byte_tokenizer.decode(example.context[example.opening :])
        assert all(reference in body for reference in example.references)
        assert not any(reference in question for reference in example.references)
        assert question.count("<assistant>") == 1 and context.startswith("<user>")


@pytest.mark.parametrize(
    "name, keys, values", [("single", 1, 1), ("multikey", 4, 4), ("multivalue", 1, 4), ("multiquery", 4, 4)]
)
def test_needles_are_as_many_as_the_task_says(name, keys, values, byte_tokenizer):
    for example in make_examples(name, PromptMaker(byte_tokenizer, LONG), 4):
        context, question = texts(byte_tokenizer, example)
        found = re.findall(r"One of the special magic numbers for ([a-z-]+) is: (\d{7})\.", context)
        assert len({key for key, _ in found}) == keys and len(set(found)) == values
        asked = {key for key, value in found if value in example.references}
        assert all(key in question for key in asked) and len(asked) == (keys if name == "multiquery" else 1)
        # Distractors must not be asked for, and everything under the asked key must be.
        assert {value for key, value in found if key in asked} == set(example.references)


def test_depths_spread_over_the_context(byte_tokenizer):
    depths = []
    for example in make_examples("single", PromptMaker(byte_tokenizer, LONG), 10):
        context, _ = texts(byte_tokenizer, example)
        depths.append(context.index("One of the special") / len(context))
    assert min(depths) < 0.2 and max(depths) > 0.75
    assert max(b - a for a, b in zip([0, *sorted(depths)], [*sorted(depths), 1], strict=True)) < 0.35


def test_variables_are_assigned_before_they_are_used(byte_tokenizer):
    for example in make_examples("vt", PromptMaker(byte_tokenizer, LONG), 6):
        context, question = texts(byte_tokenizer, example)
        lines = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context)
        value = re.search(r"value (\d{5})", question)[1]
        holds = set()
        for name, source in lines:  # in the order of the text
            if source == value or source in holds:
                holds.add(name)
        assert holds == set(example.references) and len(holds) == 5


def test_common_words_are_the_most_common(byte_tokenizer):
    for example in make_examples("cwe", PromptMaker(byte_tokenizer, LONG), 2):
        counts = Counter(re.findall(r"\d+\. ([a-z]+)", texts(byte_tokenizer, example)[0]))
        ranked = [word for word, _ in counts.most_common()]
        assert set(ranked[:10]) == set(example.references)
        assert counts[ranked[9]] >= 2 * counts[ranked[10]]


def test_frequent_words_are_the_most_frequent(byte_tokenizer):
    for example in make_examples("fwe", PromptMaker(byte_tokenizer, LONG), 2):
        body = byte_tokenizer.decode(example.context[example.opening :])
        counts = Counter(word for word in body.split() if re.fullmatch(r"[a-z]{6}", word) and word not in NOISE)
        assert [word for word, _ in counts.most_common(3)] == list(example.references)
        assert body.split().count("...") > counts.most_common(1)[0][1]


@pytest.mark.parametrize("name", ["kv", "kv_short"])
def test_the_asked_key_has_the_value(name, byte_tokenizer):
    for example in make_examples(name, PromptMaker(byte_tokenizer, LONG), 4):
        context, question = texts(byte_tokenizer, example)
        pairs = json.loads(context[context.index("{") : context.rindex("}") + 1])
        assert pairs[re.search(r'Key: "([^"]+)"', question)[1]] == example.references[0]
        assert len(pairs) > 10


def test_a_text_is_continued_without_a_gap(byte_tokenizer):
    (example,) = make_examples("ppl", PromptMaker(byte_tokenizer, LONG, texts=["One. Two two. Three three three. "]), 1)
    whole = byte_tokenizer.decode([*example.context, *example.question])
    assert len(example.question) == 128
    assert re.fullmatch(r"(?:\w+ ?)*\.? ?(?:(One|Two two|Three three three)\. ?)*[\w ]*\.?", whole)


@pytest.mark.parametrize("name", ["single", "vt", "cwe", "kv"])
def test_too_short_a_context_is_refused(name, byte_tokenizer):
    with pytest.raises(RedKnotError, match="too short for this task"):
        make_examples(name, PromptMaker(byte_tokenizer, 150), 1)


def questions(count):
    return [
        Question(
            f"Who built bridge {i}?",
            (f"Builder{i}",),
            ((f"Bridge {i}", f"Bridge {i} was built by Builder{i}."), (f"River {i}", "A river.")),
        )
        for i in range(count)
    ]


def test_question_answering_keeps_its_own_documents_whole(byte_tokenizer):
    asked = questions(40)
    examples = make_examples("qa", PromptMaker(byte_tokenizer, 900), 20, asked)
    places = []
    for example, question in zip(examples, asked, strict=False):
        context, text = texts(byte_tokenizer, example)
        assert len(example.context) == 900
        for title, document in question.documents:
            assert f"{title}\n{document}" in context
        assert question.question in text and "Builder7" not in text
        places.append(context.index(question.documents[0][1]) / len(context))
    assert min(places) < 0.3 and max(places) > 0.6
    # a small set is filled with prose
    (alone,) = make_examples("qa", PromptMaker(byte_tokenizer, 900), 1, questions(1))
    assert len(alone.context) == 900


def test_questions_that_do_not_fit_are_left_out(byte_tokenizer):
    large = Question("Large?", ("yes",), (("Large", "word " * 400),))
    examples = make_examples("qa", PromptMaker(byte_tokenizer, 900), 3, [large, *questions(3)])
    assert [e.references[0] for e in examples] == ["Builder0", "Builder1", "Builder2"]
    with pytest.raises(RedKnotError, match="no question's documents fit"):
        make_examples("qa", PromptMaker(byte_tokenizer, 900), 3, [large])
    with pytest.raises(RedKnotError, match="needs --data"):
        make_examples("qa", PromptMaker(byte_tokenizer, 900), 3, [])
