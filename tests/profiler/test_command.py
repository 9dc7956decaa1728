"""`redknot profile`: writes a profile, refuses bad input in one line."""

from __future__ import annotations

import json

import pytest

from redknot_hf.cli import main
from redknot_hf.heads import HeadProfile


@pytest.fixture
def model_folder(planted_model, byte_tokenizer, tmp_path):
    folder = tmp_path / "model"
    planted_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return str(folder)


def test_writes_a_profile_and_reports(model_folder, tmp_path, capsys):
    target = tmp_path / "profile.json"
    text = tmp_path / "text.txt"
    text.write_text("A sentence about rivers and locks, and another about bread. " * 200)
    arguments = ["profile", model_folder, "-o", str(target), "--context", "768", "--samples", "2", "--gate-steps", "4"]
    arguments += ["--windows", "16", "32", "64", "--mean-window", "32", "--device", "cpu", "--budget", "0.5"]
    assert main([*arguments, "--no-progress", "--json", "--texts", str(text)]) == 0
    report = json.loads(capsys.readouterr().out)
    profile = HeadProfile.load(target)
    assert report["budget"]["global_heads"] == sum(name == "global" for row in profile.head_class for name in row) == 3
    assert report["validation"] == profile.metadata["validation"]


@pytest.mark.parametrize(
    "change,message",
    [
        (["--budget", "3"], "budget is 3.0"),
        (["--texts", "/nowhere.txt"], "cannot read '/nowhere.txt'"),
        (["--device", "toaster"], "--device is 'toaster'"),
        (["--dtype", "int3"], "--dtype is 'int3'"),
        (["--max-accuracy-drop", "0.1"], "pass --tolerance"),
        (["-o", "/nowhere/p.json"], "existing folder"),
    ],
)
def test_bad_input_is_one_line(model_folder, tmp_path, capsys, change, message):
    assert main(["profile", model_folder, "-o", str(tmp_path / "p.json"), "--device", "cpu", *change]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("redknot: error:")]
    assert len(lines) == 1 and message in lines[0]


def test_a_missing_model_is_one_line(tmp_path, capsys):
    assert main(["profile", str(tmp_path / "none"), "-o", str(tmp_path / "p.json")]) == 2
    assert "cannot load" in capsys.readouterr().err
