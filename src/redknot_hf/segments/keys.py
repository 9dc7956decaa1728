"""What a stored segment is called: a hash of everything its KV depends on.

Two segments may share a key only if their cached keys and values are interchangeable. That takes the weights, the
rotary embedding, the header the segment was captured behind, the dtype, the head profile (it decides which rows of a
local head were kept) and the tokens themselves. The position is *not* part of the key: moving a segment is what
relocation is for.

This module does not know what an entry holds or where it is kept: see `codec` and `stores`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import struct
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from redknot_hf.errors import RedKnotError, UnsupportedModel, shorten

if TYPE_CHECKING:
    from redknot_hf.segments.rope import RopeSignature

__all__ = ["SegmentKey", "hash_fields", "key_hex", "model_fingerprint"]

_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KEY_DOMAIN = "redknot-hf/segment-key/1"
_MODEL_DOMAIN = "redknot-hf/model-fingerprint/1"


def hash_fields(domain: str, fields: Iterable[bytes]) -> str:
    """Hash a list of byte strings so that no two different lists give the same input to the hash.

    Args:
        domain: what the hash is for, with a version; hashes of different domains never meet.
        fields: the byte strings. Each is preceded by its length, so `[b"ab", b"c"]` and `[b"a", b"bc"]` differ.

    Returns:
        64 lower-case hex digits (BLAKE2b, 32 bytes).
    """
    digest = hashlib.blake2b(digest_size=32)
    for field in (domain.encode(), *fields):
        digest.update(struct.pack("<Q", len(field)))
        digest.update(field)
    return digest.hexdigest()


def key_hex(key: SegmentKey | str) -> str:
    """The 64 hex digits of a key, checked. Stores build file names from it, so nothing else may pass.

    Raises:
        RedKnotError: for a string that is not exactly 64 lower-case hex digits (`../` cannot get through), or another
        type.
    """
    if isinstance(key, SegmentKey):
        return key.hex
    if isinstance(key, str) and _HEX.fullmatch(key):
        return key
    raise RedKnotError(f"key must be a SegmentKey or its 64 lower-case hex digits, got {shorten(key)}")


@dataclasses.dataclass(frozen=True)
class SegmentKey:
    """Everything a segment's KV depends on, and its hash.

    Attributes:
        model: `model_fingerprint` of the weights.
        rope: digest of the `RopeSignature`.
        header_ids: tokens the segment was captured behind (BOS, system prompt); empty for none.
        dtype: dtype of the cached tensors, e.g. `"bfloat16"`; `"bfloat16/int8"` for those kept in int8.
        profile: id of the head profile the entry was made for; empty if every row of every head is stored.
        token_ids: the segment's own tokens.
        contexts: digest of the texts between header and segment over which the entry is the mean; empty for none.
    """

    model: str
    rope: str
    header_ids: tuple[int, ...]
    dtype: str
    profile: str
    token_ids: tuple[int, ...]
    contexts: str = ""

    @classmethod
    def of(
        cls,
        *,
        model: str,
        rope: RopeSignature | str,
        token_ids: Iterable[int] | torch.Tensor,
        header_ids: Iterable[int] | torch.Tensor = (),
        dtype: torch.dtype | str = "bfloat16",
        profile: str = "",
        kv_dtype: torch.dtype | None = None,
    ) -> SegmentKey:
        """Build a key; tensors and lists of ids, torch dtypes and signatures are brought to their canonical form.

        ``kv_dtype`` is what the entry is kept in if that is not ``dtype``; `quantised` then tells.

        Raises:
            RedKnotError: if there are no tokens or an id does not fit in 64 bits.
        """
        tokens = _id_tuple("token_ids", token_ids)
        if not tokens:
            raise RedKnotError("token_ids is empty: a segment has at least one token")
        return cls(
            model=model,
            rope=rope if isinstance(rope, str) else rope.digest,
            header_ids=_id_tuple("header_ids", header_ids),
            dtype="/".join(str(d).removeprefix("torch.") for d in (dtype, kv_dtype) if d is not None),
            profile=profile,
            token_ids=tokens,
        )

    @property
    def quantised(self) -> bool:
        """Whether the entry is kept in fewer bits than the model computes it in."""
        return "/" in self.dtype

    @functools.cached_property
    def hex(self) -> str:
        """The key as 64 hex digits: the entry's name in every store."""
        return hash_fields(
            _KEY_DOMAIN,
            (
                self.model.encode(),
                self.rope.encode(),
                struct.pack(f"<{len(self.header_ids)}q", *self.header_ids),
                self.dtype.encode(),
                self.profile.encode(),
                struct.pack(f"<{len(self.token_ids)}q", *self.token_ids),
                *([self.contexts.encode()] if self.contexts else []),
            ),
        )

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """The segment's own tokens, int64: building a prompt from tuples takes milliseconds."""
        return np.array(self.token_ids, np.int64)

    def __str__(self) -> str:
        return self.hex


def _id_tuple(name: str, ids: Iterable[int] | torch.Tensor) -> tuple[int, ...]:
    if isinstance(ids, torch.Tensor):
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.dtype.is_floating_point:
            raise RedKnotError(
                f"{name} must be one row of token ids, got a {ids.dtype} tensor of shape {tuple(ids.shape)}"
            )
        ids = ids.tolist()
    result = tuple(int(i) for i in ids)
    if any(not -(2**63) <= i < 2**63 for i in result):
        raise RedKnotError(f"{name} holds an id that does not fit in 64 bits")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Which weights a model has
# ---------------------------------------------------------------------------------------------------------------------

# Config entries that change neither weights nor keys and values: where the model came from and how it is run.
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "output_attentions", "output_hidden_states"}
_BLOCKS = 64
_COLUMNS = 61  # a prime, so that no power-of-two row length hides a swap of rows

_cache: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()


def model_fingerprint(model: torch.nn.Module, *, refresh: bool = False) -> str:
    """A hash of a model's configuration and of every byte of its weights, equal on every device.

    The bits of each tensor, seen as 64-bit integers, are summed with wrap-around in 64 blocks and in 61 interleaved
    columns. Integer sums do not depend on the order of addition, so CPU and GPU agree; any changed weight changes two
    of them, and so do exchanged rows. Costs two passes over the weights (milliseconds on a GPU), then it is kept with
    the model.

    Args:
        model: any transformers model with its weights in memory. A tensor-parallel rank gets the fingerprint of its own
            shard, as it should: it holds other heads than its neighbours.
        refresh: compute again. Needed only after a change that autograd's version counters do not see, such as
            writing through `parameter.data`; replaced, moved or optimised weights are noticed without it.

    Returns:
        64 hex digits.

    Raises:
        UnsupportedModel: if weights are offloaded (on the meta device), because they cannot be read here.
    """
    token = _weights_token(model)
    cached = _cache.get(model)
    if cached is not None and cached[0] == token and not refresh:
        return cached[1]
    fields = [_canonical_config(model), _adapter_state(model)]
    for name, tensor in _weights(model):
        fields += [name.encode(), str((tuple(tensor.shape), tensor.dtype)).encode(), _sums(name, tensor)]
    result = hash_fields(_MODEL_DOMAIN, fields)
    _cache[model] = (token, result)
    return result


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name, each storage once (tied weights share one)."""
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _weights_token(model: torch.nn.Module) -> str:
    """Changes when weights are replaced, moved or written to in place; costs no pass over them."""
    parts = []
    for name, tensor in _weights(model):
        version = -1 if tensor.is_inference() else tensor._version
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        pointer = 0 if local.is_meta else local.data_ptr()
        parts.append(f"{name}:{version}:{pointer}")
    return hash_fields(_MODEL_DOMAIN, ["\n".join(parts).encode(), _adapter_state(model)])


def _adapter_state(model: torch.nn.Module) -> bytes:
    """Switches of adapter libraries that change the result without touching a weight."""
    switches = ("_active_adapter", "_disable_adapters", "merged_adapters")
    found = [
        f"{name}.{switch}={getattr(module, switch)!r}"
        for name, module in model.named_modules()
        for switch in switches
        if switch in vars(module)
    ]
    return "\n".join(found).encode()


def _canonical_config(model: torch.nn.Module) -> bytes:
    config = getattr(model, "config", None)
    if config is None:
        return b""
    as_dict = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return json.dumps(_strip(as_dict), sort_keys=True, default=str, separators=(",", ":")).encode()


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strip(v) for k, v in value.items() if str(k) not in _VOLATILE and not str(k).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_strip(v) for v in value]
    return value


@torch.no_grad()
def _sums(name: str, tensor: torch.Tensor) -> bytes:
    """Wrap-around int64 sums of the tensor's bits: 64 blocks, 61 interleaved columns, and what is left over."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.is_meta:
        raise UnsupportedModel(
            f"model: the weight {name} is offloaded and cannot be read, so its segments cannot be told from "
            "another model's; load the model without disk or CPU offload to use a segment store"
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    words = raw[: raw.numel() // 8 * 8].view(torch.int64)
    blocks = words[: words.numel() // _BLOCKS * _BLOCKS].view(_BLOCKS, -1).sum(1)
    columns = words[: words.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS).sum(0)
    rest = raw[words.numel() // _BLOCKS * _BLOCKS * 8 :].sum(dtype=torch.int64)
    sums = [*blocks.tolist(), *columns.tolist(), rest.item()]
    return struct.pack(f"<{len(sums)}q", *sums)
