"""Schedules whose cost in quality was measured, named by model and by what was measured.

A preset holds for its model alone. ``benchmarks/sparse_ffn/frontier.py`` measures; nothing here is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import SparseFFNSchedule

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


PRESETS: dict[str, Preset] = {}
