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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RedKnotError, shorten
from .heads.balance import balance_heads, lower_bound
from .heads.model_shape import model_shape
from .heads.profile import HeadProfile
from .heads.selection import integer

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_CONTEXTS", "HeadPlacement", "place_heads"]

DEFAULT_CONTEXTS = (4096, 16384, 65536, 131072)
"""Context lengths balanced together: heads with different windows weigh differently at each."""

_MARK = "_redknot_head_permutation"


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
        """The profile in the new order: for a cache of the relabelled model, never for the original one."""
        placed = copy.deepcopy(self.source)
        for name in ("head_class", "sink", "window"):
            setattr(placed, name, [self._reorder(row, l) for l, row in enumerate(getattr(self.source, name))])
        for key, matrix in placed.metadata.get("scores", {}).items():
            placed.metadata["scores"][key] = [self._reorder(row, l) for l, row in enumerate(matrix)]
        placed.metadata["placement"] = {"world_size": self.world_size, "permutation": copy.deepcopy(self.permutation)}
        placed.validate()
        return placed

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
        weight per head dimension stay. Use `placement.profile` with the model from then on.

        Args:
            model: not yet sharded, quantised or wrapped in adapters.

        Raises:
            RedKnotError: another shape, an attention structure that is not understood (named), or a model relabelled
                before. Nothing is changed then.
        """
        import torch

        config = model.config
        self.source.validate_for(config)
        if getattr(model, _MARK, None) is not None:
            raise RedKnotError("this model's heads were relabelled before; load it again to use another placement")
        modules = _attention_modules(model, self.source)
        shape = model_shape(config)
        plans = {}
        for layer, module in modules.items():
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            plans[layer] = (tensors, self._plan(tensors, layer, shape.num_attention_heads, f"layer {layer}"))
        with torch.no_grad():
            for tensors, plan in plans.values():
                for name, (dim, index) in plan.items():
                    tensor = tensors[name]
                    tensor.copy_(tensor.index_select(dim, torch.tensor(index, device=tensor.device)))
        setattr(model, _MARK, copy.deepcopy(self.permutation))

    def apply_to_state_dict(self, state_dict: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The same relabelling for a checkpoint.

        Args:
            state_dict: names as `model.state_dict()` gives them, e.g. "model.layers.0.self_attn.q_proj.weight".
            config: the model's transformers config.

        Returns:
            A new dictionary; tensors that do not change are shared with the input.

        Raises:
            RedKnotError: as `apply_to_model`; also when attention layers are missing, as in one shard of a checkpoint.
        """
        import torch

        self.source.validate_for(config)
        groups: dict[int, dict[str, str]] = {}
        prefixes: dict[int, str] = {}
        for key in state_dict:
            match = re.fullmatch(r"((?:.*\.)?layers\.(\d+)\.(?:self_attn|attn|attention|self_attention)\.)(.+)", key)
            if match:
                layer = int(match[2])
                if prefixes.setdefault(layer, match[1]) != match[1]:
                    raise RedKnotError(f"two attention modules have layer {layer}: {prefixes[layer]} and {match[1]}")
                groups.setdefault(layer, {})[match[3]] = key
        _check_layers(set(groups), self.source, "the state dict")
        heads = model_shape(config).num_attention_heads
        result = dict(state_dict)
        for layer, names in groups.items():
            tensors = {name: state_dict[key] for name, key in names.items()}
            for name, (dim, index) in self._plan(tensors, layer, heads, prefixes[layer] + "*").items():
                tensor = tensors[name]
                result[names[name]] = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
        return result

    # ---------------------------------------------------------------- private

    def _reorder(self, row: Sequence[Any], layer: int) -> list[Any]:
        return [row[head] for head in self.permutation[layer]]

    def _pages_per_rank(self, seq_len: int, page_size: int, rollback: int = 0) -> list[int]:
        pages = _pages(self.source, seq_len, page_size, rollback)
        placed = np.take_along_axis(pages, np.array(self.permutation), axis=1)
        ranks = self.world_size // self.replicas
        per_rank = placed.reshape(len(placed), ranks, -1).sum(axis=(0, 2))
        return [int(count) for count in np.repeat(per_rank, self.replicas)]

    def _plan(
        self, tensors: Mapping[str, Any], layer: int, query_heads: int, where: str
    ) -> dict[str, tuple[int, list[int]]]:
        """For every tensor of an attention module that changes: the dimension and the new order along it."""
        order = self.permutation[layer]
        kv_heads = len(order)
        group = query_heads // kv_heads
        query_order = [head * group + i for head in order for i in range(group)]
        width = _rows_per_head(tensors, query_heads, kv_heads)
        plan: dict[str, tuple[int, list[int]]] = {}
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            if type(tensor).__name__ == "DTensor":
                raise RedKnotError(f"{where}: {name} is sharded already; relabel the heads before sharding the model")
            # Packed integers hide the head dimension: rows may divide by the heads and still not be heads.
            plain = tensor.is_floating_point()
            found = _classify(name, shape, query_heads, kv_heads, width) if plain else None
            if found is None:
                raise RedKnotError(
                    f"{where}: cannot relabel heads, because {name} of shape {list(shape)} and {tensor.dtype} is not "
                    "understood "
                    "(quantised weights, adapters and attention variants with further parameters are not supported)"
                )
            dim, parts = found
            index: list[int] = []
            start = 0
            for kind, size in parts:
                heads = query_order if kind == "q" else order
                index += [start + head * size + i for head in heads for i in range(size)]
                start += size * len(heads)
            if parts:
                plan[name] = (dim, index)
        missing = [n for n in ("q_proj", "k_proj", "v_proj") if f"{n}.weight" not in tensors]
        if "qkv_proj.weight" in tensors:
            missing = []
        if not any(f"{n}.weight" in tensors for n in _OUTPUT):
            missing.append("o_proj")
        if missing:
            raise RedKnotError(f"{where}: cannot relabel heads, because it has no {', '.join(missing)}")
        return plan


_OUTPUT = ("o_proj", "out_proj", "dense")


def _rows_per_head(tensors: Mapping[str, Any], query_heads: int, kv_heads: int) -> dict[str, int]:
    """Rows of the query and key projection per head; 0 where there is no such projection."""

    def rows(name: str, heads: int) -> int:
        weight = tensors.get(f"{name}.weight")
        return 0 if weight is None or not weight.shape else weight.shape[0] // heads

    fused = rows("qkv_proj", query_heads + 2 * kv_heads)
    return {"q": rows("q_proj", query_heads) or fused, "kv": rows("k_proj", kv_heads) or fused}


def _classify(
    name: str, shape: tuple[int, ...], query_heads: int, kv_heads: int, width: Mapping[str, int]
) -> tuple[int, list[tuple[str, int]]] | None:
    """How a tensor depends on the heads: (dimension, [(kind, elements per head)...]); no parts means it does not.

    None when it is not understood. Projections are head-major: all rows of head 0, then of head 1 (a gated query
    projection has twice the rows per head, still head-major).
    """
    owner, _, leaf = name.rpartition(".")
    heads = {"q_proj": query_heads, "k_proj": kv_heads, "v_proj": kv_heads}.get(owner)
    if leaf in ("weight", "bias") and len(shape) == (2 if leaf == "weight" else 1):
        if heads is not None and shape[0] % heads == 0:
            return 0, [("q" if owner == "q_proj" else "kv", shape[0] // heads)]
        if owner == "qkv_proj" and shape[0] % (query_heads + 2 * kv_heads) == 0:
            size = shape[0] // (query_heads + 2 * kv_heads)
            return 0, [("q", size), ("kv", size), ("kv", size)]
        if owner in _OUTPUT and leaf == "weight" and shape[1] % query_heads == 0:
            return 1, [("q", shape[1] // query_heads)]
        if owner in _OUTPUT and leaf == "bias":
            return 0, []
    if name == "sinks" and shape == (query_heads,):
        return 0, [("q", 1)]
    if owner in ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "v_norm") and leaf in ("weight", "bias"):
        kind = "q" if owner.startswith("q") else "kv"
        return _classify_norm(shape, kind, query_heads if kind == "q" else kv_heads, width[kind])
    return None


def _classify_norm(
    shape: tuple[int, ...], kind: str, heads: int, width: int
) -> tuple[int, list[tuple[str, int]]] | None:
    if len(shape) == 2 and shape[0] == heads:  # a row per head
        return 0, [(kind, 1)]
    if len(shape) != 1:
        return None
    if shape[0] == heads * width:  # over all heads at once: a mean of squares does not mind the order, the weight does
        return 0, [(kind, width)]
    return (0, []) if shape[0] <= width else None  # one weight per head dimension, the same for all heads


def _attention_modules(model: torch.nn.Module, profile: HeadProfile) -> dict[int, torch.nn.Module]:
    """Attention modules by layer, found by their projections and `layer_idx`."""
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        has_projection = any(hasattr(module, projection) for projection in ("q_proj", "qkv_proj", "k_proj"))
        if not isinstance(layer, int) or not has_projection:
            continue
        if layer in found:
            raise RedKnotError(f"two attention modules have layer_idx {layer} ({name} is the second); not supported")
        found[layer] = module
    _check_layers(set(found), profile, f"the model {type(model).__name__}")
    return found


def _check_layers(found: set[int], profile: HeadProfile, what: str) -> None:
    expected = set(profile.attention_layers)
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise RedKnotError(
            f"cannot relabel heads: {what} shows q/k/v/o projections in {len(found)} layers, the profile has "
            f"{len(expected)} attention layers (missing {shorten(missing)}, unexpected {shorten(extra)})"
        )


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
        profile: of the model in its original order.
        world_size: ranks. Either divides the number of KV heads, or is a multiple of it: then every KV head is held by
            `world_size / num_kv_heads` ranks (the runtime must replicate KV heads; transformers' own tensor parallelism
            does not).
        contexts: lengths in tokens to balance together.
        page_size: tokens per page.

    Raises:
        RedKnotError: world_size neither divides the number of KV heads nor is a multiple of it.
    """
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
