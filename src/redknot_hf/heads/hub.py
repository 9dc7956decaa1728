"""Profiles on the Hugging Face Hub: one repository holds `head_profile.json`, a card and a picture of the head map."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, ProfileError, shorten

if TYPE_CHECKING:
    from .profile import HeadProfile

__all__ = ["card", "pull", "push"]


def pull(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """Download one file of a model repository, or find it in the local Hub cache.

    Raises:
        ProfileError: no such repository, file or revision, no access, or no network and nothing cached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except Exception as error:  # the Hub client raises a dozen unrelated types, down to plain OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {shorten(revision)}" if revision else ""
        raise ProfileError(
            f"no head profile {repo_id!r}: no such file, no shipped profile of that name, and the Hub did not give "
            f"{filename}{at} ({reason})"
        ) from None


def push(
    profile: HeadProfile,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload head profile",
) -> str:
    """Create the repository if needed and upload profile, card and picture in one commit.

    Args:
        profile: what to upload.
        repo_id: "owner/name" of a model repository.
        private: for a repository created now.
        token: Hub token; default the one `hf auth login` stored.
        revision: branch to commit to.
        commit_message: title of the commit.

    Returns:
        URL of the commit.

    Raises:
        ProfileError: the profile is invalid or the Hub refused.
    """
    from huggingface_hub import HfApi

    from .sources import FILE_NAME

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        profile.save(directory / FILE_NAME)
        with contextlib.suppress(MissingExtraError):  # the picture is a courtesy; the card then does without
            profile.plot(directory / "head_map.png")
        has_picture = (directory / "head_map.png").exists()
        (directory / "README.md").write_text(card(profile, repo_id, has_picture), encoding="utf-8")
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=directory, commit_message=commit_message, revision=revision
            )
        except Exception as error:  # as in pull
            raise ProfileError(f"the Hub refused the upload to {shorten(repo_id)}: {error}") from None
    return str(commit.commit_url if hasattr(commit, "commit_url") else commit)


def card(profile: HeadProfile, repo_id: str, has_picture: bool = True) -> str:
    """The repository's README.md."""
    meta: dict[str, Any] = profile.metadata
    model = str(meta.get("model") or "unknown model")
    lines = ["---", "library_name: redknot-hf", "tags:", "- redknot", "- head-profile", "- kv-cache"]
    if "/" in model:
        lines += ["base_model:", f"- {model}"]
    if meta.get("license"):
        lines += [f"license: {meta['license']}"]
    counts = ", ".join(f"{n} {name}" for name in _classes() if (n := profile.count(name)))
    lines += [
        "---",
        "",
        f"# Head profile for {model}",
        "",
        f"{profile.num_layers} layers x {profile.num_kv_heads} KV heads: {counts}.",
        "Local heads keep a few first tokens and a recent window, every other head keeps all tokens.",
        "",
        "```python",
        "import redknot_hf",
        "from redknot_hf import RedKnotCache",
        "",
        f'cache = RedKnotCache(model.config, profile="{repo_id}")',
        "out = model.generate(**inputs, past_key_values=cache)",
        "```",
        "",
    ]
    if has_picture:
        lines += ["![head map](head_map.png)", ""]
    if meta.get("head_dim"):
        lines += ["| tokens | KV bytes (bf16, pages of 64) | of a dense cache |", "|---|---|---|"]
        for tokens in (4096, 32768, 131072):
            ours, dense = profile.kv_bytes(tokens), profile.dense_kv_bytes(tokens)
            lines += [f"| {tokens} | {ours / 2**20:.1f} MiB | {100 * ours / dense:.1f} % |"]
        lines += [""]
    provenance = [
        key for key in ("method", "source", "revision", "date", "seed", "budget") if meta.get(key) is not None
    ]
    if provenance:
        lines += ["## Provenance", "", *[f"- {key}: {meta[key]}" for key in provenance], ""]
    if isinstance(meta.get("validation"), dict) and meta["validation"]:
        lines += ["## Validation", "", *[f"- {key}: {value}" for key, value in meta["validation"].items()], ""]
    return "\n".join(lines)


def _classes() -> tuple[str, ...]:
    from .profile import HEAD_CLASSES

    return HEAD_CLASSES
