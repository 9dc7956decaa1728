"""How many sessions of one length fit a device: dense, paged, and paged with a head profile.

Arithmetic over byte counts, and it says what it assumed. It does not know the activations, graphs and fragmentation of
a real process: `utilization` stands for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RedKnotError, shorten
from .profile import HeadProfile
from .selection import integer

__all__ = ["Capacity", "capacity"]


@dataclass(frozen=True)
class Capacity:
    """Bytes of one session and how many fit, three ways; each per device of a tensor-parallel group.

    Attributes:
        available: bytes left for KV on one device after weights and reserve.
        dense_bytes, paged_bytes, head_aware_bytes: one session on the fullest device: contiguous tensors that keep
            every token; pages that keep every token; pages and page tables of the profile.
        dense, paged, head_aware: whole sessions that fit.
        assumptions: one sentence each.
    """

    available: int
    dense_bytes: int
    paged_bytes: int
    head_aware_bytes: int
    dense: int
    paged: int
    head_aware: int
    assumptions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "assumptions": list(self.assumptions)}


def capacity(
    profile: HeadProfile,
    context: int,
    memory: int,
    weights: int,
    *,
    dtype: Any = "bfloat16",
    page_size: int = 64,
    head_dim: int | None = None,
    utilization: float = 0.9,
    world_size: int = 1,
) -> Capacity:
    """Count sessions.

    Args:
        profile: the head profile.
        context: tokens per session.
        memory: bytes of one device.
        weights: bytes of the whole model; split evenly over `world_size` devices.
        dtype: of K and V.
        page_size: tokens per page.
        head_dim: default the profile's.
        utilization: share of the memory that weights and KV may take.
        world_size: devices of a tensor-parallel group; heads are placed by `place_heads`.

    Raises:
        RedKnotError: the weights alone do not fit, or an argument is out of range.
    """
    from ..placement import place_heads

    integer(context, "context", 1, 2**40)
    integer(memory, "memory", 1, 2**60)
    integer(weights, "weights", 0, 2**60)
    if isinstance(utilization, bool) or not isinstance(utilization, (int, float)) or not 0 < utilization <= 1:
        raise RedKnotError(f"utilization is {shorten(utilization)}; expected a share above 0, at most 1")
    available = int(memory * utilization) - -(-weights // world_size)
    if available <= 0:
        raise RedKnotError(
            f"the weights ({-(-weights // world_size)} bytes per device) do not fit {utilization:.0%} of {memory} "
            "bytes; use more memory or a larger world_size"
        )
    replicas = place_heads(profile, world_size).replicas
    share = replicas / world_size
    dense = round(share * profile.dense_kv_bytes(context, dtype=dtype, head_dim=head_dim))
    all_heads = HeadProfile(
        profile.num_layers,
        profile.num_kv_heads,
        [["global"] * profile.num_kv_heads] * profile.num_layers,
        metadata={k: v for k, v in profile.metadata.items() if k in ("head_dim", "attention_layers")},
    )
    paged = round(share * all_heads.kv_bytes(context, dtype=dtype, page_size=page_size, head_dim=head_dim))
    paged += round(share * all_heads.table_bytes(context, page_size=page_size))
    placed = place_heads(profile, world_size)
    head_aware = max(placed.kv_bytes_per_rank(context, dtype=dtype, page_size=page_size, head_dim=head_dim))
    head_aware += round(share * profile.table_bytes(context, page_size=page_size))
    assumptions = (
        f"{utilization:.0%} of the memory for weights and KV, the rest for activations and the allocator",
        f"weights split evenly over {world_size} device{'s' if world_size > 1 else ''}",
        f"every session holds {context} tokens, nothing is shared between sessions",
        "paged and head-aware include page tables",
        "pools take the pages they need: prompts in one piece; one that grows by chunks takes up to an eighth more",
    )
    return Capacity(
        available,
        dense,
        paged,
        head_aware,
        available // dense,
        available // paged,
        available // head_aware,
        assumptions,
    )
