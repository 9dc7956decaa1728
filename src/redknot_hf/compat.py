"""Every difference between the supported versions of transformers and torch, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version

OLDEST_TRANSFORMERS = Version("5.14")

if Version(transformers.__version__).release < OLDEST_TRANSFORMERS.release:
    raise ImportError(
        f"redknot-hf needs transformers >= {OLDEST_TRANSFORMERS}, found {transformers.__version__}: "
        "pip install -U transformers"
    )


def tokens_to_remove(argument: int, length: int) -> int:
    """What `Cache.crop`'s argument means: negative removes that many tokens; positive (until 5.19) is a target length."""
    return max(0, length - argument) if argument > 0 else -argument


def tensor_parallel(model: Any) -> tuple[int, int]:
    """(rank, world size) of the share of the KV heads that ``model`` feeds as it was loaded; (0, 1) without sharding."""
    size = getattr(model, "_tp_size", None) or 1
    if size == 1 or not _shards_keys(getattr(model, "_tp_plan", None) or {}):
        return 0, 1
    mesh = model._device_mesh
    names = mesh.mesh_dim_names or ()
    return (mesh["tp"] if "tp" in names else mesh).get_local_rank(), size


def config_tensor_parallel(config: Any) -> tuple[int, int]:
    """The same from a model's config, into which transformers writes the layout of a model that it shards.

    The ranks of one tensor-parallel group are neighbours: tensor parallelism is the last dimension of its mesh.
    """
    layout = getattr(config, "distributed_config", None)
    size = getattr(layout, "tp_size", None) or 1
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    plan, own = getattr(text, "base_model_tp_plan", None) or {}, getattr(layout, "tp_plan", None)
    if size == 1 or not _shards_keys({**plan, **own} if isinstance(own, Mapping) else plan):
        return 0, 1
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1  # the config was kept or copied: no sharded model can run in this process
    return torch.distributed.get_rank() % size, size


def _shards_keys(plan: Mapping[str, Any]) -> bool:
    """Whether a tensor-parallel plan leaves the key heads spread over the ranks. Some gather them again (phi3, olmo3)."""
    projections = ("k_proj", "qkv_proj", "query_key_value")
    return any(name.rsplit(".", 1)[-1] in projections and style == "colwise" for name, style in plan.items())


def shares_kv(config: Any, layers: list[Any]) -> bool:
    """Whether some layers attend over the keys of an earlier layer instead of their own (gemma3n, gemma4)."""
    modes = getattr(config, "kv_sharing_modes", None)
    return bool(
        getattr(config, "num_kv_shared_layers", 0)
        or (modes is not None and "reuse" in modes)
        or any(type(layer).__name__ == "DummyLayer" for layer in layers)
    )


_runs_sdpa: dict[type, bool] = {}


def runs_sdpa(config: Any) -> bool:
    """Whether transformers lets models with this config run under sdpa; True for configs it does not know."""
    kind = type(config)
    if kind not in _runs_sdpa:
        try:
            model = transformers.MODEL_MAPPING[kind]
        except (KeyError, AttributeError, ImportError):
            model = None
        model = model[0] if isinstance(model, (tuple, list)) else model
        _runs_sdpa[kind] = bool(getattr(model, "_supports_sdpa", True)) if model is not None else True
    return _runs_sdpa[kind]


def is_compiling() -> bool:
    return torch.compiler.is_compiling()


def passed_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments: ``past_key_values`` until 5.23, ``cache`` from 5.24 on."""
    found = arguments.get("past_key_values")
    return arguments.get("cache") if found is None else found


def can_switch_attention(config: Any) -> bool:
    """Whether transformers can run models with this config under a registered implementation; True where it is not known.

    Families from before the attention interface (Falcon, BLOOM, MPT, ...) choose between classes of their own. Falcon ends
    in ``KeyError: 'redknot'`` when it is loaded so; others keep their attention and only log.
    """
    kind = type(config)
    try:
        model = transformers.MODEL_MAPPING[kind]
        model = model[0] if isinstance(model, (tuple, list)) else model
        return bool(model._can_set_attn_implementation())
    except (KeyError, AttributeError, ImportError):
        return True
