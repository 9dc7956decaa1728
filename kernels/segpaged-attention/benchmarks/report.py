"""Rows of measurements, kept on disk as they come; the bars they are judged by; a table and a plot of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

MAIN = "1/8 global, 64+256"  # the profile that peers are compared on
BIG = 500e6  # bytes per layer from which on decode has to come near the copy bandwidth


class Report:
    """Measurements of one device, in `folder`/rows.jsonl: a run that was cut off can go on where it stopped.

    Args:
        folder: where the results go.
        resume: keep the rows that are there; their cases are not measured again.
        kinds: what this run measures ("decode", ...). Rows of other kinds are kept in any case.
    """

    def __init__(self, folder: Path, resume: bool, kinds: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = folder / "rows.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut off
        self.rows: list[dict] = [row for row in found if resume or row["kind"] not in kinds]
        self._file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, kind: str, case: str, method: str, us: float | None, **more: object) -> None:
        row = {"kind": kind, "case": case, "method": method, "us": us, **more}
        self.rows.append(row)
        with open(self._file, "a") as file:
            file.write(json.dumps(row) + "\n")
        extra = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in more.items()
        )
        print(f"{kind:8} {case:44} {method:28} {'-' if us is None else f'{us:12.2f}'} {extra}", flush=True)

    def has(self, kind: str, case: str, method: str) -> bool:
        return any((row["kind"], row["case"], row["method"]) == (kind, case, method) for row in self.rows)

    def us(self, kind: str, case: str, method: str) -> float | None:
        return next((r["us"] for r in self.rows if (r["kind"], r["case"], r["method"]) == (kind, case, method)), None)

    def write(self, about: dict, judged: list[dict]) -> None:
        """results.json, results.csv, bars.json and, where there is matplotlib, results.png."""
        (self.folder / "results.json").write_text(json.dumps({"about": about, "rows": self.rows}, indent=1) + "\n")
        (self.folder / "bars.json").write_text(json.dumps(judged, indent=1) + "\n")
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(self.folder / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        plot(self.rows, self.folder / "results.png")


def bars(report: Report, limits: dict[str, float]) -> list[dict]:
    """What the project asks of these kernels, and what was measured. Bars whose cases did not run are left out.

    Decode is judged by the copy bandwidth, bytes read plus bytes written. A pure read is some percent faster, and decode
    does little but read, so what the same bar would be by the read bandwidth stands beside it: `by_read`, `met_by_read`.

    Args:
        limits: GB/s, `copy` and `read`.
    """
    found: list[dict] = []

    def bar(
        name: str, measured: float | None, target: float, unit: str, at_least: bool, read: float | None = None
    ) -> None:
        if measured is None:
            return

        def met(limit: float) -> bool:
            return measured >= limit if at_least else measured <= limit

        one = {"name": name, "measured": round(measured, 3), "target": round(target, 3), "unit": unit}
        one |= {"at_least": at_least, "met": met(target)}
        if read is not None:
            one |= {"by_read": round(read, 3), "met_by_read": met(read)}
        found.append(one)

    for row in report.rows:
        if row["kind"] != "decode" or row["method"] != "segpaged" or row["us"] is None:
            continue
        fixed, size, us = 10.0 if row["items"] >= 256 else 8.0, row["bytes"], row["us"]
        copy, read = (fixed + size / limits[name] / 1e3 for name in ("copy", "read"))
        bar(f"decode {row['case']}", us, copy, "us per layer", False, read)
        if size >= BIG:
            share = 0.95 * limits["read"] / limits["copy"]
            name = f"decode {row['case']}, share of copy bandwidth"
            bar(name, size / us / 1e3 / limits["copy"], 0.95, "ratio", True, share)
    for tokens, share, factor in (("8K", 0.85, None), ("32K", 0.95, 5.5), ("128K", 0.95, 7.3)):
        dense = report.us("prefill", f"{tokens} {MAIN}", "SDPA cudnn, full")
        whole = report.us("prefill", f"{tokens} all global", "segpaged")
        ours = report.us("prefill", f"{tokens} {MAIN}", "segpaged")
        if dense and whole:
            bar(f"prefill {tokens}, all global, speed against cuDNN", dense / whole, share, "ratio", True)
        if dense and ours and factor:
            bar(f"prefill {tokens}, 1/8 global, speed against cuDNN dense", dense / ours, factor, "ratio", True)
    chunk = "512 over 32256"
    ours = report.us("prefill", f"{chunk} {MAIN}", "segpaged")
    methods = ((f"{chunk} all global", "segpaged"), (f"{chunk} {MAIN}", "SDPA causal_lower_right"))
    known = [us for case, method in methods if (us := report.us("prefill", case, method)) is not None]
    if ours and known:
        bar("512 new tokens over 31.5K, time against the best dense", ours / min(known), 0.5, "ratio", False)
    for row in report.rows:
        if row["kind"] == "append" and row["case"].endswith(" T1"):
            bar(f"append {row['case']}", row["us"], 2.5, "us per layer", False)
    return found


def plot(rows: list[dict], path: Path) -> None:
    """Horizontal bars of all times, one panel per kind, the kernels of this package in blue."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    kinds = [kind for kind in ("decode", "prefill", "append") if any(r["kind"] == kind and r["us"] for r in rows)]
    if not kinds:
        return
    most = max(sum(r["kind"] == kind and bool(r["us"]) for r in rows) for kind in kinds)
    figure, axes = plt.subplots(1, len(kinds), figsize=(8 * len(kinds), max(4, most / 7)), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        timed = [r for r in rows if r["kind"] == kind and r["us"]][::-1]
        colors = ["tab:blue" if r["method"] == "segpaged" else "tab:gray" for r in timed]
        axis.barh(range(len(timed)), [r["us"] for r in timed], color=colors)
        axis.set_yticks(range(len(timed)), [f"{r['case']} | {r['method']}" for r in timed], fontsize=6)
        axis.set_xscale("log")
        axis.set_xlabel("microseconds per layer")
        axis.set_title(kind)
        axis.margins(y=0.01)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
