"""The helpers of tests/sessions serve here as well."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "sessions"))

from session_helpers import mixed_profile, tiny_model


@pytest.fixture(scope="session")
def tiny():
    return tiny_model()


@pytest.fixture
def profile(tiny):
    return mixed_profile(tiny.config)
