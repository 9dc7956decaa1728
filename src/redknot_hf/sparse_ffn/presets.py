"""Schedules whose cost in quality was measured, named by model and by what was measured.

The number in a name is the measured KL on text, rounded up to the next thousandth. A preset holds for its model alone.
``benchmarks/sparse_ffn/fit.py`` chose and measured; nothing here is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import Band, SparseFFNSchedule

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A schedule and what it was measured to do.

    Attributes:
        schedule: its ``name`` is the preset's.
        model: that it was measured on.
        kl_text: mean KL divergence (nats per token) from the dense model on the text that follows a prefilled context.
        ffn_rows: share of all FFN rows that ran.
        measured: tokens of context, texts, date and versions.
    """

    schedule: SparseFFNSchedule
    model: str
    kl_text: float
    ffn_rows: float
    measured: str


_SMOLLM2 = "SmolLM2-135M-Instruct"
_HOW = (
    "2048 tokens of WikiText-2 and Wikipedia, the 128 that follow, n=100, standard error {}; other texts chose the shares; "
    "float32 with products in TF32 on an H100, torch 2.11, transformers 5.17, 2026-11-25"
)


def _preset(name: str, kl_text: float, ffn_rows: float, measured: str, keeps: dict[int, float]) -> Preset:
    """``keeps``: layer -> share of its rows; a layer that is not named keeps what the one before it does."""
    bands = tuple(Band(layer, keep=keep) for layer, keep in keeps.items())
    schedule = SparseFFNSchedule(bands=bands, memory=1.0, fill="mean", name=name)
    return Preset(schedule, _SMOLLM2, kl_text, ffn_rows, measured)


# The last layer's FFN rows are read by nobody but the rows themselves: leaving them out costs nothing in what follows.
PRESETS: dict[str, Preset] = {
    preset.schedule.name: preset
    for preset in (
        _preset(
            "smollm2-135m-kl0.003", 0.0019, 0.849, _HOW.format(0.0002),
            {20: 0.8, 22: 1.0, 24: 0.2, 25: 0.4, 26: 0.0, 27: 0.8, 28: 0.2, 29: 0.0},
        ),
        _preset(
            "smollm2-135m-kl0.008", 0.0072, 0.769, _HOW.format(0.0012),
            {18: 0.6, 19: 1.0, 20: 0.6, 24: 0.1, 25: 0.2, 26: 0.0, 27: 0.3, 28: 0.0},
        ),
    )
}  # fmt: skip
"""Presets by name."""
