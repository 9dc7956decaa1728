"""Test files are collected without packages, so pytest needs a name of its own for each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_every_test_file_has_a_name_of_its_own() -> None:
    folder = Path(__file__).parent
    names = Counter(path.name for path in folder.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
