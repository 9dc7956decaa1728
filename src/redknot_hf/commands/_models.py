"""Loading what MODEL names, for the commands that measure one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RedKnotError, shorten

if TYPE_CHECKING:
    from ..heads import HeadProfile


def choose_device(device: str | None, dtype: str | None) -> tuple[str, Any]:
    """(device, torch dtype): a CUDA GPU and bfloat16 where there is one, else the CPU and float32.

    Raises:
        RedKnotError: unknown or absent.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise RedKnotError(f"--dtype {shorten(name)}: expected float32, bfloat16 or float16")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RedKnotError(f"--device {shorten(device)}: {str(error).splitlines()[0]}") from None
    return device, getattr(torch, name)


def load_model(
    name: str | None,
    device: str | None,
    dtype: str | None,
    *,
    random_weights: bool = False,
    tokenizer: bool = True,
    revision: str | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or Hub id, with attn_implementation "redknot"; None: SmolLM2-135M-Instruct.

    Args:
        random_weights: the model is made from its config alone.
        tokenizer: load it, too; otherwise None is returned for it.

    Raises:
        RedKnotError: no such model, or the device or dtype is not there.
    """
    device, torch_dtype = choose_device(device, dtype)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import redknot_hf  # noqa: F401  # registers "redknot"

    if name is None:
        if random_weights:
            raise RedKnotError("--random-weights needs a MODEL to take the config from")
        from ..demo_model import get_demo_model

        return get_demo_model(torch_dtype, progress=progress, attn_implementation="redknot", device=device)
    options: dict[str, Any] = {"dtype": torch_dtype, "attn_implementation": "redknot"}
    try:
        words = AutoTokenizer.from_pretrained(name, revision=revision) if tokenizer else None
        if random_weights:
            config = AutoConfig.from_pretrained(name, revision=revision)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
    except RedKnotError:
        raise
    except (OSError, ValueError, KeyError) as error:  # whatever transformers raises for "no such model"
        raise RedKnotError(f"no model {shorten(name, 200)}: {str(error).strip().splitlines()[0]}") from None
    return model.to(device).eval(), words


def find_profile(given: str | None, config: Any, name: str | None) -> tuple[HeadProfile | None, str]:
    """(profile, where it is from): --profile, else the one shipped for the model, else None.

    A folder may be called anything. Where its name is no model's, the profile whose recorded architecture and attention
    settings (RoPE, windows, scale) are exactly the folder's is taken, and the source says so: weights of another training
    match, too. (A `RedKnotCache` without a profile goes by the name alone: it prints no source that a user could read.)
    """
    from ..heads import HeadProfile, find_shipped

    if given:
        profile = HeadProfile.load(given)
        profile.validate_for(config)
        return profile, given
    if name is None:
        from ..demo_model import MODEL_NAME

        shipped, source = HeadProfile.load(MODEL_NAME), f"shipped for {MODEL_NAME}"
    elif (found := find_shipped(config)) is not None:
        shipped, source = found, "shipped for this model"
    elif Path(name).is_dir() and (alike := _shipped_for_shape(config)) is not None:
        shipped, known = alike
        source = f"shipped for {known}, whose architecture the folder's config has"
    else:
        return None, "none"
    shipped.validate_for(config)
    return shipped, source


def _shipped_for_shape(config: Any) -> tuple[HeadProfile, str] | None:
    """The only shipped profile made for exactly this architecture, and its model's name; None if there are several."""
    from ..heads import HeadProfile, describe_config, shipped_names

    # a profile that does not say for which RoPE it was made is not found for a model that has one
    wanted = {"attention": None, **describe_config(config)}
    loaded = ((HeadProfile.load(name), name) for name in shipped_names())
    found = [
        (profile, name)
        for profile, name in loaded
        if all(profile.metadata.get(key) == wanted[key] for key in ("config_hash", "attention"))
    ]
    return found[0] if len(found) == 1 else None
