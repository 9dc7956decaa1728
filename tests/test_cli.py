"""The `redknot` command: statuses, one-line errors, and what it lists. Subcommands have tests of their own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from redknot_hf import cli, commands
from redknot_hf.errors import RedKnotError


@pytest.fixture
def command(monkeypatch):
    """Make `redknot env` do what a test wants: `command(function)`."""

    def install(function):
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--number", type=int)

        module = SimpleNamespace(NAME="env", HELP="test", add_arguments=add_arguments, run=function)
        real = commands.load
        monkeypatch.setattr(commands, "load", lambda name: module if name == "env" else real(name))

    return install


def _raiser(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize("result, status", [(0, 0), (None, 0), (1, 1)])
def test_status_of_the_subcommand_is_the_exit_status(command, result, status):
    command(lambda args: result)
    assert cli.main(["env"]) == status


@pytest.mark.parametrize(
    "error, text",
    [
        (RedKnotError("window is 0;\n  expected an integer from 1"), "window is 0; expected an integer from 1"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (
            OSError("no-such-model is not a local folder\nand not a Hub id"),
            "no-such-model is not a local folder and not",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(command, capsys, monkeypatch, error, text):
    monkeypatch.delenv("REDKNOT_DEBUG", raising=False)
    command(_raiser(error))
    assert cli.main(["env"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"redknot: error: {text}") and err.count("\n") == 1


def test_debug_shows_the_traceback(command, monkeypatch):
    monkeypatch.setenv("REDKNOT_DEBUG", "1")
    command(_raiser(RedKnotError("bad")))
    with pytest.raises(RedKnotError):
        cli.main(["env"])


def test_a_defect_is_not_hidden(command):
    command(_raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


def test_interrupt_is_130(command, capsys):
    command(_raiser(KeyboardInterrupt()))
    assert cli.main(["env"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_no_command_prints_help_and_is_an_error(capsys):
    assert cli.main([]) == 2
    assert "redknot demo" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["no-such-command"], ["env", "--no-such-option"], ["env", "--number", "x"]])
def test_an_unreadable_command_line_is_status_2(command, arguments):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def test_help_lists_exactly_the_subcommands_that_exist(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    listed = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ") and line.strip()
    ]
    present = commands.available()
    assert {"demo", "env"} <= set(present)
    assert [word for word in listed if word in commands.NAMES] == present


def test_every_subcommand_keeps_the_protocol(capsys):
    for name in commands.available():
        module = commands.load(name)
        assert name == module.NAME
        assert "\n" not in module.HELP
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        assert f"usage: redknot {name}" in capsys.readouterr().out


def test_env_json_is_one_object_with_the_installed_versions(capsys):
    import torch
    import transformers

    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["transformers"] == transformers.__version__
    # torch adds what it was built for ("2.13.0+cu130"), which the wheels of the package index leave out of their name
    assert report["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["kernels"]["path"] == ("triton" if torch.cuda.is_available() else "torch")


def test_a_reader_that_goes_away_is_no_traceback():
    reader = "import sys; sys.exit(0)"
    writer = "from redknot_hf.cli import main; import sys; sys.exit(main(['env']))"
    with (
        subprocess.Popen([sys.executable, "-c", reader], stdin=subprocess.PIPE) as gone,
        subprocess.Popen([sys.executable, "-c", writer], stdout=gone.stdin, stderr=subprocess.PIPE) as process,
    ):
        gone.stdin.close()
        gone.wait()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 141
    assert b"Traceback" not in err and b"Exception ignored" not in err
