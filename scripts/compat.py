#!/usr/bin/env python3
"""Does this environment work? The tests that depend on versions, in a minute or two; a record of the run if asked for.

    python scripts/compat.py                                    # run here, exit status 1 if something failed
    python scripts/compat.py --record benchmarks/results/compat # and write what was run, with the versions
    python scripts/compat.py --page docs/compatibility.md       # put the table of all records into the page

The environment needs torch, transformers, pytest and this project (installed, or src and kernels on PYTHONPATH). What
runs: the exactness ladder and the cache contract on six kinds of attention, memory, the static form with compilation,
and every way to generate for one family of each kind.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CORE = ["core/test_ladder.py", "core/test_cache_contract.py", "core/test_memory.py", "static/test_static_form.py"]
FAMILIES = "llama or gemma2 or gpt_oss or gemma3n or qwen3_next"
RUNS = {
    "core": [str(ROOT / "tests" / path) for path in CORE],
    "generation": [str(ROOT / "tests" / "families" / "test_generation.py"), "-k", FAMILIES],
}
BEGIN, END = "<!-- records: scripts/compat.py --page -->", "<!-- end of records -->"


class Count:
    """A pytest plugin that counts outcomes and remembers the names of failures."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid.removeprefix("tests/"))
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def run(arguments: list[str]) -> dict[str, Any]:
    """Run the subset; counts, and whether every test passed."""
    count, started = Count(), time.monotonic()
    for selection in RUNS.values():
        status = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *selection, *arguments], [count])
        if status not in (0, 1):
            raise SystemExit(f"compat: pytest ended with status {status}")
    seconds = round(time.monotonic() - started)
    return {"passed": count.passed, "skipped": count.skipped, "failed": count.failed, "seconds": seconds}


def versions() -> dict[str, str]:
    """What the run depends on."""
    import torch
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**found, "device": device, "date": datetime.date.today().isoformat()}


def table(folder: Path) -> str:
    """Markdown of all records, oldest transformers first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    records.sort(
        key=lambda r: [tuple(int(n) for n in r[k].split("+")[0].split(".")) for k in ("transformers", "torch")]
    )
    lines = ["| transformers | torch | Python | device | passed | failed | skipped | date |", "|" + "---|" * 8]
    for r in records:
        failed = len(r["failed"]) if not r.get("note") else f"{len(r['failed'])} ({r['note']})"
        row = [r["transformers"], r["torch"], r["python"], r["device"], r["passed"], failed, r["skipped"], r["date"]]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests that depend on versions.")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write versions and counts into this folder")
    parser.add_argument("--note", default="", help="a few words about the failures, for the record")
    parser.add_argument("--page", type=Path, metavar="FILE", help="rewrite the table in this page and run nothing")
    arguments, others = parser.parse_known_args()
    records = ROOT / "benchmarks" / "results" / "compat"
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        arguments.page.write_text(f"{text[:start]}\n\n{table(records)}\n\n{text[end:]}", encoding="utf-8")
        return 0
    result = {**versions(), **run(others)}
    print(json.dumps(result, indent=2))
    if arguments.record:
        arguments.record.mkdir(parents=True, exist_ok=True)
        name = "-".join(str(result[key]).split("+")[0] for key in ("python", "torch", "transformers"))
        text = json.dumps({**result, "note": arguments.note}, indent=2) + "\n"
        (arguments.record / f"{name}.json").write_text(text, encoding="utf-8")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
