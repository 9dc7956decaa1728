"""Head profiles: classes of KV heads, their files, importers of foreign formats, pictures and the profiler."""

from .model_shape import ModelShape, config_hash, describe_config, model_shape
from .profile import HEAD_CLASSES, MAX_TOKENS, HeadProfile
from .sources import find_shipped, shipped_names

__all__ = [
    "HEAD_CLASSES",
    "MAX_TOKENS",
    "HeadProfile",
    "ModelShape",
    "config_hash",
    "describe_config",
    "find_shipped",
    "model_shape",
    "shipped_names",
]
