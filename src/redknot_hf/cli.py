"""The `redknot` command: finds the subcommand, runs it, and turns what went wrong into one line and an exit status.

Exit status: 0 success; 1 the subcommand's own "no"; 2 a mistake in the command line, a file or a model name; 130
interrupted; 141 the reader of our output went away. Everything else is a defect and ends in a traceback.

This module knows the subcommands only by the protocol in `commands/__init__.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import commands
from .errors import RedKnotError

__all__ = ["build_parser", "main"]

_DESCRIPTION = """\
Head-aware KV caching for Hugging Face transformers: a few heads of a model keep every token, the others keep the first
tokens and a recent window.

New here? `redknot demo` fetches a small model and answers a question about a long document twice, with the ordinary
cache and with RedKnotCache, and shows memory and time of both.
"""

_EPILOG = """\
`redknot COMMAND --help` explains one command. Set REDKNOT_DEBUG=1 to see the traceback behind an error line.
"""


class _Parser(argparse.ArgumentParser):
    """Lets a command put in what may be left out of its arguments, before they are read."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments = list(sys.argv[1:] if args is None else args)
        if arguments and arguments[0] in commands.available():
            complete = getattr(commands.load(arguments[0]), "complete", list)
            arguments[1:] = complete(arguments[1:])
        return super().parse_known_args(arguments, namespace)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        only: import and declare this one subcommand (None: all of them, which `--help` needs).
    """
    parser = _Parser(
        prog="redknot", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"redknot-hf {_version()}")
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    for name in commands.available() if only is None else [only]:
        module = commands.load(name)
        subparser = subparsers.add_parser(
            module.NAME,
            help=module.HELP,
            description=getattr(module, "DESCRIPTION", module.HELP),
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments after the program's name; None takes them from the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: from argparse, for `--help`, `--version` and a command line it cannot read.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # The common case needs one subcommand's imports, not seven.
        only = arguments[0] if arguments and arguments[0] in commands.available() else None
        parser = build_parser(only)
        args = parser.parse_args(arguments)
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        status = args.run(args)
        # A reader that went away shows up here at the latest, not in the interpreter's shutdown.
        sys.stdout.flush()
        return int(status or 0)
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; give it something that can be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nredknot: interrupted", file=sys.stderr)
        return 130
    except (RedKnotError, OSError) as error:
        if os.environ.get("REDKNOT_DEBUG"):
            raise
        print(f"redknot: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _version() -> str:
    try:
        return importlib.metadata.version("redknot-hf")
    except importlib.metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
