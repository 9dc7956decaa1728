#!/usr/bin/env python3
"""Every error that the package raises on purpose, read from its source: `python scripts/docs_errors.py` prints the page.

A message says what is wrong and what to do, so the list of messages is the list of ways out. It is made from the syntax
tree, so it cannot lag behind the code; parts in braces are filled in when the error is raised. Programming mistakes
(AssertionError, TypeError) are not in it, nor are errors that argparse makes of wrong options.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "redknot_hf"

KINDS = {
    "RedKnotError": "an argument, a file or a combination is wrong",
    "ProfileError": "a head profile is malformed or of another model",
    "CacheError": "a cache is used in a way it cannot serve",
    "RollbackExceeded": "tokens would have to come back that local heads have evicted",
    "PoolExhausted": "no pages, or no memory for more",
    "UnsupportedModel": "the model does something that pages cannot follow",
    "MissingExtraError": "an optional package is not installed; the message names the extra",
    "DamagedFile": "a saved session is truncated, damaged, or something else",
    "SessionMissing": "a SessionStore has no such session, and says why",
    "StoreUnavailable": "a segment store cannot be reached; only commands and `list`, `stat`, `gc`, `verify` raise it",
    "StoreFull": "a segment store has no room; `put` returns False",
    "CorruptEntry": "a stored segment is damaged; `get` treats it as missing",
    "CacheMissing": "no whole cache can be fetched from a store: feed the prompt instead",
    "NotPublished": "a store did not take a cache; readers find what was there before, or nothing",
    "UnreadableEntry": "a stored segment has another version or seal; `get` treats it as missing",
}

# (paths below redknot_hf, title, what to know before reading the messages); the first match counts.
AREAS = [
    (("cache.py", "layer.py", "attention.py", "masks.py", "compat.py", "kernel_path.py"), "Cache and attention",
     "After most of these the cache is as it was. Where a message says `reset()`, the prompt has to be fed again."),
    (("static.py",), "The static form (`max_cache_len`)", ""),
    (("paging/", "memory.py"), "Pages, tiers and memory", "See also [Out of memory](troubleshooting.md#out-of-memory)."),
    (("heads/import", "heads/importers.py"), "Head maps of other projects",
     "Formats and options: [The head profile file](profile-format.md#other-projects-files)."),
    (("heads/profiler/",), "The profiler", ""),
    (("heads/",), "Head profiles", "The format: [The head profile file](profile-format.md)."),
    (("sessions/", "prefix.py"), "Sessions and prefixes", "Files are checked before a page is taken: nothing is loaded in part."),
    (("segments/stores/", "segments/codec.py", "segments/keys.py", "segments/entry.py"), "Segment stores",
     "In serving, a store that fails costs time and nothing else: the segment is computed. These errors reach you from "
     "`redknot store` and from wrong arguments."),
    (("segments/",), "Reusing documents", ""),
    (("sparse_ffn/", "ledger.py"), "Sparse FFN and the ledger", ""),
    (("placement", "distributed"), "Several GPUs and machines", "See [Several GPUs, several machines](placement.md)."),
    (("eval", "bench", "harness"), "Evaluation and benchmarks", ""),
    (("commands/", "cli.py", "demo_model.py", "demo_compare.py"), "Command line and demo model",
     "The command prints these as one line and exits with status 2; `REDKNOT_DEBUG=1` shows the traceback."),
    (("testing.py", "errors.py", "generation", ""), "Others", ""),
]  # fmt: skip


@dataclass(frozen=True)
class Raised:
    """One place that raises: where, which class, and the message with its parts in braces."""

    path: str
    line: int
    kind: str
    message: str


def raised(source: Path = SOURCE) -> Iterator[Raised]:
    """Every `KIND("...")` in the package, in the order of the files; errors passed on without words of their own are not."""
    for path in sorted(source.rglob("*.py")):
        where = path.relative_to(source).as_posix()
        found = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # Not only `raise`: some errors are made by a function and raised by its caller.
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                kind = ast.unparse(node.func).rsplit(".", 1)[-1]
                message = _message(kind, node) if kind in KINDS else ""
                if re.search("[a-z]{2}", re.sub("{[^}]*}", "", message)):
                    found.append(Raised(where, node.lineno, kind, message))
        yield from sorted(found, key=lambda item: item.line)


def _message(kind: str, call: ast.Call) -> str:
    words = [_text(part) for part in call.args]
    if kind == "MissingExtraError" and len(words) == 3:
        return f"{words[0]} needs {words[1]}, which is not installed: pip install 'redknot-hf[{words[2]}]'"
    return " ".join(" ".join(words).split())


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + _name(node.value) + "}"
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "{" + _name(node) + "}"


def _name(node: ast.expr) -> str:
    """A short name for what is filled in: `shorten(args.model, 200)` is "model"."""
    if isinstance(node, ast.Call) and node.args and not isinstance(node.func, ast.Attribute):
        return _name(node.args[0])
    if isinstance(node, ast.Attribute):
        return "class" if node.attr == "__name__" else node.attr
    if isinstance(node, ast.Name):
        return node.id
    return "..."


def area_of(path: str) -> str:
    """Title of the area that a file belongs to."""
    return next(title for prefixes, title, _ in AREAS if any(path.startswith(prefix) for prefix in prefixes))


def render() -> str:
    """The list as Markdown, one section per area, one table row per message."""
    rows: dict[str, dict[str, str]] = {}
    for item in raised():
        rows.setdefault(area_of(item.path), {}).setdefault(item.message, item.kind)
    lines = []
    for _, title, note in AREAS:
        if title in rows:
            lines += [f"## {title}", "", *([note, ""] if note else []), "| error | message |", "|---|---|"]
            lines += [f"| `{kind}` | {_cell(message)} |" for message, kind in rows[title].items()]
            lines.append("")
    return "\n".join(lines)


def _cell(message: str) -> str:
    for character in "\\`*_<>|[]":
        message = message.replace(character, "\\" + character if character != "<" else "&lt;")
    return message


if __name__ == "__main__":
    print(render())
    sys.exit(0)
