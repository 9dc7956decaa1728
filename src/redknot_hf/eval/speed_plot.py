"""A picture of a `CacheTable`: first token, decoding and memory, one bar per cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import pyplot_for
from .speed import CacheTable

__all__ = ["plot"]


def plot(table: CacheTable, path: str | Path) -> None:
    """Draw the rows that were measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = pyplot_for("the plot of a benchmark")
    rows = [row for row in table.rows if row.first_token_s is not None]
    names = [row.name for row in rows]
    panels: tuple[tuple[str, list[Any], str], ...] = (
        ("first token, s", [row.first_token_s for row in rows], "{:.3g}"),
        ("ms per token", [row.decode_ms for row in rows], "{:.3g}"),
        ("KV per sequence, MB", [(row.kv_bytes or 0) / 1e6 for row in rows], "{:.3g}"),
        ("sequences that fit", [row.fits_measured or row.fits or 0 for row in rows], "{:.0f}"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 0.42 * len(rows) + 1.4), sharey=True, squeeze=False)
    for axis, (title, values, form) in zip(axes[0], panels, strict=True):
        colours = ["#c0392b" if row.key.startswith("ours") else "#7f8c8d" for row in rows]
        bars = axis.barh(range(len(rows)), values, color=colours)
        axis.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(rows)), names, fontsize=9)
        axis.margins(x=0.22)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{table.model}, {table.batch} x {table.tokens} tokens, {table.dtype}, {table.device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
