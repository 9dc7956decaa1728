"""Sparse FFN: from some depth on, only rows that matter pass through the FFN in prefill. Approximate; off by default."""

from .context import SparseFFN
from .presets import PRESETS, Preset
from .run import LayerView
from .schedule import IMPORTANCES, Band, SparseFFNSchedule
from .stats import SparseFFNStats

__all__ = ["IMPORTANCES", "PRESETS", "Band", "LayerView", "Preset", "SparseFFN", "SparseFFNSchedule", "SparseFFNStats"]
