"""A head's window and the model's own sliding window, put together."""

from __future__ import annotations

import numpy as np


def effective_window(
    sink: np.ndarray, window: np.ndarray, model_window: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Intersect heads with the model's own sliding window.

    Args:
        sink, window: int ``[kv_heads]``, ``KEEP_ALL`` for heads that keep everything.

    Returns:
        The sinks and windows to store, and the model window that attention still has to apply (0 if storage says it all).
    """
    if model_window is None:
        return sink, window, 0
    inside = window < model_window
    sink, window = np.where(inside, sink, 0), np.where(inside, window, model_window)
    return sink, window, model_window if (inside & (sink > 0)).any() else 0
