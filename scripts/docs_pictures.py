#!/usr/bin/env python3
"""Draw the pictures of the documentation from the shipped head profiles: `python scripts/docs_pictures.py`.

Everything drawn is arithmetic over a profile (which tokens a head keeps, in how many pages); nothing is measured here.
Needs matplotlib. Writes docs/pictures/*.png, each below 60 kB.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from redknot_hf import HeadProfile

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
DEMO, LARGE = "SmolLM2-135M-Instruct", "Meta-Llama-3.1-8B-Instruct"
HEADS = ("#b2182b", "#2166ac", "#5aae61")
GREY = "#dddddd"


def head_map(folder: Path) -> None:
    """Which heads of the demo model keep every token."""
    HeadProfile.load(DEMO).plot(folder / "head-map.png")


def pages(folder: Path) -> None:
    """One layer of the demo model: the tokens that each head keeps of 1,280, and the pages that hold them."""
    profile, layer, tokens, page = HeadProfile.load(DEMO), 4, 1280, 64
    stored = profile.stored_tokens(tokens)[layer]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 3.6), height_ratios=(3, 2), layout="constrained")
    for head, color in enumerate(HEADS):
        sink, window = profile.sink[layer][head], profile.window[layer][head]
        everything = profile.head_class[layer][head] != "local"
        spans = [(0, tokens)] if everything else [(0, sink), (tokens - window, window)]
        top.broken_barh([(0, tokens)], (2.1 - head, 0.8), color=GREY)
        top.broken_barh(spans, (2.1 - head, 0.8), color=color)
        what = "global: all tokens" if everything else f"local: {sink} sinks, window {window}"
        top.text(tokens * 1.01, 2.5 - head, f"head {head}\n{what}", va="center", fontsize=8)
    top.set(xlim=(0, tokens * 1.28), ylim=(0, 3), yticks=[], xticks=range(0, tokens + 1, 256))
    top.set_title(f"Layer {layer} after {tokens} tokens: which tokens each KV head keeps", fontsize=10, loc="left")
    _boxes(bottom, [-(-count // page) for count in stored])
    bottom.set_title(f"The same layer in the page pool: pages of {page} tokens of one head", fontsize=10, loc="left")
    for axes in (top, bottom):
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(folder / "pages.png", dpi=110)
    plt.close(figure)


def _boxes(axes: Any, counts: list[int]) -> None:
    """The pages of each head side by side, 25 in a row."""
    place = 0
    for head, count in enumerate(counts):
        for _ in range(count):
            x, y = place % 25, place // 25
            axes.add_patch(Rectangle((x + 0.06, -y + 0.06), 0.88, 0.88, color=HEADS[head]))
            place += 1
    axes.set(xlim=(0, 32), ylim=(-((place - 1) // 25), 1), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.text(25.4, 0.5, f"{sum(counts)} pages\ninstead of {3 * max(counts)}", va="center", fontsize=8)


def memory(folder: Path) -> None:
    """KV bytes of the large shipped profile over the context, against a cache that keeps every token of every head."""
    profile = HeadProfile.load(LARGE)
    contexts = [1024 * 2**k for k in range(8)]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(contexts, [profile.dense_kv_bytes(n) / 2**30 for n in contexts], "o-", color="#888888", label="dense")
    kept = [(profile.kv_bytes(n) + profile.table_bytes(n)) / 2**30 for n in contexts]
    share = profile.count("local") / (profile.num_layers * profile.num_kv_heads)
    axes.plot(contexts, kept, "o-", color=HEADS[0], label=f"pages and tables, {share:.0%} of the heads local")
    axes.set(xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="GiB of keys and values, bf16")
    axes.set_xticks(contexts, [f"{n // 1024}K" for n in contexts])
    axes.minorticks_off()
    axes.set_yticks([0.125, 0.5, 2, 8, 16], ["1/8", "1/2", "2", "8", "16"])
    axes.set_title(f"{LARGE}, shipped profile (computed)", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "memory.png", dpi=110)
    plt.close(figure)


def main(folder: Path = FOLDER) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (head_map, pages, memory):
        draw(folder)
    for path in sorted(folder.glob("*.png")):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
