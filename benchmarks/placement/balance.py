"""How evenly KV bytes lie on tensor-parallel ranks, before and after `place_heads`, as a Markdown table.

    python benchmarks/placement/balance.py                                   # the shipped profiles
    python benchmarks/placement/balance.py --maps DIR/*.json                 # and head maps of other projects

The figure is the largest rank's KV bytes over the mean, the worst of 8192, 32768 and 131072 tokens; 1.00 is even. The
bound is what no order of the heads can improve on: with fewer global heads than ranks some rank has one and another none.
Bytes follow from the profile by `HeadPlacement.kv_bytes_per_rank`, page rounding included; no model is needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from redknot_hf.errors import RedKnotError
from redknot_hf.heads import HeadProfile, shipped_names
from redknot_hf.placement import HeadPlacement, place_heads

CONTEXTS = (8192, 32768, 131072)


def rows(name: str, profile: HeadProfile, ranks: list[int]) -> list[str]:
    """One line of the table per number of ranks that the heads divide by."""
    found = []
    for size in ranks:
        if profile.num_kv_heads % size and size % profile.num_kv_heads:
            continue
        begin = time.perf_counter()
        after = place_heads(profile, size)
        seconds = time.perf_counter() - begin
        before = HeadPlacement.contiguous(profile, size)
        imbalance = [max(placement.imbalance(n) for n in CONTEXTS) for placement in (before, after)]
        bound = max(after.lower_bound(n) for n in CONTEXTS)
        busiest = after.decode_tokens(131072) / before.decode_tokens(131072)
        shape = f"{profile.num_layers} x {profile.num_kv_heads}, {profile.count('global')} global"
        note = f" ({after.replicas} ranks per head)" if after.replicas > 1 else ""
        found.append(
            f"| {name} | {shape} | {size}{note} | {imbalance[0]:.3f} | {imbalance[1]:.3f} | {bound:.3f} | {busiest:.3f} | "
            f"{seconds:.2f} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="*", type=Path, default=[], help="head maps of other projects")
    parser.add_argument("--ranks", default="2,3,4,8")
    args = parser.parse_args()
    ranks = [int(size) for size in args.ranks.split(",")]
    print("| profile | layers x KV heads | ranks | before | after | bound | busiest rank's tokens, after/before | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in shipped_names():
        print("\n".join(rows(f"{name} (shipped)", HeadProfile.load(name), ranks)))
    for path in args.maps:
        try:
            profile = HeadProfile.import_from(path)
        except RedKnotError as error:
            print(f"{path.name}: left out, {error}", file=sys.stderr)
            continue
        print("\n".join(rows(path.stem, profile, ranks)))


if __name__ == "__main__":
    main()
