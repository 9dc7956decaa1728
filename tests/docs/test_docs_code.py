"""Every Python block of README and documentation runs as it is printed; every `redknot` command in them parses."""

from __future__ import annotations

import json

import pytest
from pages import ROOT, blocks, commands, compiled, fences, pages, run

from redknot_hf.cli import build_parser

# Pages that take more than about ten seconds on one core.
SLOW = {"profile-your-model.md"}
PAGES = pages()


# Blocks that cannot run with the pages, and the test that does what they do.
UNRUN = {
    ("compiled-decode.md", "needs a C++ compiler and a minute"): (
        "tests/static/test_static_form.py",
        "_compile_all_devices",
    ),
    ("evaluation.md", "needs lm-eval"): ("tests/eval/test_harness.py", "def test_tasks_run_unchanged"),
    ("placement.md", "needs several GPUs"): ("tests/placement/test_device_map.py", "def test_layers_on_two_gpus"),
    ("placement.md", "needs torchrun"): ("tests/placement/test_tensor_parallel.py", "torchrun"),
}


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


def _written():
    """Every Markdown file that is kept in the repository, but for what tools and packages wrote."""
    folders = ("docs", "examples", "benchmarks", "kernels", ".github")
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    return sorted(page for page in found if "site-packages" not in page.parts)


@pytest.mark.parametrize("page", _written(), ids=lambda page: page.name)
def test_no_block_is_passed_over(page):
    """However a block is written (indented, `py`, ~~~), it is run, parsed, or in a language that is known not to be."""
    seen = {block.line for block in blocks(page) if not block.hidden}
    for line, info in fences(page):
        language = info.split(" ")[0]
        if language == "json":
            body = page.read_text(encoding="utf-8").splitlines()[line - 1 :]
            json.loads("\n".join(body[: next(i for i, text in enumerate(body) if text.startswith("```"))]))
        else:
            assert line in seen or language in ("bash", "text", "mermaid"), f"{page.name}:{line}: ```{info}"


def test_blocks_that_do_not_run_are_these():
    """Each has a test elsewhere that does the same; a new one cannot slip in with a title."""
    unrun = {(block.page, block.title) for page in PAGES for block in blocks(page) if not block.runs}
    assert unrun == UNRUN.keys()
    for where, what in UNRUN.values():
        assert what in (ROOT / where).read_text(encoding="utf-8"), (where, what)
    outside = [page for page in _written() if page not in PAGES and any(b.language == "python" for b in blocks(page))]
    assert [page.name for page in outside] == ["CARD.md"]  # the kernel package's, whose tests make the same calls


def test_fences_of_any_kind_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("- ```py\n  x\n  ```\n\n    ~~~ python\n    y\n    ~~~\n\n```python\nz\n```\nand ```a``` in text\n")
    assert fences(page) == [(2, "py"), (6, "python"), (10, "python")]
    assert [block.line for block in blocks(page)] == [10]


def test_the_quick_start_is_there():
    """An extractor that finds nothing would pass everything."""
    readme = blocks(ROOT / "README.md")
    assert any("RedKnotCache(model.config" in block.code for block in readme if block.runs)
    assert len(PAGES) >= 8


def test_the_readme_shows_the_committed_results():
    """`python benchmarks/tables.py` after new results; no number in that table is typed by hand."""
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    result = json.loads((ROOT / "benchmarks" / "results" / "h200" / "decode.json").read_text(encoding="utf-8"))
    assert tables.readme_table(result) in (ROOT / "README.md").read_text(encoding="utf-8")
