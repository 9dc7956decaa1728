#!/usr/bin/env python3
"""Coverage-guided fuzzing of one target: `python tests/fuzz/run_atheris.py TARGET [seconds]`; `all` takes each in turn.

Needs atheris (`pip install atheris`; wheels for Linux and macOS). Findings end with a traceback and exit status 1, and the
input is left in a file named crash-... in the working folder. `targets.py` says what is a finding.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def fuzz(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["redknot_hf"]):
        import targets

    corpus = Path(tempfile.mkdtemp(prefix=f"redknot-corpus-{name}-"))
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=4096",
        "-max_len=20000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], targets.TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    name, seconds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60
    if name != "all":
        fuzz(name, seconds)  # ends the process
        return 0
    import targets

    # One process each: libFuzzer ends its process when the time is over.
    return max(subprocess.call([sys.executable, __file__, target, str(seconds)]) for target in targets.TARGETS)


if __name__ == "__main__":
    sys.exit(main())
