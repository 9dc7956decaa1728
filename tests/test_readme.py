"""The README's Python code runs as it is printed, on a local copy of the model it names."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(smollm2_path, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2_path.as_posix())
        exec(compile(code, README.name, "exec"), names)
    printed = capsys.readouterr().out
    assert "The three primary colours are" in printed
    assert f"{names['cache'].memory_report().live:,} bytes" in printed
