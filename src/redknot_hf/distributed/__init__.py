"""One model on several ranks, one cache for several processes: transfers through a store, reports over all ranks."""

from .folders import load_world, save_world
from .reports import WorldReport, world_report
from .segments import HeadStore, WorldPrompt
from .transfer import CacheMissing, Fetched, NotPublished, Publication, fetch, publish, unpublish

__all__ = [
    "CacheMissing",
    "Fetched",
    "HeadStore",
    "NotPublished",
    "Publication",
    "WorldPrompt",
    "WorldReport",
    "fetch",
    "load_world",
    "publish",
    "save_world",
    "unpublish",
    "world_report",
]
