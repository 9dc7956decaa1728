"""Every Python block of README and documentation runs as it is printed; every `redknot` command in them parses."""

from __future__ import annotations

import pytest
from pages import ROOT, blocks, commands, compiled, pages, run

from redknot_hf.cli import build_parser

# Pages that take more than about ten seconds on one core.
SLOW = {"profile-your-model.md"}
PAGES = pages()


def _mark(page):
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])


@pytest.mark.parametrize("page", [_mark(page) for page in PAGES if any(b.language == "python" for b in blocks(page))])
def test_python_blocks_run(page, smollm2_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, smollm2_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_compile_and_commands_parse(page):
    """What is not run must at least be Python, and what is typed into a shell must be a command that exists."""
    parser = build_parser()
    for block in blocks(page):
        if block.language == "python":
            compiled(block)
            continue
        for arguments in commands(block):
            try:
                parser.parse_args(arguments)
            except SystemExit as stop:
                assert stop.code == 0, f"{page.name}:{block.line}: redknot {' '.join(arguments)}"


def test_the_quick_start_is_there():
    """An extractor that finds nothing would pass everything."""
    readme = blocks(ROOT / "README.md")
    assert any("RedKnotCache(model.config" in block.code for block in readme if block.runs)
    assert len(PAGES) >= 8


def test_the_readme_shows_the_committed_results():
    """`python benchmarks/tables.py` after new results; no number in that table is typed by hand."""
    import json
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    result = json.loads((ROOT / "benchmarks" / "results" / "h200" / "decode.json").read_text(encoding="utf-8"))
    assert tables.readme_table(result) in (ROOT / "README.md").read_text(encoding="utf-8")
