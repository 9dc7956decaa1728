"""The order of a model's KV heads, and profiles in that order.

`place_heads` puts the heads of a model into another order. The relabelled model's config remembers it (and so does a
checkpoint saved from it), and a profile in such an order says so in its metadata. Whatever meets a model and a profile
then brings the profile into the model's order by itself, so that one full profile in the original order serves every
relabelling of a model.

An order is `[L][H]`: `order[l][p]` is the original KV head at position p of layer l.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ..errors import ProfileError, shorten
from .model_shape import HEAD_ORDER, text_config
from .profile import HeadProfile

__all__ = ["config_order", "in_order", "in_order_of", "original_order", "profile_order", "set_config_order"]

Order = list[list[int]]


def config_order(config: Any) -> Order | None:
    """The head order of a relabelled model; None for a model in its original order."""
    return getattr(text_config(config), HEAD_ORDER, None)


def set_config_order(config: Any, order: Order) -> None:
    """Remember in a model's config that its heads are in ``order``; `save_pretrained` keeps it."""
    setattr(text_config(config), HEAD_ORDER, copy.deepcopy(order))


def profile_order(profile: HeadProfile) -> Order | None:
    """The order that a profile's rows are in; None for the original one."""
    placement = profile.metadata.get("placement")
    return placement.get("permutation") if isinstance(placement, dict) else None


def in_order(profile: HeadProfile, order: Order, **placement: Any) -> HeadProfile:
    """A profile that is in the original order, with its rows in ``order``.

    Args:
        **placement: what the metadata should say about the order, besides the order itself.

    Raises:
        ProfileError: ``order`` is no permutation of the profile's heads.
    """
    _check(order, profile)
    placed = _reordered(profile, order)
    placed.metadata["placement"] = {**placement, "permutation": copy.deepcopy(order)}
    placed.validate()
    return placed


def original_order(profile: HeadProfile) -> HeadProfile:
    """The profile with its rows in the model's original order; itself if they are."""
    order = profile_order(profile)
    if order is None:
        return profile
    _check(order, profile)
    original = _reordered(profile, [[row.index(head) for head in range(len(row))] for row in order])
    del original.metadata["placement"]
    original.validate()
    return original


def in_order_of(profile: HeadProfile, config: Any) -> HeadProfile:
    """The profile with its rows in the order of the model that ``config`` belongs to; itself if they are.

    Raises:
        ProfileError: the profile was made for a relabelled model and this config is of one that was not; or an order is
            no permutation of the heads.
    """
    here, there = config_order(config), profile_order(profile)
    if here == there:
        return profile
    if here is None:
        raise ProfileError(
            "the profile belongs to a model whose heads were relabelled by place_heads, and this model's config does not "
            "say that its heads were: pass the original profile, or relabel the model (HeadPlacement.apply_to_model)"
        )
    return in_order(original_order(profile), here)


def _reordered(profile: HeadProfile, order: Order) -> HeadProfile:
    placed = copy.deepcopy(profile)
    for name in ("head_class", "sink", "window"):
        setattr(placed, name, _take(getattr(profile, name), order))
    for key, matrix in placed.metadata.get("scores", {}).items():
        placed.metadata["scores"][key] = _take(matrix, order)
    return placed


def _take(rows: Sequence[Sequence[Any]], order: Order) -> list[list[Any]]:
    return [[row[head] for head in heads] for row, heads in zip(rows, order, strict=True)]


def _check(order: Any, profile: HeadProfile) -> None:
    expected = list(range(profile.num_kv_heads))
    good = isinstance(order, list) and len(order) == profile.num_layers
    if not good or any(not isinstance(row, list) or sorted(row) != expected for row in order):
        raise ProfileError(
            f"the head order is {shorten(order)}; expected {profile.num_layers} permutations of {len(expected)} heads"
        )
