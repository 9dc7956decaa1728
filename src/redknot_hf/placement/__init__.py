"""Heads across tensor-parallel ranks: a balanced order, and models and checkpoints in that order."""

from .checkpoint import relabel_checkpoint
from .placing import DEFAULT_CONTEXTS, HeadPlacement, place_heads, rank_profile

__all__ = ["DEFAULT_CONTEXTS", "HeadPlacement", "place_heads", "rank_profile", "relabel_checkpoint"]
