"""Pictures of a head profile: a heat map for the terminal, and PNG, SVG or PDF through matplotlib.

The shade of a cell is the share of tokens its head keeps at a given context length, so that a local head with a wide
window looks different from a narrow one. matplotlib is imported only when a file is asked for.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import MissingExtraError, ProfileError, shorten

if TYPE_CHECKING:
    from .profile import HeadProfile

__all__ = ["default_context", "save_heatmap", "terminal_heatmap"]

_BLOCKS = "░▒▓█"
_ASCII = ".-+#"
_LETTERS = {"global": "G", "local": "l", "retrieval": "R", "dense": "D"}
_ANSI = {"global": "\x1b[31m", "retrieval": "\x1b[35m", "dense": "\x1b[33m", "local": "\x1b[34m"}
_ANSI_END = "\x1b[0m"
_COLORS = {"global": "#b2182b", "retrieval": "#762a83", "dense": "#e08214", "local": "#2166ac"}
_FILE_TYPES = (".png", ".svg", ".pdf")


def default_context(profile: HeadProfile) -> int:
    """A context at which the map says something: the power of two that is at least four times the widest local head."""
    widest = max((s + w for rows in zip(profile.sink, profile.window, strict=True) for s, w in zip(*rows, strict=True)))
    return max(4096, 1 << math.ceil(math.log2(4 * max(1, widest))))


def terminal_heatmap(
    profile: HeadProfile,
    *,
    seq_len: int | None = None,
    width: int | None = None,
    stream: TextIO | None = None,
    color: bool | None = None,
    unicode: bool | None = None,
) -> str:
    """The head map as text: one row per KV head, one column per layer, folded to the width of the terminal.

    Args:
        profile: what to draw.
        seq_len: context at which the kept share is computed; default `default_context`.
        width: columns; default the terminal's, 80 when unknown.
        stream: where the text will go, to decide on colour and block characters; default stdout.
        color: default: only on a terminal, and not when NO_COLOR is set or TERM is "dumb".
        unicode: block characters; default: when the stream's encoding has them.
    """
    stream = stream or sys.stdout
    seq_len = default_context(profile) if seq_len is None else seq_len
    width = width or shutil.get_terminal_size((80, 24)).columns
    color = _wants_color(stream) if color is None else color
    unicode = _has_blocks(stream) if unicode is None else unicode
    shades = _BLOCKS if unicode else _ASCII

    kept = profile.stored_tokens(seq_len)
    attention = set(profile.attention_layers)
    label = max(4, len(str(profile.num_kv_heads - 1)) + 2)
    per_block = max(1, min(profile.num_layers, width - label - 1))
    lines = []
    for start in range(0, profile.num_layers, per_block):
        layers = range(start, min(start + per_block, profile.num_layers))
        lines.append(" " * label + " " + _ruler(layers))
        for head in range(profile.num_kv_heads):
            cells = []
            for layer in layers:
                name = profile.head_class[layer][head]
                if layer not in attention:
                    cells.append(" ")
                    continue
                share = kept[layer][head] / seq_len if seq_len else 1.0
                # Heads that keep all tokens get the full block; a local head never does.
                shade = shades[3] if name != "local" else shades[min(2, int(3 * min(share, 1.0)))]
                cells.append(_ANSI[name] + shade + _ANSI_END if color else shade)
            lines.append(f"H{head}".rjust(label) + " " + "".join(cells))
    lines.append(
        f"{shades[3]} all tokens   {shades[0]}{shades[1]}{shades[2]} local: below 1/3, 2/3, all of {seq_len} tokens"
        + ("   (blank: no KV in this layer)" if len(attention) < profile.num_layers else "")
    )
    return "\n".join(lines)


def save_heatmap(profile: HeadProfile, path: str | os.PathLike[str], *, seq_len: int | None = None) -> Path:
    """Draw the head map into a file.

    Args:
        profile: what to draw.
        path: ends in .png, .svg or .pdf.
        seq_len: context at which the kept share is computed; default `default_context`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ProfileError: another file type, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in _FILE_TYPES:
        raise ProfileError(f"cannot draw {shorten(str(path), 200)}: the name must end in {', '.join(_FILE_TYPES)}")
    figure = _figure(profile, default_context(profile) if seq_len is None else seq_len)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # No date in the file: a picture under version control changes only when the profile does.
        figure.savefig(
            target, dpi=150, bbox_inches="tight", metadata={"Date": None} if target.suffix == ".svg" else None
        )
    except OSError as error:
        raise ProfileError(f"cannot write {shorten(str(path), 200)}: {error}") from None
    return target


def _figure(profile: HeadProfile, seq_len: int) -> Any:
    try:
        # Figure and canvas without pyplot: no global state, no display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise MissingExtraError("a head map as PNG, SVG or PDF", "matplotlib", "plots") from None

    kept = profile.stored_tokens(seq_len)
    attention = set(profile.attention_layers)
    image = [[(1.0, 1.0, 1.0)] * profile.num_layers for _ in range(profile.num_kv_heads)]
    for layer in attention:
        for head in range(profile.num_kv_heads):
            share = min(1.0, kept[layer][head] / seq_len) if seq_len else 1.0
            # Square root: shares of 1 % and 10 % must both be visible beside 100 %.
            strength = 1.0 if profile.head_class[layer][head] != "local" else 0.25 + 0.6 * math.sqrt(share)
            base = to_rgb(_COLORS[profile.head_class[layer][head]])
            image[head][layer] = tuple(1 - strength * (1 - channel) for channel in base)  # type: ignore[assignment]

    # Bounded, whatever a stranger's profile claims: a picture of 100,000 layers would take gigabytes.
    inches = (
        min(40.0, max(5.0, 0.18 * profile.num_layers + 1.5)),
        min(40.0, max(1.8, 0.22 * profile.num_kv_heads + 1.4)),
    )
    figure = Figure(figsize=inches)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_yticks(range(0, profile.num_kv_heads, max(1, profile.num_kv_heads // 8)))
    if max(profile.num_layers, profile.num_kv_heads) <= 256:  # closer lines would be all there is to see
        axes.set_xticks([l - 0.5 for l in range(1, profile.num_layers)], minor=True)
        axes.set_yticks([h - 0.5 for h in range(1, profile.num_kv_heads)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    present = [name for name in _COLORS if profile.count(name)]
    labels = [f"{name}: {profile.count(name)}" for name in present]
    axes.legend(
        handles=[Patch(color=_COLORS[name], label=text) for name, text in zip(present, labels, strict=True)],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize="small",
    )
    model = str(profile.metadata.get("model") or "head profile")[:80]
    # A dollar sign would start mathtext, and a stranger's model name may hold one.
    axes.set_title(f"{model}: tokens kept at {seq_len}".replace("$", r"\$"), fontsize="medium")
    return figure


def _ruler(layers: range) -> str:
    """Layer numbers above the columns, every tenth and the first."""
    text = [" "] * len(layers)
    for column, layer in enumerate(layers):
        mark = f"L{layer}" if column == 0 else str(layer)
        free = all(cell == " " for cell in text[max(0, column - 1) : column + len(mark)])
        if (column == 0 or layer % 10 == 0) and free and column + len(mark) <= len(text):
            text[column : column + len(mark)] = mark
    return "".join(text).rstrip()


def _wants_color(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(getattr(stream, "isatty", lambda: False)())


def _has_blocks(stream: TextIO) -> bool:
    try:
        _BLOCKS.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
