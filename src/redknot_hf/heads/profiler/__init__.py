"""The profiler: which KV heads of a model need the whole context, measured and validated.

`profile_heads` is the entry; one idea per module below it. Registered attention functions and masks live only while a
profile is made.
"""

from .api import profile_heads
from .choose import METHODS, select_profile
from .visibility import HeadMap

__all__ = ["METHODS", "HeadMap", "profile_heads", "select_profile"]
