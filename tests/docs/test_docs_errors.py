"""The list of errors is complete, and what the troubleshooting page quotes is what the package says."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def docs_errors():
    spec = importlib.util.spec_from_file_location("docs_errors", ROOT / "scripts" / "docs_errors.py")
    module = importlib.util.module_from_spec(spec)

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_error_class_is_known(docs_errors):
    """A new subclass of RedKnotError must be explained on the page."""
    bases, found = {"RedKnotError"}, {"RedKnotError"}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in docs_errors.SOURCE.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while bases:
        bases = {c.name for c in classes if any(isinstance(b, ast.Name) and b.id in bases for b in c.bases)} - found
        found |= bases
    assert found == set(docs_errors.KINDS)
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in found)


def test_every_message_is_on_the_page(docs_errors):
    messages = list(docs_errors.raised())
    page = docs_errors.render()
    assert len(messages) > 300
    for item in messages:
        assert docs_errors._cell(item.message) in page, f"{item.path}:{item.line}"
    for prefixes, title, _ in docs_errors.AREAS[:-1]:
        for prefix in prefixes:
            assert any(docs_errors.SOURCE.rglob("*")), title
            assert not prefix.endswith("/") or (docs_errors.SOURCE / prefix).is_dir(), prefix


def test_quoted_messages_exist(docs_errors):
    """Every phrase in quotes in the first column of a table, in pieces between dots, stands in one message."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [re.sub(r"\{[^}]*\}", "…", item.message) for item in docs_errors.raised()]
    messages += [path.read_text(encoding="utf-8") for path in (docs_errors.SOURCE / "masks.py",)]
    phrases = [
        phrase
        for row in re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
        if "transformers' own" not in row
        for phrase in re.findall(r'"([^"]+)"', row)
    ]
    assert len(phrases) > 25
    for phrase in phrases:
        pieces = [piece.strip() for piece in phrase.split("…") if piece.strip()]
        assert any(all(piece in message for piece in pieces) for message in messages), phrase


def test_a_message_that_is_not_there_would_be_noticed(docs_errors):
    messages = [item.message for item in docs_errors.raised()]
    assert not any("this sentence is in no error" in message for message in messages)
