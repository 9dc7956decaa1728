"""How many sessions of one length fit a device: dense, paged, and paged with a head profile.

Arithmetic over byte counts; every term is in the result. Beside the keys and values that rest in a cache it counts what
a process needs to work: the CUDA context and its libraries, the activations of a forward, room that pools and the
allocator take beyond the pages, and the second copy of a slab while it grows. It knows no fragmentation beyond that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RedKnotError, shorten
from ..paging.pool import SPARE_SHARE, SPARE_TOKENS
from .profile import HeadProfile
from .selection import integer

__all__ = ["RUNTIME_BYTES", "Activations", "Capacity", "capacity"]

# CUDA context, loaded kernels, library workspaces. An H200 with torch 2.11 had 0.9 GB less than its memory before the
# first page (benchmarks/results/h200/decode.json, free_gb and before_gb of the capacity rows).
RUNTIME_BYTES = 1 << 30
CHUNK = 2048
# The caching allocator keeps blocks of every size that a forward used. An H100 that was filled until a prompt of 2,048 tokens
# found no room had 2.5 times the activations' bytes beyond its caches (torch 2.11, a Llama-8B shape of 4 layers).
KEPT_BLOCKS = 2.5
FREED_SHARE = 100  # of a batch that grows, one part in so many lies in freed blocks that are too small for what comes
MiB = 1 << 20


@dataclass(frozen=True)
class Activations:
    """What a forward needs beside weights and cache.

    Attributes:
        prompt: bytes that one forward over a chunk of a prompt leaves with the allocator, logits of its last token included.
        session: bytes of a decode step for each session: its logits and their float32 copy.
    """

    prompt: int
    session: int

    @classmethod
    def of(cls, config: Any, chunk: int = CHUNK, itemsize: int = 2) -> Activations:
        """From a model's config: residual stream, projections and the two halves of the MLP of one layer."""
        from .model_shape import model_shape, text_config

        text, shape = text_config(config), model_shape(config)
        hidden = int(text.hidden_size)
        wide = int(getattr(text, "intermediate_size", None) or 4 * hidden)
        active = int(getattr(text, "num_experts_per_tok", None) or 1)
        heads = int(getattr(text, "num_attention_heads", shape.num_kv_heads))
        token = (
            6 * hidden + 2 * (heads + 2 * shape.num_kv_heads) * (shape.head_dim or hidden // heads) + 3 * active * wide
        )
        logits = int(text.vocab_size) * (itemsize + 4)
        return cls(int(KEPT_BLOCKS * chunk * token * itemsize) + logits, logits)


@dataclass(frozen=True)
class Capacity:
    """Bytes of one session and how many fit; each per device of a tensor-parallel group.

    Attributes:
        weights, runtime: bytes that are taken before the first session, on one device.
        available: bytes left for sessions and for a forward.
        activations: bytes that a forward over a chunk of a prompt takes. A cache that grows does so when they are not
            there, so the larger of the two counts.
        dense_bytes, paged_bytes, head_aware_bytes: keys, values and page tables of one session at rest, on the fullest
            device: contiguous tensors that keep every token; pages that keep every token; pages of the profile.
        dense_extra, paged_extra, head_aware_extra, separate_extra, fixed_extra: what a session takes on top of them:
            logits, spare pages, what the allocator rounds up, the second copy of a slab that grows.
        dense, paged, head_aware: whole sessions that fit as rows of one cache that grows.
        separate: sessions of the profile that fit in a cache for each. The default allocator rounds the slabs of small
            caches up; with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` it does not, and as many fit as in a batch.
        fixed: sessions of the profile in one cache of the static form (``max_cache_len``), whose memory never grows.
        assumptions: one sentence each.
    """

    weights: int
    runtime: int
    activations: int
    available: int
    dense_bytes: int
    paged_bytes: int
    head_aware_bytes: int
    dense_extra: int
    paged_extra: int
    head_aware_extra: int
    separate_extra: int
    fixed_extra: int
    dense: int
    paged: int
    head_aware: int
    separate: int
    fixed: int
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
    utilization: float = 1.0,
    world_size: int = 1,
    runtime: int = RUNTIME_BYTES,
    activations: Activations | None = None,
    chunk: int = CHUNK,
) -> Capacity:
    """Count sessions.

    Args:
        profile: the head profile.
        context: tokens per session.
        memory: bytes of one device, as ``torch.cuda.get_device_properties(0).total_memory`` says.
        weights: bytes of the whole model; split evenly over `world_size` devices.
        dtype: of K and V.
        page_size: tokens per page.
        head_dim: default the profile's.
        utilization: share of the memory that this process may take.
        world_size: devices of a tensor-parallel group; heads are placed by `place_heads`.
        runtime: bytes of the CUDA context, kernels and libraries.
        activations: of the model, for prompts fed ``chunk`` tokens at a time. None: a fiftieth of the weights.
        chunk: tokens of a prompt that are fed at a time.

    Raises:
        RedKnotError: the weights alone do not fit, or an argument is out of range.
    """
    from ..placement import place_heads

    integer(context, "context", 1, 2**40)
    integer(memory, "memory", 1, 2**60)
    integer(weights, "weights", 0, 2**60)
    integer(runtime, "runtime", 0, 2**60)
    integer(chunk, "chunk", 1, 2**40)
    if isinstance(utilization, bool) or not isinstance(utilization, (int, float)) or not 0 < utilization <= 1:
        raise RedKnotError(f"utilization is {shorten(utilization)}; expected a share above 0, at most 1")
    each = -(-weights // world_size)
    known = activations is not None
    if activations is None:
        activations = Activations(weights // 50, 0)
    available = int(memory * utilization) - each - runtime
    if available <= activations.prompt:
        raise RedKnotError(
            f"the weights ({each:,} bytes per device), {runtime:,} bytes of context and libraries and "
            f"{activations.prompt:,} bytes of activations do not fit {utilization:.0%} of {memory:,} bytes; use more "
            "memory, a larger world_size or a smaller chunk"
        )
    sizes: dict[str, Any] = {"dtype": dtype, "page_size": page_size, "head_dim": head_dim}
    placed = place_heads(profile, world_size)
    share = placed.replicas / world_size
    layers = max(1, len(profile.attention_layers))
    dense = round(share * profile.dense_kv_bytes(context, dtype=dtype, head_dim=head_dim))
    every = HeadProfile(
        profile.num_layers,
        profile.num_kv_heads,
        [["global"] * profile.num_kv_heads] * profile.num_layers,
        metadata={k: v for k, v in profile.metadata.items() if k in ("head_dim", "attention_layers")},
    )
    paged_tables = round(share * every.table_bytes(context, page_size=page_size))
    paged_pages = round(share * every.kv_bytes(context, **sizes))
    aware_tables = round(share * profile.table_bytes(context, page_size=page_size))
    aware_pages = max(placed.kv_bytes_per_rank(context, **sizes))
    page = every.kv_bytes(page_size, **sizes) // (layers * profile.num_kv_heads)

    def growing(given: HeadProfile, pages: int) -> tuple[int, int, int]:
        """Of a session beyond its pages at rest: as a row of a batch, its largest slab, alone in a cache."""
        slabs, spare = [], 0.0
        tokens = given.stored_tokens(context)
        for layer in given.attention_layers:
            held = sum(-(-count // page_size) for count in tokens[layer])
            keep_all = sum(count >= context for count in tokens[layer])
            more = min(held / SPARE_SHARE, keep_all * -(-SPARE_TOKENS // page_size))
            spare += share * more * page
            slabs.append(share * (held + more) * page / 2)
        alone = sum(2 * _segment(int(slab) + page // 2) for slab in slabs) - pages  # page 0 of a pool is nobody's
        return int(spare + pages / FREED_SHARE), int(max(slabs, default=0)), alone

    def count(rest: int, extra: int, twice: int = 0) -> int:
        """Sessions of ``rest + extra`` bytes beside a forward, or beside the second copy of ``twice`` bytes of each."""
        beside_forward = (available - activations.prompt) // (rest + extra)
        return min(beside_forward, available // (rest + extra + twice))

    logits = activations.session
    paged_extra, paged_slab, _ = growing(every, paged_pages)
    aware_extra, aware_slab, separate_extra = growing(profile, aware_pages)
    dense_slab = -(-dense // (2 * layers))  # torch.cat: the old and the new tensor of one layer
    paged, head_aware = paged_pages + paged_tables, aware_pages + aware_tables
    assumptions = (
        f"{utilization:.0%} of the memory is this process's, {runtime / MiB:,.0f} MiB of it the CUDA context, kernels and "
        "libraries",
        (
            f"activations of prompts fed {chunk} tokens at a time"
            if known
            else "activations of a fiftieth of the weights; --model would count them"
        ),
        f"weights split evenly over {world_size} device{'s' if world_size > 1 else ''}",
        f"every session holds {context} tokens, nothing is shared between sessions",
        "extra: logits, spare pages of pools that grow, the allocator's rounding, one slab twice while it grows",
    )
    return Capacity(
        weights=each,
        runtime=runtime,
        activations=activations.prompt,
        available=available,
        dense_bytes=dense,
        paged_bytes=paged,
        head_aware_bytes=head_aware,
        dense_extra=logits + dense_slab,
        paged_extra=logits + paged_extra + paged_slab,
        head_aware_extra=logits + aware_extra + aware_slab,
        separate_extra=logits + separate_extra,
        fixed_extra=logits,
        dense=count(dense, logits, dense_slab),
        paged=count(paged, logits + paged_extra, paged_slab),
        head_aware=count(head_aware, logits + aware_extra, aware_slab),
        separate=count(head_aware, logits + separate_extra),
        fixed=count(head_aware, logits),
        assumptions=assumptions,
    )


def _segment(size: int) -> int:
    """What the CUDA caching allocator takes for a block of ``size`` bytes among equal ones, without expandable segments.

    Blocks up to 1 MiB share segments of 2 MiB, those below 10 MiB segments of 20 MiB; larger ones are rounded up to 2 MiB
    (torch/csrc/c10/cuda/CUDACachingAllocator, kSmallBuffer, kLargeBuffer and kRoundLarge).
    """
    size = -(-max(size, 1) // 512) * 512
    if size >= 10 * MiB:
        return -(-size // (2 * MiB)) * 2 * MiB
    segment = 2 * MiB if size <= MiB else 20 * MiB
    return segment // (segment // size)
