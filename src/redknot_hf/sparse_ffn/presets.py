"""Schedules whose cost in quality was measured, named by model and by what was measured.

The number in a name is the measured KL on text, rounded up to the next thousandth. A preset holds for its model alone.
``benchmarks/sparse_ffn/frontier.py`` measures; nothing here is a guess.
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
_FIRST = (
    "2048 tokens of WikiText-2 and Wikipedia, the 128 that follow, n=3, standard error {}; float32 on a CPU, "
    "transformers 5.23, 2026-11-24"
)


def _preset(name: str, kl_text: float, ffn_rows: float, measured: str, *bands: Band) -> Preset:
    return Preset(SparseFFNSchedule(bands=bands, name=name), _SMOLLM2, kl_text, ffn_rows, measured)


# The last layer's FFN rows are read by nobody but the rows themselves: leaving them out costs nothing in what follows.
PRESETS: dict[str, Preset] = {
    preset.schedule.name: preset
    for preset in (
        _preset("smollm2-135m-kl0.003", 0.0024, 0.857, _FIRST.format(0.0009), Band(20, keep=0.6), Band(29, keep=0.0)),
        _preset("smollm2-135m-kl0.006", 0.0057, 0.764, _FIRST.format(0.0016), Band(20, keep=0.31), Band(29, keep=0.0)),
    )
}
"""Presets by name."""
