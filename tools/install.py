"""Make .venv and install the course into it, once: `python tools/install.py lab` (or `test`).

Uses nothing but the standard library, and syntax that an old Python can read, so that an old Python gets a
clear sentence instead of a SyntaxError. Safe to repeat, and after an interrupt: a finished installation
leaves a stamp with a digest of what it was made from; an unfinished one leaves a mark and is made afresh.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
UNFINISHED = os.path.join(VENV, "unfinished-installation")
OLDEST, NEWEST = (3, 11), (3, 13)
CONTAINED_IN = {"lab": ("lab", "test"), "test": ("test",)}  # who has `test` has `lab`


def objection(version, has_venv):
    """Why this Python cannot be used, in a sentence with the fix; "" when it can.

    version: (major, minor, ...); has_venv: whether the modules venv and ensurepip are there.
    """
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        age = "old" if tuple(version[:2]) < OLDEST else "new"
        return (
            "Python %s is too %s: this course needs Python 3.11, 3.12 or 3.13.\n"
            "Install one of them (python.org, or your system's package manager), then name it: "
            "make lab PYTHON=python3.12" % (".".join(map(str, version[:3])), age)
        )
    if not has_venv:
        return (
            "This Python lacks its own `venv` module, which Debian and Ubuntu package apart.\n"
            "Install it: sudo apt install python3-venv"
        )
    return ""


def digest(version):
    """What an installation is made from: the dependencies, their versions, the place, and the Python."""
    made_from = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            made_from.update(file.read())
    made_from.update(repr((ROOT, tuple(version))).encode())
    return made_from.hexdigest()


def venv_python():
    return os.path.join(VENV, *(["Scripts", "python.exe"] if os.name == "nt" else ["bin", "python"]))


def version_of(python):
    """(major, minor) of the interpreter at this path if it runs and has pip, else None."""
    command = [python, "-c", "import pip, sys; print(*sys.version_info[:2])"]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(part) for part in answer.stdout.split())


def stamp(extra):
    return os.path.join(VENV, "installed-" + extra)


def is_installed(extra, version):
    """Whether a finished installation holds this extra, made from today's files."""
    for name in CONTAINED_IN[extra]:
        try:
            with open(stamp(name)) as file:
                if file.read() == digest(version):
                    return True
        except OSError:
            continue
    return False


def say(text):
    print("· " + text, flush=True)


def make_venv():
    say("Making .venv with Python %d.%d" % sys.version_info[:2])
    shutil.rmtree(VENV, ignore_errors=True)
    base = getattr(sys, "_base_executable", sys.executable)  # this Python may be the one in .venv itself
    subprocess.run([base, "-m", "venv", VENV], check=True)


def install(extra, torch_index):
    """Run pip, whose own output shows the progress. An interrupt leaves the mark; a failure does not."""
    say("Installing the course with [%s] (the first time: about 1.5 GB, one to five minutes)" % extra)
    if sys.platform == "linux" and not torch_index and shutil.which("nvidia-smi") is None:
        say(
            "No NVIDIA GPU found. If pip starts to download a CUDA build of torch (gigabytes), "
            'stop it with Ctrl-C and see "A small torch on Linux" in docs/INSTALL.md'
        )
    command = [venv_python(), "-m", "pip", "install", "-e", ".[%s]" % extra, "-c", "constraints.txt"]
    command += ["--extra-index-url", torch_index] if torch_index else []
    command += ["--quiet"] if os.environ.get("CI") else []
    open(UNFINISHED, "w").close()
    code = subprocess.run(command, cwd=ROOT).returncode
    if code < 0:  # killed by a signal: packages may be half written
        sys.exit(1)
    os.remove(UNFINISHED)
    if code:
        sys.exit("pip could not install the course: see its message above, put it right, and repeat.")
    with open(stamp(extra), "w") as file:
        file.write(digest(version_of(venv_python())))


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Make .venv and install the course into it, once.")
    parser.add_argument("extra", choices=sorted(CONTAINED_IN), nargs="?", default="lab")
    parser.add_argument("--fits", action="store_true", help="exit with 0 if this Python can be used")
    parser.add_argument("--this-python", action="store_true", help="replace a .venv of another Python")
    parser.add_argument(
        "--torch-index", default="", help="address of PyTorch's CPU wheels, see docs/INSTALL.md"
    )
    options = parser.parse_args(arguments)

    has_venv = all(importlib.util.find_spec(name) is not None for name in ("venv", "ensurepip"))
    trouble = objection(sys.version_info, has_venv)
    if options.fits or trouble:
        sys.exit(trouble or 0)

    version = version_of(venv_python())
    interrupted = os.path.exists(UNFINISHED)
    usable = version is not None and not interrupted
    if options.this_python and version != sys.version_info[:2]:
        usable = False
    if usable and is_installed(options.extra, version):
        return
    started = time.time()
    if interrupted:
        say("The last installation was interrupted: starting afresh")
    if not usable:
        make_venv()
    install(options.extra, options.torch_index)
    say("Installed in %.0f s" % (time.time() - started))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Repeat the command to go on.")
