#!/usr/bin/env python3
"""Make the project's virtual environment: the first step of `make demo` and `make test`.

    python3 scripts/bootstrap.py [--venv .venv] [--extra demo]

Creates the environment with a Python >= 3.10, installs a torch that fits the machine, then the project (editable) with
the named extra. A stamp file in the environment records what was installed for which pyproject.toml, so a second run
does nothing. Standard library only, and no syntax newer than Python 3.6: the `python3` that starts this may be old.

Environment variables:
    REDKNOT_PYTHON  interpreter for the environment (default: a suitable one from PATH, 3.11 and 3.12 first)
    REDKNOT_TORCH   what pip installs for torch, e.g. "torch==2.11.0 --index-url URL"; "none" leaves it to the project's
                    dependencies. Default: `torch` with an NVIDIA GPU, else a CPU build.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)
# Every torch in the supported range has wheels for these two; the newest Python often has to wait for them.
PREFERRED = ("python3.11", "python3.12", "python3.13", "python3.10", "python3.14", "python3", "python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Where the CPU index cannot be reached: a version known to work, from whatever index pip is set up with.
FALLBACK_TORCH = "torch==2.13.0"
STAMP = "redknot-stamp.json"


def say(text):
    print("bootstrap: " + text, flush=True)


def run(command):
    """Run a command with its output (pip's progress bars) on the terminal; its exit status ends the script."""
    say(" ".join(command))
    status = subprocess.call(command, cwd=ROOT)
    if status != 0:
        sys.exit("bootstrap: error: that command ended with status %d; nothing is marked as installed" % status)


def answers(command, timeout=30):
    """What a command prints, or None if it fails, hangs or does not exist."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=timeout
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def python_version(interpreter):
    """(major, minor) of an interpreter that can make virtual environments, else None.

    Debian's python3 lacks ensurepip until python3-venv is installed, and version managers leave shims that only print
    an error, so the interpreter is asked rather than believed.
    """
    text = answers([interpreter, "-c", "import sys, venv, ensurepip; print('%d %d' % sys.version_info[:2])"])
    try:
        return tuple(int(part) for part in text.split())
    except (AttributeError, ValueError):
        return None


def choose_python():
    named = os.environ.get("REDKNOT_PYTHON")
    if named:
        version = python_version(named)
        if version is None or version < OLDEST:
            sys.exit("bootstrap: error: REDKNOT_PYTHON is %r; expected a Python >= 3.10 with venv" % named)
        return named, version
    for name in PREFERRED:
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK) and not os.path.isdir(path):
                version = python_version(path)
                if version is not None and version >= OLDEST:
                    return path, version
    sys.exit(
        "bootstrap: error: no Python >= 3.10 with the venv module on PATH; install one (Debian, Ubuntu: "
        "apt-get install python3 python3-venv) or name one in REDKNOT_PYTHON"
    )


def has_gpu():
    return shutil.which("nvidia-smi") is not None and bool(answers(["nvidia-smi", "-L"]))


def torch_choice():
    """'given: ...', 'gpu' or 'cpu': what decides the torch build, without asking the network."""
    given = os.environ.get("REDKNOT_TORCH")
    if given:
        return "given: " + given
    return "gpu" if has_gpu() else "cpu"


def torch_arguments(choice):
    """pip's arguments for torch; an empty list leaves it to the project's dependencies."""
    if choice.startswith("given: "):
        given = choice[len("given: ") :]
        return [] if given == "none" else shlex.split(given)
    if choice == "gpu":
        return ["torch"]
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return ["torch"]  # the package index has only CPU builds for these machines
    try:
        urllib.request.urlopen(CPU_INDEX + "/torch/", timeout=5).close()
    except (OSError, ValueError):
        say("the index of CPU builds cannot be reached; taking %s from pip's own index" % FALLBACK_TORCH)
        return [FALLBACK_TORCH]
    return ["torch", "--index-url", CPU_INDEX]


def fingerprint(version, torch):
    digest = hashlib.sha256()
    for part in (os.path.join(ROOT, "pyproject.toml"), os.path.abspath(__file__)):
        with open(part, "rb") as file:
            digest.update(file.read())
    digest.update(repr((ROOT, tuple(version), torch)).encode())
    return digest.hexdigest()


def read_stamp(path):
    try:
        with open(path) as file:
            stamp = json.load(file)
        return {"key": str(stamp["key"]), "extras": list(stamp["extras"]), "python": tuple(stamp["python"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_stamp(path, stamp):
    with open(path + ".new", "w") as file:
        json.dump(stamp, file)
    os.replace(path + ".new", path)


def main():
    parser = argparse.ArgumentParser(description="Make the project's virtual environment.")
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="folder of the environment")
    parser.add_argument("--extra", default="demo", help="extra of redknot-hf to install: demo, dev, docs, ...")
    arguments = parser.parse_args()
    venv = os.path.abspath(arguments.venv)
    python = os.path.join(venv, "Scripts" if os.name == "nt" else "bin", "python")
    stamp_path = os.path.join(venv, STAMP)
    torch = torch_choice()

    stamp = read_stamp(stamp_path)
    # Moving or deleting the interpreter breaks an environment without touching its stamp.
    if stamp is not None and answers([python, "-c", "print(1)"]) is None:
        stamp = None
    if stamp is not None and stamp["key"] == fingerprint(stamp["python"], torch):
        if arguments.extra in stamp["extras"]:
            return
    else:
        base, version = choose_python()
        extras = [] if stamp is None else stamp["extras"]
        if answers([python, "-m", "pip", "--version"]) is None or python_version(python) != version:
            say("making %s with %s (Python %d.%d)" % ((venv, base) + version))
            run([base, "-m", "venv", "--clear", venv])
            extras = []
        elif os.path.exists(stamp_path):
            os.remove(stamp_path)  # until this run is through, the environment is not known to be whole
        wanted = torch_arguments(torch)
        if wanted:
            run([python, "-m", "pip", "install", "--disable-pip-version-check"] + wanted)
        stamp = {"key": fingerprint(version, torch), "extras": extras, "python": version}

    # Extras of an earlier run come along: their requirements may have changed with pyproject.toml.
    extras = sorted(set(stamp["extras"]) | {arguments.extra})
    target = "%s[%s]" % (ROOT, ",".join(extras))
    run([python, "-m", "pip", "install", "--disable-pip-version-check", "--editable", target])
    write_stamp(stamp_path, {"key": stamp["key"], "extras": extras, "python": list(stamp["python"])})
    say("ready: %s with the extra%s %s" % (venv, "s" if len(extras) > 1 else "", ", ".join(extras)))


if __name__ == "__main__":
    main()
