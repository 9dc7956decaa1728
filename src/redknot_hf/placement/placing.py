"""Which tensor-parallel rank holds which KV head, and the exact relabelling of a model's weights that makes it so.

A tensor-parallel model gives rank r the r-th contiguous slice of every layer's heads. If global heads gather in a
slice, one rank runs out of memory while others are empty. `place_heads` chooses an order of the KV heads of every
layer in which the slices hold the same KV bytes over the whole model; `HeadPlacement.apply_to_model` puts the weights
into that order.

Heads of a layer are summed by the output projection, so their order has no meaning: the relabelled model computes the
same function. It is the same in exact arithmetic; in floating point the output projection adds in another order, so
logits differ by rounding (about 1e-6 in fp32).

This module does not shard anything and does not talk to other ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RedKnotError, shorten
from ..heads.balance import balance_heads, lower_bound
from ..heads.model_shape import model_shape
from ..heads.order import config_order, in_order, original_order, set_config_order
from ..heads.profile import HeadProfile
from ..heads.selection import integer
from .weights import attention_modules, attention_tensors, gather_plan

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_CONTEXTS", "HeadPlacement", "place_heads", "rank_profile"]

DEFAULT_CONTEXTS = (4096, 16384, 65536, 131072)
"""Context lengths balanced together: heads with different windows weigh differently at each."""


@dataclass(frozen=True)
class HeadPlacement:
    """An order of the KV heads of every layer; rank r holds the r-th slice of it.

    Attributes:
        source: the profile in the model's original order.
        world_size: tensor-parallel ranks.
        permutation: `[L][H]`: `permutation[l][p]` is the original KV head at position p of layer l.
    """

    source: HeadProfile
    world_size: int
    permutation: list[list[int]]

    @classmethod
    def contiguous(cls, profile: HeadProfile, world_size: int) -> HeadPlacement:
        """The order the model has: the baseline."""
        _replicas(profile, world_size)
        return cls(profile, world_size, [list(range(profile.num_kv_heads)) for _ in range(profile.num_layers)])

    @property
    def replicas(self) -> int:
        """Ranks that hold the same KV head: 1, or world_size / num_kv_heads when there are more ranks than heads."""
        return _replicas(self.source, self.world_size)

    @property
    def profile(self) -> HeadProfile:
        """The profile in the new order. A cache of the relabelled model takes it, or `source`: it knows the order."""
        return in_order(self.source, self.permutation, world_size=self.world_size)

    def rank_profile(self, rank: int) -> HeadProfile:
        """The heads of one rank alone, in the new order: `rank_profile` of `profile`."""
        return rank_profile(self.profile, rank, self.world_size)

    def heads_of(self, rank: int) -> list[list[int]]:
        """Original KV heads that a rank holds, one list per layer."""
        if not isinstance(rank, int) or not 0 <= rank < self.world_size:
            raise RedKnotError(f"rank is {shorten(rank)}; expected 0 to {self.world_size - 1}")
        size = self.source.num_kv_heads * self.replicas // self.world_size
        start = rank // self.replicas * size
        return [row[start : start + size] for row in self.permutation]

    def kv_bytes_per_rank(
        self,
        seq_len: int,
        batch_size: int = 1,
        dtype: Any = "bfloat16",
        page_size: int = 64,
        rollback: int = 0,
        *,
        head_dim: int | None = None,
    ) -> list[int]:
        """Bytes of live pages on every rank; arguments as in `HeadProfile.kv_bytes`.

        Without replicas the sum is `profile.kv_bytes` of the same arguments; with them it is that times `replicas`.
        """
        pages = self._pages_per_rank(seq_len, page_size, rollback)
        total = sum(pages)
        # What one page costs is the profile's knowledge; a rank's share of the pages is ours.
        all_bytes = self.source.kv_bytes(seq_len, batch_size, dtype, page_size, rollback, head_dim=head_dim)
        page_bytes = all_bytes * self.replicas // total if total else 0
        return [count * page_bytes for count in pages]

    def imbalance(self, seq_len: int, page_size: int = 64) -> float:
        """Largest over mean KV bytes per rank: 1.0 is perfect, 1.3 wastes 30 % of the other ranks' memory."""
        pages = self._pages_per_rank(seq_len, page_size)
        return max(pages) * self.world_size / sum(pages) if sum(pages) else 1.0

    def lower_bound(self, seq_len: int, page_size: int = 64) -> float:
        """What no order of the heads can improve `imbalance` below: above 1 when too few heads hold too much."""
        ranks = self.world_size // self.replicas
        return lower_bound(_pages(self.source, seq_len, page_size).astype(float), ranks)

    def decode_tokens(self, seq_len: int) -> int:
        """Stored tokens read by the busiest rank of each layer, summed over layers.

        Ranks wait for each other after every layer, so decode attention time follows this figure, not the sum per rank.
        """
        tokens = np.array(self.source.stored_tokens(seq_len))
        placed = np.take_along_axis(tokens, np.array(self.permutation), axis=1)
        ranks = self.world_size // self.replicas
        return int(placed.reshape(len(placed), ranks, -1).sum(axis=2).max(axis=1).sum())

    # ---------------------------------------------------------------- weights

    def apply_to_model(self, model: torch.nn.Module) -> None:
        """Put a live transformers model's attention weights into the new order, in place.

        Every attention module with `layer_idx` and q/k/v/o projections (or a fused `qkv_proj`) is changed; query heads
        move with their KV head, and so do biases, attention sinks and norms with a weight per head. Norms with one
        weight per head dimension stay. The model's config remembers the order, and so does a checkpoint saved from it: a
        `RedKnotCache` takes the original profile as before.

        Args:
            model: not yet sharded, quantised or wrapped in adapters.

        Raises:
            RedKnotError: another shape, an attention structure that is not understood (named), or a model relabelled
                before. Nothing is changed then.
        """
        import torch

        config = model.config
        self._check_fresh(config)
        modules = attention_modules(model, self.source)
        query_heads = model_shape(config).num_attention_heads
        plans = []
        for layer, module in modules.items():
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            plans.append((tensors, gather_plan(tensors, self.permutation[layer], query_heads, f"layer {layer}")))
        with torch.no_grad():
            for tensors, plan in plans:
                for name, (dim, index) in plan.items():
                    tensor = tensors[name]
                    tensor.copy_(tensor.index_select(dim, torch.tensor(index, device=tensor.device)))
        set_config_order(config, self.permutation)

    def apply_to_state_dict(self, state_dict: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The same relabelling for a checkpoint.

        Args:
            state_dict: names as `model.state_dict()` gives them, e.g. "model.layers.0.self_attn.q_proj.weight".
            config: the model's transformers config; it remembers the order from now on, so load the model with it.

        Returns:
            A new dictionary; tensors that do not change are shared with the input.

        Raises:
            RedKnotError: as `apply_to_model`; also when attention layers are missing, as in one shard of a checkpoint.
        """
        import torch

        self._check_fresh(config)
        groups = attention_tensors(state_dict, self.source, "the state dict")
        query_heads = model_shape(config).num_attention_heads
        result = dict(state_dict)
        for layer, names in groups.items():
            tensors = {name: state_dict[key] for name, key in names.items()}
            for name, (dim, index) in gather_plan(
                tensors, self.permutation[layer], query_heads, f"layer {layer}"
            ).items():
                tensor = tensors[name]
                result[names[name]] = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
        set_config_order(config, self.permutation)
        return result

    # ---------------------------------------------------------------- private

    def _check_fresh(self, config: Any) -> None:
        self.source.validate_for(config)
        if config_order(config) is not None:
            raise RedKnotError("this model's heads were relabelled before; load it again to use another placement")

    def _pages_per_rank(self, seq_len: int, page_size: int, rollback: int = 0) -> list[int]:
        pages = _pages(self.source, seq_len, page_size, rollback)
        placed = np.take_along_axis(pages, np.array(self.permutation), axis=1)
        ranks = self.world_size // self.replicas
        per_rank = placed.reshape(len(placed), ranks, -1).sum(axis=(0, 2))
        return [int(count) for count in np.repeat(per_rank, self.replicas)]


def place_heads(
    profile: HeadProfile,
    world_size: int,
    *,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    page_size: int = 64,
) -> HeadPlacement:
    """Choose an order of the KV heads of every layer that balances KV bytes over tensor-parallel ranks.

    Deterministic; well below a second for 80 layers x 8 heads.

    Args:
        profile: of the whole model.
        world_size: ranks. Either divides the number of KV heads, or is a multiple of it: then every KV head is held by
            `world_size / num_kv_heads` ranks (the runtime must replicate KV heads; transformers' own tensor parallelism
            does not).
        contexts: lengths in tokens to balance together.
        page_size: tokens per page.

    Raises:
        RedKnotError: world_size neither divides the number of KV heads nor is a multiple of it.
    """
    profile = original_order(profile)
    replicas = _replicas(profile, world_size)
    ranks = world_size // replicas
    if not contexts:
        raise RedKnotError("contexts is empty; expected at least one length in tokens")
    costs = np.stack([_pages(profile, length, page_size) for length in contexts], axis=2).astype(float)
    assignment = balance_heads(costs, ranks)
    # Stable: a layer whose heads are all alike keeps its order, and so do the heads inside a rank.
    order = np.argsort(assignment, axis=1, kind="stable")
    for layer in range(profile.num_layers):
        if (costs[layer] == costs[layer, :1]).all():
            order[layer] = np.arange(profile.num_kv_heads)
    return HeadPlacement(profile, world_size, order.tolist())


def rank_profile(profile: HeadProfile, rank: int, world_size: int) -> HeadProfile:
    """The rows of the KV heads that one tensor-parallel rank holds: what its memory follows from.

    A cache never needs it: it takes the full profile and finds its rank's heads.

    Args:
        profile: in the order that the model has (`HeadPlacement.profile` for a relabelled one).
        rank, world_size: as in torch.distributed; world_size divides the number of KV heads.

    Raises:
        RedKnotError: it does not divide, or the rank is none of 0 to world_size - 1.
    """
    if _replicas(profile, world_size) != 1:
        raise RedKnotError(f"world_size is {world_size}, more than the {profile.num_kv_heads} KV heads per layer")
    if not isinstance(rank, int) or not 0 <= rank < world_size:
        raise RedKnotError(f"rank is {shorten(rank)}; expected 0 to {world_size - 1}")
    size = profile.num_kv_heads // world_size
    mine = slice(rank * size, (rank + 1) * size)
    metadata = copy.deepcopy(profile.metadata)
    metadata["scores"] = {key: [row[mine] for row in rows] for key, rows in metadata.get("scores", {}).items()}
    metadata.pop("placement", None)
    metadata["rank"], metadata["world_size"] = rank, world_size
    return HeadProfile(
        profile.num_layers,
        size,
        [row[mine] for row in profile.head_class],
        [row[mine] for row in profile.sink],
        [row[mine] for row in profile.window],
        metadata,
    )


def _replicas(profile: HeadProfile, world_size: int) -> int:
    world_size = integer(world_size, "world_size", 1, 2**20)
    heads = profile.num_kv_heads
    if heads % world_size == 0:
        return 1
    if world_size % heads == 0:
        return world_size // heads
    raise RedKnotError(
        f"world_size is {world_size}, and the model has {heads} KV heads per layer: one must divide the other, or "
        "ranks would hold different numbers of heads"
    )


def _pages(profile: HeadProfile, seq_len: int, page_size: int, rollback: int = 0) -> np.ndarray:
    """`[L, H]` pages each head fills."""
    page_size = integer(page_size, "page_size", 1)
    return -(-np.array(profile.stored_tokens(seq_len, rollback), dtype=np.int64) // page_size)
