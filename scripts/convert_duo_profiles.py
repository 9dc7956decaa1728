"""Make the shipped profiles from DuoAttention's published gates.

    python scripts/convert_duo_profiles.py --data DIR [--out src/redknot_hf/heads/profiles] [--check]

DIR holds `duo_attention/<model>/<experiment>/{full_attention_heads.tsv,config.json}`: the folder `attn_patterns` of
https://github.com/mit-han-lab/duo-attention (MIT licence), commit fe93c314ae87. What is taken over are facts: which
gate value the authors measured for which head. The map follows what their paper evaluates on models with grouped KV
heads: half of the heads keep all tokens (`sparsity=0.5`); the gates stay in the file, so any other share can be chosen
    later.

`--check` writes nothing and fails if a shipped file differs from what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from redknot_hf.heads import HeadProfile
from redknot_hf.heads.codec import to_text

COMMIT = "fe93c314ae87"
SPARSITY = 0.5

# Folder of the gates -> Hub id, other ids of the same weights, and the head_dim their file does not hold.
MODELS = {
    "Meta-Llama-3.1-8B-Instruct": (
        "meta-llama/Llama-3.1-8B-Instruct",
        ["meta-llama/Meta-Llama-3.1-8B-Instruct"],
        128,
    ),
    "Mistral-7B-Instruct-v0.2": ("mistralai/Mistral-7B-Instruct-v0.2", [], 128),
    "Mistral-7B-Instruct-v0.3": ("mistralai/Mistral-7B-Instruct-v0.3", [], 128),
}


def convert(directory: Path, name: str) -> HeadProfile:
    """The shipped profile of one model from the one experiment published for it."""
    experiments = sorted((directory / "duo_attention" / name).glob("*/full_attention_heads.tsv"))
    if len(experiments) != 1:
        raise SystemExit(
            f"expected one experiment below {directory / 'duo_attention' / name}, found {len(experiments)}"
        )
    profile = HeadProfile.import_from(experiments[0].parent, "duo_attention", sparsity=SPARSITY)
    model, aliases, head_dim = MODELS[name]
    profile.metadata = {
        "model": model,
        **({"model_aliases": aliases} if aliases else {}),
        "head_dim": head_dim,
        **{key: value for key, value in profile.metadata.items() if key not in ("model", "scores", "source")},
        "source": f"https://github.com/mit-han-lab/duo-attention at {COMMIT}, attn_patterns/{name}; "
        "Xiao et al., DuoAttention, arXiv 2410.10819; MIT licence, copyright 2024 MIT HAN Lab",
        "notes": "Gates optimised by the DuoAttention authors; quality was not measured here.",
        "scores": profile.metadata["scores"],
    }
    return profile


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds duo_attention/")
    parser.add_argument("--out", type=Path, default=Path("src/redknot_hf/heads/profiles"))
    parser.add_argument("--check", action="store_true", help="compare with the files in --out instead of writing")
    args = parser.parse_args()
    stale = 0
    for name in MODELS:
        text = to_text(convert(args.data, name))
        target = args.out / f"{name}.json"
        if args.check:
            same = target.is_file() and target.read_text(encoding="utf-8") == text
            stale += not same
            print(f"{target}: {'same' if same else 'differs'}")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            print(f"{target}: {len(text)} bytes")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
