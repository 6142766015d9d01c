"""Installing, starting, and the files around the package."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests import run
from tools import install
from tools.start import ROOT, choose, copy_chapters, lab_command, lab_environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


# --- installing


@pytest.mark.parametrize(
    ("version", "has_venv", "words"),
    [
        ((3, 10, 4), True, "Python 3.10.4 is too old"),
        ((3, 14, 0), True, "Python 3.14.0 is too new"),
        ((2, 7, 18), False, "too old"),
        ((3, 12, 0), False, "apt install python3-venv"),
        ((3, 11, 0), True, ""),
        ((3, 13, 9), True, ""),
    ],
)
def test_a_python_that_does_not_fit_is_told_why(version, has_venv, words):
    answer = install.objection(version, has_venv)
    assert words in answer
    assert bool(answer) == bool(words)


def test_the_supported_pythons_are_those_of_pyproject():
    supported = SpecifierSet(PROJECT["requires-python"])
    inside = [install.OLDEST, install.NEWEST]
    outside = [(3, install.OLDEST[1] - 1), (3, install.NEWEST[1] + 1)]
    assert all(f"{major}.{minor}" in supported for major, minor in inside)
    assert not any(f"{major}.{minor}" in supported for major, minor in outside)


def test_an_old_python_can_read_the_installer():
    ast.parse((ROOT / "tools" / "install.py").read_text(encoding="utf-8"), feature_version=(3, 5))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty course folder, and a record of what the installer would do in it."""
    done = []
    venv = tmp_path / ".venv"
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(name)

    def make_venv():
        shutil.rmtree(venv, ignore_errors=True)
        venv.mkdir()
        done.append("venv")

    def run_pip(command, **_):
        done.append("pip")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(install, "ROOT", str(tmp_path))
    monkeypatch.setattr(install, "VENV", str(venv))
    monkeypatch.setattr(install, "UNFINISHED", str(venv / "unfinished"))
    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(install, "version_of", lambda _: sys.version_info[:2] if venv.exists() else None)
    monkeypatch.setattr(install.subprocess, "run", run_pip)

    def act(*arguments):
        done.clear()
        install.main(list(arguments))
        return list(done)

    act.folder, act.venv = tmp_path, venv
    return act


def test_the_second_time_nothing_is_installed(house):
    assert house("lab") == ["venv", "pip"]
    assert house("lab") == []


def test_who_has_the_tests_has_the_lab_and_not_the_other_way_round(house):
    house("test")
    assert house("lab") == []
    shutil.rmtree(house.venv)
    house("lab")
    assert house("test") == ["pip"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_new_dependencies_are_installed(house, name):
    house("lab")
    (house.folder / name).write_text("newer")
    assert house("lab") == ["pip"]
    assert house("lab") == []


def test_an_interrupted_installation_is_made_afresh(house, monkeypatch, capsys):
    house("lab")
    (house.folder / "constraints.txt").write_text("newer")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            house("lab")
    assert house("lab") == ["venv", "pip"]
    assert "interrupted" in capsys.readouterr().out


def test_a_failed_pip_leaves_what_was_there(house, monkeypatch):
    house("lab")
    (house.folder / "constraints.txt").write_text("newer")
    with monkeypatch.context() as patch:
        patch.setattr(install.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
        with pytest.raises(SystemExit, match="pip could not install"):
            house("lab")
    assert house("lab") == ["pip"]


def test_another_python_is_used_when_it_is_named(house, monkeypatch):
    house("lab")
    monkeypatch.setattr(install, "version_of", lambda _: (3, 10))
    assert house("lab", "--this-python")[0] == "venv"


def test_the_address_of_torch_reaches_pip(house, monkeypatch):
    commands = []

    def run_pip(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(install.subprocess, "run", run_pip)
    house("lab", "--torch-index", "file:///wheels")
    assert commands[0][commands[0].index("--extra-index-url") + 1] == "file:///wheels"


# --- the Makefile, with pretended Pythons

make = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="no make on this machine")


def call_make(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess:
    environment = {"PATH": f"{path or folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin", "CI": "true"}
    command = ["make", "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def pretend(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@make
def test_make_takes_the_first_python_that_fits(tmp_path):
    for name in ("python3", "python3.13", "python3.11"):
        pretend(tmp_path / "bin" / name, "exit 1")
    pretend(tmp_path / "bin" / "python3.12", 'echo "3.12: $@"')
    pretend(tmp_path / ".venv" / "bin" / "python", 'echo "venv: $@"')
    answer = call_make(tmp_path, "lab", "CHAPTER=02", "LAB_ARGS=--no-browser")
    assert answer.stdout.splitlines() == [
        "3.12: tools/install.py lab --torch-index ",
        "venv: -m tools.start 02 --no-browser",
    ]


@make
def test_make_takes_the_python_that_is_named(tmp_path):
    for name in ("python3", "python3.13"):
        pretend(tmp_path / "bin" / name, f'echo "{name}: $@"')
    pretend(tmp_path / ".venv" / "bin" / "python", "true")
    answer = call_make(tmp_path, "lab", "PYTHON=python3.13", "TORCH_INDEX=there")
    assert answer.stdout.strip() == "python3.13: tools/install.py lab --this-python --torch-index there"


@make
def test_make_names_a_python_that_is_missing(tmp_path):
    answer = call_make(tmp_path, "lab", "PYTHON=python3.99")
    assert answer.returncode != 0
    assert "python3.99 was not found: this course needs Python 3.11, 3.12 or 3.13" in answer.stderr


@make
def test_make_stops_when_the_installation_fails(tmp_path):
    pretend(tmp_path / "bin" / "python3", 'case "$*" in *--fits*) exit 0;; esac; echo no; exit 3')
    pretend(tmp_path / ".venv" / "bin" / "python", "echo started")
    answer = call_make(tmp_path, "test")
    assert answer.returncode != 0
    assert "started" not in answer.stdout


# --- starting


@pytest.fixture
def course(tmp_path):
    chapters = tmp_path / "chapters"
    chapters.mkdir()
    for name in ("00_a.ipynb", "01_b.ipynb"):
        (chapters / name).write_text(f"new {name}")
    return tmp_path


def test_chapters_are_copied_once_and_never_over_a_learners_own(course):
    mine = course / "my"
    assert [path.name for path in copy_chapters(course / "chapters", mine)] == ["00_a.ipynb", "01_b.ipynb"]
    (mine / "00_a.ipynb").write_text("mine")
    (course / "chapters" / "02_c.ipynb").write_text("new")
    assert [path.name for path in copy_chapters(course / "chapters", mine)] == ["02_c.ipynb"]
    assert (mine / "00_a.ipynb").read_text() == "mine"
    assert (mine / "01_b.ipynb").read_text() == "new 01_b.ipynb"


def test_an_interrupted_copy_leaves_no_half_notebook(course, monkeypatch):
    def half(source, target):
        Path(target).write_text("ha")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", half)
        with pytest.raises(KeyboardInterrupt):
            copy_chapters(course / "chapters", course / "my")
    assert not list((course / "my").glob("[0-9]*"))
    assert len(copy_chapters(course / "chapters", course / "my")) == 2
    assert sorted(path.name for path in (course / "my").iterdir()) == ["00_a.ipynb", "01_b.ipynb"]


def test_a_folder_without_chapters_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebooks in"):
        copy_chapters(tmp_path, tmp_path / "my")


def test_the_chapter_to_open(course):
    copy_chapters(course / "chapters", course / "my")
    (course / "my" / "Untitled.ipynb").write_text("a learner's own")
    assert choose(course / "my").name == "00_a.ipynb"
    assert choose(course / "my", "1").name == choose(course / "my", "01").name == "01_b.ipynb"
    with pytest.raises(ValueError, match=r"there is no chapter 7 .* try one of 00, 01"):
        choose(course / "my", "7")


def test_lab_opens_on_the_notebook_with_the_courses_settings_first(tmp_path):
    command = lab_command(tmp_path / "00_a.ipynb", ["--no-browser"])
    assert f"--ServerApp.root_dir={tmp_path}" in command
    assert "--LabApp.default_url=/lab/tree/00_a.ipynb" in command
    assert command[-1] == "--no-browser"
    environment = lab_environment({"JUPYTER_CONFIG_PATH": "theirs", "PATH": "p", "X": "1"})
    first, second = environment["JUPYTER_CONFIG_PATH"].split(os.pathsep)
    assert (Path(first), second) == (ROOT / "tools" / "jupyter", "theirs")
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "p"]
    assert environment["X"] == "1"


def test_labs_settings_can_be_read():
    files = list((ROOT / "tools" / "jupyter").rglob("*.json"))
    assert files
    assert all(isinstance(json.loads(path.read_text(encoding="utf-8")), dict) for path in files)


# --- one list of dependencies


def test_conda_installs_what_pyproject_lists_and_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert python == f"python {PROJECT['requires-python']}"
    assert pip == "pip"
    constraints, itself = by_pip.pop("pip")
    assert not by_pip
    assert constraints == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", itself)[1].split(",")
    assert extras == ["lab", "test"]
    assert set(extras) <= set(EXTRAS)


@pytest.mark.parametrize(
    "line", [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
)
def test_constraints_hold_each_dependency_in_its_range(line):
    requirement = Requirement(line)
    if requirement.name == PROJECT["name"]:
        assert requirement.extras <= set(EXTRAS)
    else:
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_what_is_pinned_can_be_had_by_the_first_python_3_11():
    """Debian's is 3.11.2: pip does not see a version that wants a later one."""
    pinned = [d for d in distributions() if PINS.get(canonicalize_name(d.metadata["Name"])) == d.version]
    needs = {f"{d.metadata['Name']} {d.version}": d.metadata.get("Requires-Python") or "" for d in pinned}
    assert len(needs) > 100
    assert [name for name, python in needs.items() if not SpecifierSet(python).contains("3.11.0")] == []


def test_constraints_hold_what_the_dependencies_need_in_turn():
    here = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "python_version": "3.11"}
    here |= {"python_full_version": "3.11.9", "platform_machine": "x86_64", "implementation_name": "cpython"}
    todo, seen, missing = [(PROJECT["name"], frozenset(["test"]))], set(), []
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker and not any(marker.evaluate(here | {"extra": extra}) for extra in ("", *extras)):
                continue
            needed = canonicalize_name(requirement.name)
            todo.append((needed, frozenset(requirement.extras)))
            if needed not in PINS and needed != PROJECT["name"]:
                missing.append(f"{needed} (for {name})")
    gpu = re.compile("nvidia-|cuda-|triton|setuptools")  # of torch's CUDA build alone, which pins them itself
    assert [line for line in missing if not gpu.match(line)] == [], "run make constraints"


def test_constraints_are_exact_and_without_local_versions():
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in PINS.values())


# --- the tests' own runner


def test_stages_have_their_environment(monkeypatch):
    monkeypatch.setenv("MINI_STRICT", "1")
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert run.environment("solutions", "h")["MINI_STRICT"] == "1"
    chapters = run.environment("chapters", "h")
    assert chapters["MINI_HOME"] == "h"
    assert "MINI_STRICT" not in chapters
    assert "NBGRADER_EXECUTION" not in chapters


def test_every_stage_runs_and_any_failure_counts(monkeypatch, capsys):
    codes = iter([0, 1, 5, 0])
    called = []

    def pytest_run(command, **_):
        called.append(command[3])
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(run.subprocess, "run", pytest_run)
    assert run.main([]) == 1
    assert called == ["tests/unit", run.SOLUTIONS[0], "chapters", "tests/browser"]
    assert sorted(run.SOLUTIONS) == sorted(
        f"solutions/{path.name}" for path in (ROOT / "solutions").glob("*.ipynb")
    )
    assert re.findall(r"passed|FAILED|found no test", capsys.readouterr().out) == [
        "passed",
        "FAILED",
        "found no test",
        "passed",
    ]
    with pytest.raises(SystemExit):
        run.main(["everything"])


# --- style, imports, and what the documents point at


def test_code_and_notebooks_are_clean():
    answer = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
    ]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )


def test_modules_import_what_they_may():
    answer = lint_imports(ROOT)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("attention", "import mini.model"),
        ("model", "import mini.lab.check"),
        ("budget", "import matplotlib"),
        ("sample", "import transformers"),
        ("data", "import mini.budget"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, module, line):
    shutil.copytree(ROOT / "mini", tmp_path / "mini", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "mini" / f"{module}.py"
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    answer = lint_imports(tmp_path)
    assert answer.returncode != 0
    assert "BROKEN" in answer.stdout


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/INSTALL.md"])
def test_documents_name_what_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / name).parent / target).exists(), f"{name} points at {target}"
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for target in re.findall(r"`make ([a-z]+)", text) + re.findall(r"^make ([a-z]+)", text, re.M):
        assert target in targets, f"{name} names make {target}"


def test_the_map_of_chapters_is_true():
    """Each chapter that is here has its row with a link and its minutes; those to come have neither."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d) \| (.*?) \|.*\| *([\d.]*) \| *([\d.]*) \|$", text, re.M)
    assert [number for number, *_ in rows] == [f"{number:02d}" for number in range(16)]
    here = {path.name[:2]: path for path in (ROOT / "chapters").glob("*.ipynb")}
    for number, title, read, run_ in rows:
        if number not in here:
            assert (read, run_) == ("", ""), (
                f"README.md gives minutes for chapter {number}, which is not here"
            )
            continue
        assert f"(chapters/{here[number].name})" in title, f"README.md does not link to chapter {number}"
        first = "".join(json.loads(here[number].read_text(encoding="utf-8"))["cells"][0]["source"])
        assert re.search(rf"\b{read} minutes to read", first), (
            f"README.md: {read} minutes to read chapter {number}"
        )
        assert run_, f"README.md says nothing of the minutes that chapter {number} runs"


def test_symbols_stand_in_the_chapters_that_the_notation_names():
    """Each symbol of docs/NOTATION.md occurs in a formula of the chapter that is said to use it first."""

    def plain(formula: str) -> str:
        return re.sub(r"\s|\\[,;!]|[{}]", "", formula)

    formulas: dict[str, str] = {}
    for path in (ROOT / "solutions").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        found = re.findall(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$", text, re.S)
        formulas[path.name[:2]] = " ".join(plain(block or inline) for block, inline in found)
    text = (ROOT / "docs" / "NOTATION.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\$.*?) \| .* \| (\d\d) \|$", text, re.M)
    assert len(rows) > 100
    for symbols, chapter in rows:
        for symbol in re.findall(r"\$(.+?)\$", symbols):
            assert plain(symbol) in formulas[chapter], (
                f"docs/NOTATION.md: {symbol} is not in chapter {chapter}"
            )
