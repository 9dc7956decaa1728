"""The dense reference of tests/core and the verdicts of benchmarks/families serve here, too."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "core"), str(ROOT / "benchmarks" / "families")]
