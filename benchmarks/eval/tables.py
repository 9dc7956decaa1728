"""The results part of docs/evaluation.md, and the summaries beside the rows: from committed rows alone.

    python benchmarks/eval/tables.py            # rewrites docs/evaluation.md below its marker, and README's quality table
    python benchmarks/eval/tables.py --check    # exit status 1 if that would change anything

Every folder of benchmarks/results/eval with a rows.jsonl.gz (what `redknot eval` wrote, several files joined) gets
results.csv, results.json and results.png; a task at a length for which a method lacks prompts is left out and named. The
comparison with kvpress is taken from benchmarks/results/kvpress/table.md, which compare.py made.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from redknot_hf import HeadProfile
from redknot_hf.eval.report import plot, summarise, write_csv, write_json
from redknot_hf.eval.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evaluation.md"
MARK = "<!-- results: made by benchmarks/eval/tables.py -->"
METHODS = ("full", "ours", "streaming", "window", "random", "blind")
README = ROOT / "README.md"
BEGIN, END = "<!-- table: python benchmarks/eval/tables.py -->", "<!-- end of quality table -->"
README_FOLDER, README_LEAST = "2k-4k-h100", 0.1


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a folder; the headers of joined files differ in their lengths, tasks and methods only.

    A row that two of the joined runs made is taken once: same prompt, same method, same settings.
    """
    head: dict[str, Any] = {}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    with gzip.open(folder / "rows.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if "format" not in row:
                rows.setdefault(tuple(row[key] for key in ("task", "context", "method", "index")), row)
                continue
            head = head or row
            for what in ("model", "profile", "dtype", "device", "versions"):
                if row[what] != head[what]:
                    raise SystemExit(f"{folder}: joined of runs with different {what}")
            for what in ("prefill", "page_size", "seed", "texts", "chat"):
                if row["settings"][what] != head["settings"][what]:
                    raise SystemExit(f"{folder}: joined of runs with different {what}")
    return head, list(rows.values())


def complete(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the (task, length) pairs for which every method has the same prompts, and the names of the others.

    One draw of the random map is enough; more draws count where they have all the prompts.
    """
    groups: dict[tuple[str, int], dict[str, set[int]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["context"]), {}).setdefault(row["method"], set()).add(row["index"])
    needed = {row["method"] for row in rows} - {f"random-{draw}" for draw in range(2, 100)}
    whole = {
        key
        for key, of in groups.items()
        if needed <= of.keys() and len({frozenset(of[method]) for method in needed}) == 1
    }
    lacking = [f"{task} at {context}" for task, context in groups if (task, context) not in whole]
    kept = []
    for row in rows:
        key, method = (row["task"], row["context"]), row["method"]
        if key in whole and (method in needed or groups[key][method] == groups[key][next(iter(needed))]):
            kept.append(row)
    return kept, lacking


def below(entries: list[dict[str, Any]]) -> list[str]:
    """Where another use of the same bytes is better than ours by the mean: a line per context, one way or the other."""
    lines = []
    for context in sorted({e["context"] for e in entries}):
        words = []
        for task in dict.fromkeys(e["task"] for e in entries if e["context"] == context):
            of = {e["method"]: e for e in entries if (e["task"], e["context"]) == (task, context)}
            sign = 1 if TASKS[task].score is None else -1  # perplexity: lower is better
            better = [m for m in ("streaming", "window", "random") if m in of and "ours" in of]
            better = [m for m in better if sign * (of["ours"]["value"] - of[m]["value"]) > 0]
            if better:
                others = ", ".join(f"{m} {of[m]['value']:.3f}" for m in better)
                words.append(f"{TASKS[task].title} ({of['ours']['value']:.3f}; {others})")
        found = "; ".join(words) if words else "nowhere"
        lines.append(f"At {context} tokens ours is below another use of the same bytes, by the mean: {found}.")
    return lines


def whose(digest: str) -> str:
    """Which profile the rows are of, as seen from today's package: a newer one may be shipped than was measured."""
    shipped = HeadProfile.load("SmolLM2-135M-Instruct")
    cells = json.dumps([shipped.head_class, shipped.sink, shipped.window])
    if hashlib.sha256(cells.encode()).hexdigest()[:16] == digest:
        return "the shipped profile"
    return f"an earlier shipped profile ({digest}; not the one that is shipped now)"


def in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By length, then by task as `TASKS` lists them, whatever order the runs had."""
    tasks = list(TASKS)
    return sorted(entries, key=lambda e: (e["context"], tasks.index(e["task"]), METHODS.index(e["method"])))


def section(name: str, head: dict[str, Any], entries: list[dict[str, Any]], lacking: list[str]) -> list[str]:
    settings, versions = head["settings"], ", ".join(f"{k} {v}" for k, v in head["versions"].items())
    counts = {(e["task"], e["context"], e["method"]): e["n"] for e in entries}
    full = {key[:2]: n for key, n in counts.items() if key[2] == "full"}
    n = max(full.values())
    fewer = [f"{TASKS[task].title} at {context}: {count}" for (task, context), count in full.items() if count < n]
    few = f" ({'; '.join(fewer)})" if fewer else ""
    pooled = sorted({count // full[key[:2]] for key, count in counts.items() if key[2] == "random"})
    draws = f", {' or '.join(map(str, pooled))} random map{'s' * (pooled != [1])}" if pooled else ""
    lines = [
        f"### {head['model']}, {head['device']}, prefill={settings['prefill']}",
        "",
        f"Ours: {whose(head['profile'])}. n = {n} prompts per cell{few}{draws}, {head['dtype']}, "
        f"page size {settings['page_size']}, "
        f"seed {settings['seed']}; {versions}. Share found with its 95 % interval; perplexity with KL to the full cache in "
        f"nats per token. Haystacks: {'the text given' if settings['texts'] else 'made-up prose'}.",
        "",
    ]
    for context in sorted({e["context"] for e in entries}):
        here = [e for e in entries if e["context"] == context]
        methods = [m for m in METHODS if any(e["method"] == m for e in here)]
        size = {m: next(e for e in here if e["method"] == m) for m in methods}
        bytes_of = [
            f"{size[m]['live_bytes'] / 1e6:.1f} MB ({size[m]['bytes_of_full']:.0%})" if size[m]["live_bytes"] else "0"
            for m in methods
        ]
        lines += [
            f"| {context} tokens | " + " | ".join(methods) + " |",
            "|---" * (len(methods) + 1) + "|",
            "| KV in use per sequence | " + " | ".join(bytes_of) + " |",
        ]
        for task in dict.fromkeys(e["task"] for e in here):
            cells = []
            for method in methods:
                e = next(e for e in here if (e["task"], e["method"]) == (task, method))
                if TASKS[task].score is None:
                    kl = "" if e["kl"] is None or method == "full" else f", KL {e['kl']:.3f}"
                    cells.append(f"{e['value']:.2f}{kl}")
                else:
                    cells.append(f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]")
            lines.append(f"| {TASKS[task].title} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [*below(entries), ""]
    if lacking:
        lines += [f"Left out because the run was cut short: {', '.join(lacking)}.", ""]
    return lines


def results() -> str:
    lines: list[str] = []
    for folder in sorted((RESULTS / "eval").iterdir()):
        if not (folder / "rows.jsonl.gz").exists():
            continue
        head, rows = read(folder)
        rows, lacking = complete(rows)
        entries = in_order(summarise(rows))
        write_csv(entries, folder / "results.csv")
        write_json({**head, "left_out": lacking}, entries, folder / "results.json")
        title = f"{head['model']}, {head['dtype']}, prefill={head['settings']['prefill']}: mean and 95 % interval"
        plot(entries, folder / "results.png", title)
        lines += section(folder.name, head, entries, lacking)
    harness = RESULTS / "eval" / "lm_eval.json"
    if harness.exists():
        found = json.loads(harness.read_text())
        ours, plain = (found["results"][name] for name in ("redknot", "hf"))
        lines += [
            "### Under lm-evaluation-harness",
            "",
            f"Tasks with local data, n = {found['n']}, {found['tokens']} tokens, on a CPU (`{found['command']}`; "
            + ", ".join(f"{k} {v}" for k, v in found["versions"].items())
            + "). It shows that tasks run unchanged; n says nothing of quality.",
            "",
            "| task, measure | hf | redknot |",
            "|---|---|---|",
        ]
        lines += [
            f"| {task}, {measure.split(',')[0]} | {plain[task][measure]:.4g} | {value:.4g} |"
            for task, numbers in ours.items()
            for measure, value in numbers.items()
        ]
        lines.append("")
    table = RESULTS / "kvpress" / "table.md"
    if table.exists():
        lines += [
            "## Beside kvpress",
            "",
            (RESULTS / "kvpress" / "notes.md").read_text().strip(),
            "",
            f"Ours was measured with {whose(json.loads((RESULTS / 'kvpress' / 'results.json').read_text())['ours']['profile'])}.",
            "",
            table.read_text(),
        ]
    return "\n".join(lines).rstrip() + "\n"


def readme_table() -> str:
    """README's table: shares found and perplexity at both lengths, without the intervals that the page has.

    Tasks that the model cannot do with the full cache say nothing of caches; the table names them.
    """
    head, rows = read(RESULTS / "eval" / README_FOLDER)
    entries = in_order(summarise(complete(rows)[0]))
    contexts = sorted({e["context"] for e in entries})
    methods = [m for m in METHODS if m != "blind" and any(e["method"] == m for e in entries)]
    of = {(e["task"], e["method"], e["context"]): e for e in entries}
    tasks = [t for t in dict.fromkeys(e["task"] for e in entries) if all((t, "full", c) in of for c in contexts)]
    weak = [task for task in tasks if of[task, "full", contexts[0]]["value"] < README_LEAST]
    tasks = [task for task in tasks if task not in weak]

    def cell(task: str, method: str, what: str, form: str) -> str:
        return " / ".join(format(of[task, method, context][what], form) for context in contexts)

    lines = [
        f"| {' / '.join(map(str, contexts))} tokens | " + " | ".join(methods) + " |",
        "|---" * (len(methods) + 1) + "|",
        "| KV bytes in use | " + " | ".join(cell(tasks[0], m, "bytes_of_full", ".0%") for m in methods) + " |",
    ]
    for task in tasks:
        title = TASKS[task].title + (" (lower is better)" if TASKS[task].score is None else "")
        lines.append(f"| {title} | " + " | ".join(cell(task, m, "value", ".2f") for m in methods) + " |")
    n, versions = max(e["n"] for e in entries if e["method"] == "full"), head["versions"]
    where = (
        f"Ours: {whose(head['profile'])}. {head['model']}, {head['dtype']}, n = {n}, {head['device']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". From `benchmarks/results/eval/{README_FOLDER}/rows.jsonl.gz`; command: `redknot eval MODEL --contexts 2k,4k "
        f"--n {n} --texts wikitext-2-test.txt.gz --data hotpotqa_distractor_sample100.jsonl.gz`."
    )
    if weak:
        names = ", ".join(TASKS[task].title for task in weak)
        where += f" Not shown, for the full cache itself is below {README_LEAST}: {names}."
    return "\n".join([*lines, "", where])


def written(path: Path, text: str, check: bool) -> bool:
    """Whether the file says this already; otherwise it is written, unless only asked."""
    same = path.read_text(encoding="utf-8") == text
    if not same and not check:
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    same = written(PAGE, text[: text.index(MARK)] + MARK + "\n\n" + results(), args.check)
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    same &= written(README, f"{text[:start]}\n{readme_table()}\n{text[end:]}", args.check)
    if args.check:
        sys.exit(int(not same))


if __name__ == "__main__":
    main()
