"""Head maps of other projects as `HeadProfile`: one module per format, found by content.

| format | file | heads | module |
|---|---|---|---|
| `redknot` | head-class JSON of the authors' SGLang fork | KV | `import_redknot.py` |
| `duo_attention` | `full_attention_heads.tsv` with its `config.json`, or their directory | KV |
`import_duo_attention.py` | | `headkv` | JSON of retrieval-reasoning scores, plain or .gz | query | `import_headkv.py` |
| `minference` | best-pattern JSON | query | `import_minference.py` |

Files are data from strangers: whatever is in them, the result is a valid profile or a `ProfileError`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ProfileError, shorten
from . import import_duo_attention, import_headkv, import_minference, import_redknot
from .codec import FORMAT, from_document
from .profile import HeadProfile
from .strict_json import read_json

__all__ = ["FORMATS", "import_profile"]

FORMATS = ("redknot", "duo_attention", "headkv", "minference")

_JSON_FORMATS: dict[str, Any] = {
    "redknot": import_redknot,
    "headkv": import_headkv,
    "minference": import_minference,
}


def import_profile(path: str | os.PathLike[str], format: str = "auto", **options: Any) -> HeadProfile:
    """Read a foreign head map.

    Args:
        path: the file; for DuoAttention also the directory that holds its two files.
        format: "auto" looks at the content; otherwise one of `FORMATS`.
        **options: of the format's `convert` function:

            - `redknot`: `num_layers`, `attention_layers` (hybrids that do not list them)
            - `duo_attention`: `threshold` or `sparsity`, `sink`, `window`
            - `headkv`: `num_kv_heads` (required), `fraction`, `reduce`, `sink`, `window`
            - `minference`: `num_kv_heads` (required)

    Returns:
        The profile; `metadata["imported_from"]` records format, file and choices.

    Raises:
        ProfileError: not one of the formats, a map this project cannot express (named), a bad cell, a wrong option.
    """
    if format != "auto" and format not in FORMATS:
        raise ProfileError(f"format is {shorten(format)}; expected 'auto' or one of {', '.join(map(repr, FORMATS))}")
    location = Path(path)
    if format == "duo_attention" or (format == "auto" and import_duo_attention.recognises(location)):
        return _call(import_duo_attention.convert, "duo_attention", location, options)
    document = read_json(location)
    if format == "auto":
        if isinstance(document, dict) and document.get("format") == FORMAT:
            if options:
                raise ProfileError(f"{location.name} is a redknot-hf profile already; it takes no import options")
            return from_document(document, location.name)
        format = _recognise(document, location)
    profile = _call(_JSON_FORMATS[format].convert, format, document, options)
    profile.metadata["imported_from"] = {"format": format, "file": location.name, **profile.metadata["imported_from"]}
    return profile


def _recognise(document: Any, location: Path) -> str:
    for name, module in _JSON_FORMATS.items():
        if module.recognises(document):
            return name
    raise ProfileError(
        f"{shorten(str(location), 200)} is neither a redknot-hf profile nor one of the known head-map formats "
        f"({', '.join(FORMATS)}); pass format= to see what is missing"
    )


def _call(convert: Callable[..., HeadProfile], name: str, first: Any, options: dict[str, Any]) -> HeadProfile:
    known = list(inspect.signature(convert).parameters)[1:]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ProfileError(f"the format {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return convert(first, **options)
