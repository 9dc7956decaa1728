"""Run every decoder family of the installed transformers and write the table.

    python benchmarks/families/sweep.py                 # all; writes benchmarks/results/families-<version>.json
    python benchmarks/families/sweep.py llama gpt_oss   # some; prints only
    python benchmarks/families/sweep.py --render FILE   # docs/families.md from a committed result

What is compared is in tests/families/family_check.py and generation_matrix.py. CPU only; two or three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_FAMILY = 120
LEAST_EFFECT = 1e-3  # of the largest logit


def run(names: list[str]) -> dict[str, dict]:
    """`check_family` for each name, each within a time limit."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    from family_check import check_family
    from tiny_families import families
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def too_long(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS_PER_FAMILY} s")

    signal.signal(signal.SIGALRM, too_long)
    results = {}
    for name in names or families():
        signal.alarm(SECONDS_PER_FAMILY)
        try:
            results[name] = check_family(name)
        except Exception as problem:
            results[name] = {"not built": f"{type(problem).__name__}: {problem}"}
        finally:
            signal.alarm(0)
        print(f"{name:28s} {summary(results[name])}", flush=True)
    return results


def run_matrix(only: str | None = None) -> dict[str, dict[str, str]]:
    """The outcome of every way to generate (or of one) for the families of the matrix."""
    from generation_matrix import FAMILIES, MODES, cell

    results = {}
    for family in FAMILIES:
        results[family] = {mode: cell(family, mode) for mode in MODES if only in (None, mode)}
        print(f"{family:28s} " + "  ".join(f"{mode}: {found}" for mode, found in results[family].items()), flush=True)
    return results


def summary(result: dict) -> str:
    """One line: the three outcomes, or why there is none."""
    if "not built" in result:
        return f"not built: {_one_line(result['not built'], 100)}"
    return "  ".join(f"{rung} {result[rung]['outcome']}" for rung in ("fallback", "M0", "M4"))


def verdict(result: dict) -> str:
    """The word of the first column of the table."""
    if "not built" in result:
        return "not built"
    outcomes = {rung: result[rung]["outcome"] for rung in ("fallback", "M0", "M4")}
    if {"wrong", "error"} & set(outcomes.values()):
        return "WRONG"
    if "no reference" in outcomes.values():
        return "unknown"
    if outcomes["M0"] == outcomes["M4"] == "equal" and result["layers"]["paged"]:
        # where hiding the far keys changes nothing, M4 could not have failed
        return "supported" if float(result["M4"]["effect"]) > LEAST_EFFECT else "unknown"
    return "refused" if outcomes["M0"] in ("refused", "plain") else "exact only"


def render(data: dict) -> str:
    """docs/families.md."""
    results = data["families"]
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        groups.setdefault(verdict(result), []).append(name)
    total = Counter({word: len(names) for word, names in groups.items()})
    lines = [
        "# Which model families work",
        "",
        f"Every decoder family of transformers {data['transformers']} with a tiny random model (fp32, CPU, torch "
        f"{data['torch']}, {data['date']}): two prompts of 21 tokens, one of them left-padded, 6 tokens generated "
        "greedily. Nothing here is written by hand: `python benchmarks/families/sweep.py` makes "
        f"`benchmarks/results/families-{data['transformers']}.json` and this page.",
        "",
        "| verdict | families | meaning |",
        "|---|---|---|",
    ]
    meanings = {
        "supported": "M0: all heads global gives the default implementation's tokens and logits. M4: a mixed profile "
        "gives those of dense attention with the mask of the visibility rule",
        "exact only": "exact while every head is global; local heads are refused by name",
        "refused": 'a RedKnotCache raises an error that names the cause; `attn_implementation="redknot"` with an '
        "ordinary cache works where the column *fallback* says equal",
        "unknown": "no comparison possible",
        "WRONG": "another result without an error",
        "not built": "no tiny model of it could be built or run with transformers alone",
    }
    lines += [f"| {word} | {total[word]} | {meaning} |" for word, meaning in meanings.items() if total[word]]
    lines += _versions(data)
    lines += [
        "",
        '*Fallback* is `attn_implementation="redknot"` with the family\'s ordinary cache against its default '
        "implementation: *plain* means that transformers cannot change this family's attention, so it stays what it "
        "is. *Layers* are those served from pages: linear-attention, chunked, indexed and combined layers stay with "
        "transformers, and layers that share an earlier layer's keys follow the head classes of the layer that stores "
        "them.",
        "",
        "## Supported",
        "",
        "| family | default | fallback | layers | M0 off by | M4 off by |",
        "|---|---|---|---|---|---|",
    ]
    for name in groups.get("supported", []):
        r = results[name]
        lines.append(
            f"| {name} | {r['default']} | {r['fallback']['outcome']} | {r['layers']['paged']} of {r['layers']['of']} | "
            f"{r['M0']['difference']:.0e} | {r['M4']['difference']:.0e} |"
        )
    for word in ("exact only", "refused", "unknown", "WRONG"):
        if not groups.get(word):
            continue
        lines += [
            "",
            f"## {word[0].upper()}{word[1:]}",
            "",
            "| family | fallback | M0 | M4 | message |",
            "|---|---|---|---|---|",
        ]
        for name in groups[word]:
            r = results[name]
            message = r["M4"].get("message") or r["M0"].get("message") or ""
            outcomes = " | ".join(r[rung]["outcome"] for rung in ("fallback", "M0", "M4"))
            lines.append(f"| {name} | {outcomes} | {_one_line(message, 170)} |")
    lines += _matrix(data["generation"])
    lines += ["", "## Not built", "", "| family | why |", "|---|---|"]
    lines += [f"| {name} | {_one_line(results[name]['not built'], 170)} |" for name in groups.get("not built", [])]
    return "\n".join(lines) + "\n"


def _versions(data: dict) -> list[str]:
    """What the committed results of other versions say."""
    lines = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("families-*.json")):
        other = json.loads(path.read_text())
        if other["transformers"] != data["transformers"]:
            total = Counter(map(verdict, other["families"].values()))
            cells = [outcome for row in other["generation"].values() for outcome in row.values()]
            failed = sum(outcome.startswith("failed") for outcome in cells)
            counts = ", ".join(f"{number} {word}" for word, number in total.most_common())
            lines += [
                "",
                f"transformers {other['transformers']}: {counts}; {len(cells)} ways to generate, {failed} failed.",
            ]
    return lines


def _matrix(results: dict[str, dict[str, str]]) -> list[str]:
    modes = list(next(iter(results.values())))
    notes: list[str] = []
    rows = []
    for family, cells in results.items():
        marks = []
        for outcome in cells.values():
            if outcome in ("passed", "passed, as each row alone"):
                marks.append("passed" if outcome == "passed" else "passed *")
                continue
            word, _, why = outcome.partition(": ")
            if why not in notes:
                notes.append(why)
            marks.append(f"{'n/a' if word == 'not applicable' else word} [{notes.index(why) + 1}]")
        rows.append(f"| {family} | " + " | ".join(marks) + " |")
    counts = Counter(outcome.split(":")[0].split(",")[0] for cells in results.values() for outcome in cells.values())
    return [
        "",
        "## Ways to generate",
        "",
        "A RedKnotCache with global heads under `redknot` against `DynamicCache` under the family's default "
        f"implementation: tokens and logits. {', '.join(f'{n} {word}' for word, n in counts.most_common())}.",
        "",
        "| family | " + " | ".join(modes) + " |",
        "|---|" + "---|" * len(modes),
        *rows,
        "",
        "* Equal to each row without padding. With `DynamicCache` the padding between a prompt and what follows takes "
        "places in the sliding window, because transformers counts columns there; a RedKnotCache counts tokens.",
        *(f"\n[{number}] {_one_line(note, 200)}" for number, note in enumerate(notes, 1)),
    ]


def _one_line(text: str, limit: int) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; default: all, and write the result")
    parser.add_argument("--render", metavar="FILE", help="write docs/families.md from a result file")
    parser.add_argument(
        "--way", metavar="NAME", help="run one way to generate and add it to this version's result file"
    )
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests" / "core"), str(ROOT / "tests" / "families")]
    page = ROOT / "docs" / "families.md"
    if options.render:
        page.write_text(render(json.loads(Path(options.render).read_text())))
        return 0
    if options.way:
        import transformers

        path = ROOT / "benchmarks" / "results" / f"families-{transformers.__version__}.json"
        data = json.loads(path.read_text())
        for family, cells in run_matrix(options.way).items():
            data["generation"].setdefault(family, {}).update(cells)
        path.write_text(json.dumps(data, indent=1).replace("Infinity", '"inf"') + "\n")
        return 0
    results = run(options.families)
    print(dict(Counter(map(verdict, results.values()))))
    if not options.families:
        import datetime

        import torch
        import transformers

        data = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/families/sweep.py",
            "families": results,
            "generation": run_matrix(),
        }
        path = ROOT / "benchmarks" / "results" / f"families-{transformers.__version__}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1).replace("Infinity", '"inf"') + "\n")
        print(path)
    return 1 if any(verdict(result) == "WRONG" for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
