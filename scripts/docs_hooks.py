"""What mkdocs does to the pages of docs/ on the way (`hooks:` in mkdocs.yml): fills in the list of errors, hides set-up.

Pages stay readable where they lie; only what must be made from the source is made here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import docs_errors

ERRORS = "<!-- every error -->"
_HIDDEN = re.compile(r"^<!-- run\n.*?^-->\n", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for every page: set-up of the tests goes, the list of errors comes."""
    return _HIDDEN.sub("", markdown).replace(ERRORS, docs_errors.render())
