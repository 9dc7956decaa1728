"""The code in the documentation: how it is found, and how it is run.

A page is a Markdown file. Its Python blocks run in order and share their names, as a reader would run them, in an empty
working folder, with the demo model's Hub id replaced by a local copy. What a reader need not see is in comments:

    <!-- run
    text_a = "..."         what the blocks around it use, or an assert about what they did
    -->

A block whose title begins with "needs" (```python title="needs a GPU") is not run, only compiled; the title is what the
reader sees above it, and `test_docs_code` names the test that does what the block does. Of the blocks in other languages,
`redknot` commands in sh blocks must parse, and JSON must be JSON. `fences` finds every block there is by another way, so that
none is passed over because of how it is written.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
STORE = "/var/cache/segments"  # the place of stores in examples; here a folder of the test's own
_PIECE = re.compile(
    r"^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<code>.*?)^```|^<!-- run\n(?P<hidden>.*?)^-->", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One piece of code: where it stands, what it is, and whether it runs."""

    page: str
    line: int
    language: str
    code: str
    runs: bool
    hidden: bool = False
    title: str = ""


def pages() -> list[Path]:
    """README and every page of the documentation that has Python or shell blocks."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if blocks(page)]


def blocks(page: Path) -> list[Block]:
    """The Python and shell blocks of a page, hidden ones included, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _PIECE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        if match["hidden"] is not None:
            found.append(Block(page.name, line, "python", match["hidden"], True, True))
        elif match["language"] in ("python", "sh"):
            titled = re.search(r'title="(needs [^"]+)"', match["info"])
            title = titled[1] if titled else ""
            found.append(Block(page.name, line, match["language"], match["code"], not titled, title=title))
    return found


def fences(page: Path) -> list[tuple[int, str]]:
    """(line of the code, what stands behind the fence) of every fenced block, indented and ~~~ ones, too."""
    found, closing = [], ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = re.match(r"\s*(?:[-*>]\s+|\d+\.\s+)*(```+|~~~+)(.*)$", line)
        if match is None:
            continue
        if closing:
            if match[1].startswith(closing) and not match[2].strip():
                closing = ""
        elif "`" not in match[2]:  # not a piece of text in backticks
            closing = match[1]
            found.append((number + 1, match[2].strip()))
    return found


def compiled(block: Block) -> Any:
    """The block as code, whose tracebacks show the page's own line numbers."""
    return compile("\n" * (block.line - 1) + block.code, block.page, "exec")


def run(page: Path, model_path: Path) -> dict[str, Any]:
    """Run a page from top to bottom; the names it leaves behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python":
            continue
        code = compiled(block)
        if block.runs:
            text = block.code.replace(HUB_ID, model_path.as_posix()).replace(
                STORE, (Path.cwd() / "segments").as_posix()
            )
            exec(code if text == block.code else compiled(Block(block.page, block.line, "python", text, True)), names)
    return names


def commands(block: Block) -> list[list[str]]:
    """Arguments of the `redknot` commands in a shell block."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "redknot"]
