"""Position-independent reuse: documents computed once, stored, and used anywhere in any prompt.

`SegmentStore` keeps them, `SegmentedPrompt` builds prompts from them. See docs/reuse.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .prompt import SegmentedPrompt, SplicedPrompt
    from .stores import SegmentStore

__all__ = ["SegmentStore", "SegmentedPrompt", "SplicedBatch", "SplicedPrompt"]


def __getattr__(name: str) -> Any:
    # Not at import: stores are used without the model side, and the cache must not import what is built on it.
    if name in ("SegmentedPrompt", "SplicedBatch", "SplicedPrompt"):
        from . import prompt

        return getattr(prompt, name)
    if name == "SegmentStore":
        from .stores import SegmentStore

        return SegmentStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
