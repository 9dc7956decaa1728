"""Subcommands of `redknot`, one module each.

A module `commands/<name>.py` has

- `NAME`, the word on the command line, and `HELP`, one line for the list;
- `add_arguments(parser)`, which declares its options on an `argparse.ArgumentParser`;
- `run(args) -> int`, which does the work and returns the exit status;
- optionally `DESCRIPTION` and `EPILOG`, longer texts for `redknot <name> --help`;
- optionally `complete(arguments) -> list`, which puts in what may be left out of the arguments after the name.

Its imports at module level are light: `redknot --help` imports every one of them. What needs torch or transformers is
imported inside `run`. A mistake of the user is raised as `RedKnotError`; the command line prints it as one line.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

__all__ = ["NAMES", "available", "load"]

NAMES = ("demo", "profile", "show", "bench", "eval", "store", "env")
"""Subcommands in the order of `redknot --help`."""


def available() -> list[str]:
    """The subcommands this installation has."""
    return [name for name in NAMES if importlib.util.find_spec(f"{__name__}.{name}") is not None]


def load(name: str) -> ModuleType:
    """Import the module of one subcommand of `available()`."""
    return importlib.import_module(f"{__name__}.{name}")
