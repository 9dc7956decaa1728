"""Readers of strangers' files over random and nearly valid bytes: hypothesis everywhere, atheris where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS, seeds

HERE = Path(__file__).parent
BOUNDED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@st.composite
def near(draw, name):
    """Random bytes, or a seed with pieces cut out, doubled, or overwritten."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 16))
        data[at : at + length] = draw(
            st.binary(max_size=8) | st.sampled_from([b"[" * 5000, b"9" * 5000, b"NaN", b"1e999", b"-1"])
        )
    return bytes(data)


@pytest.mark.filterwarnings("ignore:the head profile was made for")
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_refused_or_right(name):
    @BOUNDED
    @given(data=near(name))
    def run(data):
        TARGETS[name](data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name):
    """A target that refuses everything would find nothing."""
    for seed in seeds(name):
        TARGETS[name](seed)


def test_a_target_notices_what_is_wrong(monkeypatch):
    import targets

    monkeypatch.setattr(targets, "parse_json", lambda data, source: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        targets.profile(b"{}")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_ten_seconds_of_atheris(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "run_atheris.py"), name, "10"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["../x", "x/..", "../..", "-/.git", "owner/name"])
def test_a_hub_name_is_no_path(name, monkeypatch, tmp_path):
    """The Hub is asked for one constant file of a repository; what is no repository name is refused by its client."""
    import huggingface_hub

    from redknot_hf import HeadProfile, RedKnotError

    asked = []
    real = huggingface_hub.hf_hub_download

    def watch(repo, filename, **options):
        asked.append(filename)
        return real(repo, filename, **options, cache_dir=tmp_path / "cache", local_files_only=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", watch)
    with pytest.raises(RedKnotError) as caught:
        HeadProfile.load(name)
    assert set(asked) <= {"head_profile.json"} and "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]
