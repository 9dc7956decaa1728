"""Profile files: round trip, size, atomic writing, hostile content, shipped profiles, the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from redknot_hf.errors import RedKnotError
from redknot_hf.heads import HEAD_CLASSES, HeadProfile, find_shipped, shipped_names
from redknot_hf.heads.codec import from_document, to_document, to_text
from redknot_hf.heads.hub import card
from redknot_hf.heads.strict_json import parse_json

ROOT = Path(__file__).parents[2]


@st.composite
def profiles(draw):
    layers, heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))

    def matrix(cell):
        return draw(st.lists(st.lists(cell, min_size=heads, max_size=heads), min_size=layers, max_size=layers))

    windows = st.sampled_from([1, 64, 256, 2**30])
    return HeadProfile(layers, heads, matrix(st.sampled_from(HEAD_CLASSES)), matrix(st.integers(0, 8)), matrix(windows))


def document() -> dict:
    return {
        "format": "redknot_hf.head_profile",
        "version": 1,
        "num_layers": 2,
        "num_kv_heads": 3,
        "head_class": ["GLR", "LLD"],
        "sink": [4, [1, 2, 0]],
        "window": 64,
        "metadata": {"model": "a/b"},
    }


# ---------------------------------------------------------------- format


@given(profiles())
def test_round_trip(profile):
    assert from_document(parse_json(to_text(profile), "x")) == profile


def test_document_means_what_the_format_says():
    profile = from_document(document())
    assert profile.head_class == [["global", "local", "retrieval"], ["local", "local", "dense"]]
    assert profile.sink == [[0, 4, 0], [1, 2, 0]] and profile.window == [[0, 64, 0], [64, 64, 0]]
    names = {**document(), "head_class": [["global", "local", "retrieval"], "LLD"]}
    assert from_document(names) == profile
    assert to_document(profile) == document()


def test_large_profiles_stay_small_and_readable():
    rng = np.random.default_rng(0)
    config = LlamaConfig(num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, hidden_size=8192)
    profile = HeadProfile.uniform(config, global_heads=0.25)
    profile.window = rng.choice([64, 128, 256, 1024], size=(80, 8)).tolist()
    profile.metadata["scores"] = {name: rng.random((80, 8)).tolist() for name in ("gate", "error", "needle", "mass")}
    profile.metadata["validation"] = {"text_kl": 0.0123456789}
    text = to_text(profile)
    assert len(text) < 50_000
    assert max(map(len, text.splitlines())) < 300
    loaded = from_document(parse_json(text, "x"))
    assert np.allclose(loaded.metadata["scores"]["gate"], profile.metadata["scores"]["gate"], rtol=1e-3)
    assert loaded.metadata["validation"]["text_kl"] == 0.0123456789
    assert to_text(loaded) == text


def test_save_is_atomic_and_leaves_nothing_behind(tmp_path, monkeypatch):
    profile = from_document(document())
    target = profile.save(tmp_path / "new" / "p.json")
    before = target.read_bytes()
    assert HeadProfile.load(target) == HeadProfile.load(str(target)) == profile
    profile.metadata["x"] = object()
    with pytest.raises(RedKnotError, match=r"metadata\['x'\] is <object"):
        profile.save(target)
    profile.metadata["x"] = "changed"
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RedKnotError, match=r"cannot write .*disk full"):
        profile.save(target)
    assert target.read_bytes() == before and [p.name for p in target.parent.iterdir()] == ["p.json"]
    monkeypatch.undo()
    assert profile.save(tmp_path).name == "head_profile.json"
    assert HeadProfile.load(tmp_path).metadata["x"] == "changed"
    with pytest.raises(RedKnotError, match="cannot write"):
        profile.save("/proc/nothing/p.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, b"x", "\ud800", [[[set()]]]])
def test_metadata_that_json_cannot_hold_is_named(value, tmp_path):
    profile = from_document(document())
    profile.metadata["deep"] = {"er": [1, value]}
    with pytest.raises(RedKnotError, match=r"metadata\['deep'\]\['er'\]\[1\]"):
        profile.save(tmp_path / "p.json")


# ---------------------------------------------------------------- hostile files


def _text(**changes) -> bytes:
    return json.dumps({**document(), **changes}).encode()


HOSTILE = {
    "empty": (b"", "not JSON"),
    "not utf-8": (b"\xff\xfe{}", "UTF-8"),
    "truncated": (_text()[:-9], "not JSON"),
    "list": (b"[]", "expected an object"),
    "null": (b"null", "expected an object"),
    "deep lists": (b"[" * 100_000, "nested|not JSON"),
    "deep objects": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "nested"),
    "deep metadata": (_text(metadata=json.loads("[" * 40 + "]" * 40)), "nested"),
    "duplicate key": (_text()[:-1] + b',"window":1}', "'window' appears twice"),
    "nan": (_text(metadata={"x": float("nan")}), "NaN is not allowed"),
    "infinity": (_text(metadata={"x": float("-inf")}), "Infinity is not allowed"),
    "overflow": (_text().replace(b'"a/b"', b"1e999"), "1e999"),
    "endless integer": (_text().replace(b'"a/b"', b"9" * 5000), "digits"),
    "surrogate": (_text().replace(b'"a/b"', b'"\\ud800"'), "not valid Unicode"),
    "huge": (b" " * (5 * 2**20), "larger than"),
    "other format": (_text(format="x"), "\"format\" is 'x'.*import_from"),
    "no format": (b'{"version": 1}', '"format" is None'),
    "newer version": (_text(version=2), "version is 2.*newer redknot-hf"),
    "version true": (_text(version=True), "version is True"),
    "unknown keys": (_text(windows=3, extra=1), "unknown keys 'extra', 'windows'.*metadata"),
    "letter": (_text(head_class=["GLX", "LLD"]), r"head_class\[0\]\[2\] is 'X'"),
    "row length": (_text(head_class=["GL", "LLD"]), r"head_class\[0\] has 2 entries; expected 3"),
    "classes null": (_text(head_class=None), "head_class is None"),
    "classes numbers": (_text(head_class=[1, 2]), r"head_class\[0\] is 1"),
    "classes nested": (_text(head_class=[[["L"]], "LLD"]), r"head_class\[0\]"),
    "window string": (_text(window="64"), "window is '64'"),
    "window zero": (_text(window=0), r"window\[0\]\[1\] of a local head is 0"),
    "window rows": (_text(window=[64]), "window has 1 rows"),
    "window bool": (_text(window=[True, 64]), r"window\[0\] is True"),
    "window float": (_text(window=64.0), r"64\.0"),
    "sink object": (_text(sink={}), "sink is {}"),
    "layers": (_text(num_layers=10**9), "num_layers|head_class"),
    "metadata list": (_text(metadata=[]), "metadata is"),
    "scores": (_text(metadata={"scores": {"gate": 3}}), "scores"),
    "scores cell": (_text(metadata={"scores": {"gate": [["a", 1, 1], [1, 1, 1]]}}), r"\[0\]\[0\] is 'a'"),
    "attention layers": (_text(metadata={"attention_layers": "all"}), "attention_layers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_clear_line(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(RedKnotError, match=message) as error:
        HeadProfile.load(path)
    assert "p.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_missing_keys_are_named(tmp_path):
    for key in ("num_layers", "num_kv_heads", "head_class", "sink", "window"):
        changed = document()
        del changed[key]
        with pytest.raises(RedKnotError, match=f"missing '{key}'"):
            from_document(changed)
    changed = document()
    del changed["metadata"]
    assert from_document(changed).metadata == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["GLR", "local"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(document())), json_values)
def test_any_value_anywhere_is_a_profile_or_a_redknot_error(key, value):
    try:
        text = to_text(from_document({**document(), key: value}))
        assert from_document(parse_json(text, "x")).num_layers == 2
    except RedKnotError as error:
        assert "\n" not in str(error)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 10_000), st.integers(0, 30))
def test_damaged_bytes_are_a_profile_or_a_redknot_error(noise, at, cut):
    text = to_text(from_document(document())).encode()
    at %= len(text)
    try:
        from_document(parse_json(text[:at] + noise + text[at + cut :], "x"))
    except RedKnotError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------- shipped and Hub


def test_shipped_profiles_load_fit_and_name_their_source():
    assert {"Meta-Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.3"} <= set(
        shipped_names()
    )
    for name in shipped_names():
        profile = HeadProfile.load(name)
        assert profile.metadata["head_dim"] and profile.metadata["model"] and profile.metadata["method"]
        path = ROOT / "src/redknot_hf/heads/profiles" / f"{name}.json"
        assert path.stat().st_size < 50_000
        assert to_text(profile) == path.read_text(encoding="utf-8")  # files are in the form save() writes


def test_duo_attention_profiles_keep_half_the_heads():
    for name in ("Meta-Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.3"):
        profile = HeadProfile.load(name)
        assert profile.count("global") == profile.count("local") == 128
        assert {w for row in profile.window for w in row} == {0, 256}
        gates = np.array(profile.metadata["scores"]["gate"])
        kept = np.array(profile.head_class) == "global"
        assert gates[kept].min() >= gates[~kept].max()
        assert "mit-han-lab/duo-attention" in profile.metadata["source"] and profile.metadata["license"] == "mit"


def test_find_shipped_matches_name_and_shape():
    config = MistralConfig()
    for name in (
        "mistralai/Mistral-7B-Instruct-v0.3",
        "/models/mistral-7b-instruct-V0.3/",
        "x\\Mistral-7B-Instruct-v0.3",
    ):
        config._name_or_path = name
        assert find_shipped(config).metadata["model"] == "mistralai/Mistral-7B-Instruct-v0.3"
        assert find_shipped(name) is not None
    config.num_hidden_layers = 16
    assert find_shipped(config) is None
    config._name_or_path = ""
    assert find_shipped(config) is None and find_shipped("Mistral-7B-v0.3") is None
    assert find_shipped("unsloth/Llama-3.1-8B-Instruct") == HeadProfile.load("Meta-Llama-3.1-8B-Instruct")


def test_shipped_profiles_cannot_be_changed_through_what_load_returns():
    HeadProfile.load("Mistral-7B-Instruct-v0.3").head_class[0][0] = "dense"
    assert HeadProfile.load("Mistral-7B-Instruct-v0.3").head_class[0][0] != "dense"


def test_shipped_profiles_are_what_the_script_makes(data_dir):
    script = ROOT / "scripts/convert_duo_profiles.py"
    out = ROOT / "src/redknot_hf/heads/profiles"
    command = [sys.executable, script, "--data", data_dir / "heads", "--out", out, "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_load_says_where_it_looked(tmp_path, monkeypatch):
    def no_hub(*args, **kwargs):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_hub)
    with pytest.raises(RedKnotError, match=r"no such file, and it is neither.*Mistral-7B-Instruct-v0.3.*nor a Hub id"):
        HeadProfile.load("nothing-here")
    with pytest.raises(RedKnotError, match=r"'owner/name'.*Hub did not give head_profile.json \(no network\)"):
        HeadProfile.load("owner/name")
    with pytest.raises(RedKnotError, match=r"directory has no head_profile\.json"):
        HeadProfile.load(tmp_path)
    for bad in ("", "a\0b", 3, None, b"x"):
        with pytest.raises(RedKnotError, match="profile is"):
            HeadProfile.load(bad)


def test_load_from_hub_takes_a_strangers_profile_over_a_shipped_one_of_that_name(tmp_path, monkeypatch):
    path = from_document(document()).save(tmp_path)
    asked = []

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert HeadProfile.load("someone/Mistral-7B-Instruct-v0.3", revision="v2").num_layers == 2
    assert asked == [("someone/Mistral-7B-Instruct-v0.3", "head_profile.json", "v2")]
    assert HeadProfile.load("mistralai/Mistral-7B-Instruct-v0.3").num_layers == 32 and len(asked) == 1


def test_push_to_hub_uploads_profile_card_and_picture(monkeypatch):
    pytest.importorskip("matplotlib")
    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            seen["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path, commit_message, revision):
            seen["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    profile = HeadProfile.load("Mistral-7B-Instruct-v0.3")
    assert profile.push_to_hub("me/p", private=True, token="t") == "https://hub/commit/1"
    assert seen["repo"] == ("me/p", True) and seen["token"] == "t"
    assert set(seen["files"]) == {"head_profile.json", "README.md", "head_map.png"}
    assert seen["files"]["head_map.png"].startswith(b"\x89PNG")
    assert from_document(parse_json(seen["files"]["head_profile.json"], "x")) == profile
    text = seen["files"]["README.md"].decode()
    assert "base_model:\n- mistralai/Mistral-7B-Instruct-v0.3" in text and 'profile="me/p"' in text
    assert f"| 131072 | {profile.kv_bytes(131072) / 2**20:.1f} MiB" in text

    monkeypatch.setattr(Api, "create_repo", lambda *a, **k: (_ for _ in ()).throw(PermissionError("403")))
    with pytest.raises(RedKnotError, match="Hub refused the upload to 'me/p': 403"):
        profile.push_to_hub("me/p")


def test_card_of_a_profile_that_knows_nothing():
    text = card(HeadProfile(1, 1, [["global"]]), "a/b", has_picture=False)
    assert "unknown model" in text and "head_map.png" not in text and "base_model" not in text
