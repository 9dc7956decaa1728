"""Tables of the comparison with kvpress: what run_ours.py and run_kvpress.py measured, side by side.

    python benchmarks/kvpress/compare.py benchmarks/results/kvpress

Reads ours.jsonl and kvpress.jsonl there (or .jsonl.gz; each may be several runs' files joined), checks that they are of the same
prompts, and writes results.csv, results.json and table.md. Accuracy with Wilson's 95 % interval, KL with a bootstrap's.
"difference" is ours minus the other's on the same prompts, with a bootstrap interval: where it excludes 0 one of the two
is ahead. The first table compares at equal allocated bytes: a press that masks keys but keeps them is compared with ours
at the dense bytes. No row is left out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import statistics
from pathlib import Path
from typing import Any

from redknot_hf.eval.scoring import bootstrap, interval

TITLES = {"single": "needle", "kv_short": "key-value", "ppl": "text"}
OURS = "ours"


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows. Of joined files: the first header, with the devices and commands of all."""
    packed = path.with_name(f"{path.name}.gz")
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    heads = [line for line in lines if "prompts" in line]
    for head in heads:
        for what in ("prompts", "profile", "dtype", "versions"):
            if head.get(what) != heads[0].get(what):
                raise SystemExit(f"{path}: joined of runs with different {what}")
    devices = list(dict.fromkeys(head["device"] for head in heads if "device" in head))
    commands = list(dict.fromkeys(head["command"] for head in heads if "command" in head))
    notes = {key: note for head in heads for key, note in head.get("notes", {}).items()}
    head = {
        **heads[0],
        "device": ", ".join(devices),
        "command": "; ".join(commands),
        **({"notes": notes} if notes else {}),
    }
    return head, [line for line in lines if "prompts" not in line]


def difference(ours: dict[int, float], other: dict[int, float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean of ours minus other over the prompts both have, with a paired bootstrap interval."""
    both = [ours[i] - other[i] for i in sorted(ours.keys() & other.keys())]
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(both, k=len(both))) for _ in range(draws))
    return statistics.fmean(both), means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def verdict(low: float, high: float, lower_is_better: bool) -> str:
    if low <= 0 <= high:
        return "even"
    return "ours" if (high < 0) == lower_is_better else "theirs"


def complete(rows: list[dict[str, Any]]) -> set[tuple[str, int]]:
    """(task, index) of the prompts that have a row for every (method, level) their task has."""
    of: dict[str, set[Any]] = {}
    have: dict[tuple[str, int], set[Any]] = {}
    for row in rows:
        what = (row["method"], row["level"])
        of.setdefault(row["task"], set()).add(what)
        have.setdefault((row["task"], row["index"]), set()).add(what)
    return {key for key, found in have.items() if key[0] in TITLES and found == of[key[0]]}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    measured = [row for row in rows if row["task"] in TITLES and "error" not in row]
    keys = list(dict.fromkeys((row["level"], row["task"], row["method"]) for row in measured))
    by = {key: [r for r in measured if (r["level"], r["task"], r["method"]) == key] for key in keys}
    found = []
    for level, task, method in sorted(keys, key=lambda key: (-key[0], list(TITLES).index(key[1]))):
        group = by[level, task, method]
        kl, hits = [r["kl"] for r in group], [float(r["hit"]) for r in group]
        entry: dict[str, Any] = {"level": level, "task": TITLES[task], "method": method, "n": len(group)}
        if task != "ppl":
            low, high = interval(hits)
            entry |= {"accuracy": statistics.fmean(hits), "accuracy_low": low, "accuracy_high": high}
        low, high = bootstrap(kl, 2000)
        entry |= {"kl": statistics.fmean(kl), "kl_low": low, "kl_high": high}
        entry["top1"] = statistics.fmean(r["top1"] for r in group)
        for size in ("allocated", "visible"):
            entry[size] = statistics.fmean(r[size] / r["dense"] for r in group)
        mine = by.get((level, task, OURS))
        if mine and method != OURS:
            for what, lower in (("kl", True), ("hit", False)):
                if what == "hit" and task == "ppl":
                    continue
                mean, low, high = difference(
                    {r["index"]: float(r[what]) for r in mine}, {r["index"]: float(r[what]) for r in group}
                )
                entry |= {f"{what}_difference": mean, f"{what}_difference_low": low, f"{what}_difference_high": high}
                entry[f"{what}_ahead"] = verdict(low, high, lower)
        found.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()})
    return found


def equal_bytes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every press against ours at the bytes that the press allocates: one entry per press, level and measure.

    Returns:
        Dictionaries: press, level, allocated (share of the dense cache, of the press and of ours), measure, n, ours, theirs
        (means over the prompts that both have), ahead ("ours", "theirs" or "even", by the paired interval), and whether
        ours is at least as good by its mean.
    """
    of: dict[tuple[str, float, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["task"] in TITLES and "error" not in row:
            of.setdefault((row["method"], row["level"], row["task"]), {})[row["index"]] = row
    found = []
    for (press, level, task), theirs in sorted(of.items(), key=lambda item: (-item[0][1], item[0][0])):
        if press.startswith(OURS) or press == "full":
            continue
        allocated = statistics.fmean(r["allocated"] / r["dense"] for r in theirs.values())
        partner = level if allocated < 0.99 else 1.0
        mine = of.get((OURS, partner, task), {})
        both = sorted(mine.keys() & theirs.keys())
        if not both:
            continue
        for what in ("kl",) if task == "ppl" else ("hit", "kl"):
            a, b = ({i: float(rows_of[i][what]) for i in both} for rows_of in (mine, theirs))
            mean, low, high = difference(a, b)
            better = mean <= 0 if what == "kl" else mean >= 0
            entry = {
                "press": press, "level": level, "allocated": allocated,
                "allocated_ours": statistics.fmean(mine[i]["allocated"] / mine[i]["dense"] for i in both),
                "measure": f"{TITLES[task]} {'KL' if what == 'kl' else 'found'}", "n": len(both),
                "ours": statistics.fmean(a.values()), "theirs": statistics.fmean(b.values()),
                "ahead": verdict(low, high, what == "kl"), "at_least_as_good": better,
            }  # fmt: skip
            found.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()})
    return found


MEASURES = ("needle found", "key-value found", "needle KL", "key-value KL", "text KL")


def bar(found: list[dict[str, Any]]) -> list[str]:
    """The table of `equal_bytes`: ours / theirs, in bold where theirs is better by the mean, and who is ahead."""
    lines = [
        "At equal allocated bytes, ours / theirs on the same prompts, and who is ahead where the paired 95 % interval says "
        "so. **Bold: the mean of theirs is better.**",
        "",
        "| press | keys visible | allocated, ours / theirs | " + " | ".join(MEASURES) + " |",
        "|---" * (len(MEASURES) + 3) + "|",
    ]
    for press, level in dict.fromkeys((e["press"], e["level"]) for e in found):
        of = {e["measure"]: e for e in found if (e["press"], e["level"]) == (press, level)}
        first = next(iter(of.values()))
        cells = [press, f"{level:.0%}", f"{first['allocated_ours']:.0%} / {first['allocated']:.0%}"]
        for measure in MEASURES:
            e = of.get(measure)
            if e is None:
                cells.append("-")
                continue
            form = "{:.2f} / {:.2f}" if measure.endswith("found") else "{:.3f} / {:.3f}"
            text = f"{form.format(e['ours'], e['theirs'])}, {e['ahead']}"
            cells.append(text if e["at_least_as_good"] else f"**{text}**")
        lines.append("| " + " | ".join(cells) + " |")
    worse = [e for e in found if not e["at_least_as_good"]]
    behind = sum(e["ahead"] == "theirs" for e in worse)
    lines += [
        "",
        f"Of {len(found)} comparisons ours is at least as good by the mean in {len(found) - len(worse)}; "
        f"in {behind} of the other {len(worse)} the interval says that theirs is ahead.",
        "",
    ]
    return lines


def markdown(entries: list[dict[str, Any]], padded: list[dict[str, Any]], heads: list[dict[str, Any]]) -> str:
    lines = []
    for level in sorted({e["level"] for e in entries}, reverse=True):
        here = [e for e in entries if e["level"] == level]
        methods = sorted(dict.fromkeys(e["method"] for e in here), key=lambda m: (m != "full", not m.startswith(OURS)))
        lines += [
            f"Level {level:.0%} of the dense bytes:"
            if level < 1
            else "The full cache, and ours with every head global:",
            "",
            "| method | allocated | visible | needle | key-value | KL needle | KL key-value | KL text | ahead, same keys visible |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method in methods:
            of = {e["task"]: e for e in here if e["method"] == method}
            first = next(iter(of.values()))
            cells = [method, f"{first['allocated']:.0%}", f"{first['visible']:.0%}"]
            for task in ("needle", "key-value"):
                e = of.get(task)
                cells.append(
                    "-" if e is None else f"{e['accuracy']:.2f} [{e['accuracy_low']:.2f}, {e['accuracy_high']:.2f}]"
                )
            for task in ("needle", "key-value", "text"):
                e = of.get(task)
                cells.append("-" if e is None else f"{e['kl']:.3f} [{e['kl_low']:.3f}, {e['kl_high']:.3f}]")
            words = []
            for task, e in of.items():
                for what in ("hit", "kl"):
                    if f"{what}_ahead" in e:
                        words.append(f"{task} {'accuracy' if what == 'hit' else 'KL'}: {e[f'{what}_ahead']}")
            cells.append("; ".join(words))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    if padded:
        lines += [
            "A prompt alone and as the padded row of a batch of two (level 50 %): KL between the two answers.",
            "",
            "| method | KL to itself alone | largest difference of a log-probability | answer right alone / padded |",
            "|---|---|---|---|",
        ]
        for row in padded:
            if "error" in row:
                lines.append(f"| {row['method']} | {row['error']} | | |")
                continue
            lines.append(
                f"| {row['method']} | {max(0.0, row['kl_from_alone']):.2g} | {row['max_difference']:.2g} | "
                f"{'yes' if row['hit_alone'] else 'no'} / {'yes' if row['hit_padded'] else 'no'} |"
            )
        lines.append("")
    for head in heads:
        versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
        lines.append(f"- {head['device']}, {head['dtype']}; {versions}: `{head['command']}`")
        lines += [f"- {what}: {note}" for what, note in head.get("notes", {}).items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    (ours_head, ours), (their_head, theirs) = load(args.folder / "ours.jsonl"), load(args.folder / "kvpress.jsonl")
    if ours_head["prompts"] != their_head["prompts"]:
        raise SystemExit("ours.jsonl and kvpress.jsonl are of different prompts")
    # Prompts that every method of both sides has: a run may have been stopped.
    done = complete(ours) & complete(theirs)
    ours = [r for r in ours if (r["task"], r["index"]) in done or r["task"] == "padded"]
    theirs = [r for r in theirs if (r["task"], r["index"]) in done or r["task"] == "padded"]
    # Each side has a full cache of its own; where its answers differ, other differences mean little.
    mine, other = ({(r["task"], r["index"]): r for r in rows if r["method"] == "full"} for rows in (ours, theirs))
    apart = [key for key in done if mine[key]["hit"] != other[key]["hit"]]
    gap = max((abs(mine[k]["nll"] - other[k]["nll"]) for k in done), default=0.0)
    print(
        f"full caches: {len(done)} prompts, {len(apart)} answered differently, largest difference of the NLL {gap:.2g}"
    )
    rows = ours + [r for r in theirs if r["method"] != "full"]
    entries = summarise(rows)
    padded, padded_heads = [r for r in rows if r["task"] == "padded"], []
    if (args.folder / "padded").exists():  # run apart, in another dtype
        parts = [load(args.folder / "padded" / name) for name in ("ours.jsonl", "kvpress.jsonl")]
        padded = [row for _, part in parts for row in part if row["task"] == "padded"]
        padded_heads = [
            {"versions": h["versions"], "device": h["device"], "dtype": h["dtype"], "command": h["command"]}
            for h, _ in parts
        ]
    errors = [r for r in rows if "error" in r and r["task"] != "padded"]
    columns = list(dict.fromkeys(key for entry in entries for key in entry))
    with (args.folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(entries)
    equal = equal_bytes(rows)
    text = "\n".join(bar(equal)) + "\n" + markdown(entries, padded, [ours_head, their_head, *padded_heads])
    found = {
        "full_caches": {"prompts": len(done), "answered_differently": len(apart), "largest_nll_difference": gap},
        "ours": ours_head, "kvpress": their_head, "equal_allocated_bytes": equal, "results": entries,
        "padded": padded, "errors": errors,
    }  # fmt: skip
    (args.folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
