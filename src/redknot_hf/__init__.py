"""Head-aware KV caching for Hugging Face transformers.

Importing this package registers ``attn_implementation="redknot"`` with transformers and changes nothing else.
"""

from .attention import register
from .cache import RedKnotCache
from .errors import RedKnotError
from .heads import HeadProfile
from .memory import MemoryReport

__version__ = "0.1.0"
__all__ = ["HeadProfile", "MemoryReport", "RedKnotCache", "RedKnotError", "__version__", "profile_heads"]

register()


def __getattr__(name: str) -> object:
    # The profiler is a tool of its own; what only serves a model should not pay for importing it.
    if name == "profile_heads":
        from .heads.profiler import profile_heads

        return profile_heads
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
