"""Every script in examples/ runs as it is and shows what it says it shows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
# Run by their owners' tests, because they take several processes.
ELSEWHERE = {"tensor_parallel.py", "disaggregated.py"}


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch, smollm2_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDKNOT_TEST_MODEL", str(smollm2_path))


def test_quick_start():
    answers = example("quick_start").main()
    assert answers["DynamicCache"] == answers["RedKnotCache, all heads global"]
    assert "marmalade" in answers["DynamicCache"]


@pytest.mark.slow
def test_profile_model(tmp_path):
    profile = example("profile_model").main("profile.json")
    assert (tmp_path / "profile.json").exists() and 0.2 <= profile.count("global") / 90 <= 0.3


@pytest.mark.slow
def test_rag_reuse(capsys):
    answers = example("rag_reuse").main()
    assert "Friday" in answers[0] and "two hours" in answers[1]
    assert "rows reused" in capsys.readouterr().out


@pytest.mark.slow
def test_long_chat_sleep():
    """With a second process, as a user runs it."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "long_chat_sleep.py")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "the same as a chat that never slept: True" in done.stdout


@pytest.mark.slow
def test_shared_prefix():
    together, apart = example("shared_prefix").main()
    assert together < apart


@pytest.mark.slow
def test_compiled_decode():
    assert example("compiled_decode").main()


@pytest.mark.slow
def test_custom_policy():
    measured, drawn = example("custom_policy").main()
    assert 0 < measured < drawn


@pytest.mark.slow
def test_migrate():
    answers = example("migrate").main()
    assert "marmalade" in answers["DuoAttention's map"][0] and "Lisbon" in answers["DuoAttention's map"][1]
    assert not any("marmalade" in text or "Lisbon" in text for text in answers["StreamingLLM"])


def test_no_example_is_without_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts - {Path(name).stem for name in ELSEWHERE} <= tested
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in listed for path in FOLDER.glob("*.py"))
