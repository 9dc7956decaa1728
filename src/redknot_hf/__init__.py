"""Head-aware KV caching for Hugging Face transformers.

Importing this package registers ``attn_implementation="redknot"`` with transformers and changes nothing else.
"""

from .attention import register
from .cache import RedKnotCache
from .errors import RedKnotError
from .heads import HeadProfile
from .memory import MemoryReport

__version__ = "0.1.0"
__all__ = ["HeadProfile", "MemoryReport", "RedKnotCache", "RedKnotError", "__version__"]

register()
