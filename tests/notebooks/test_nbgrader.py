"""solutions/ works as nbgrader's source folder: its own commands release a chapter and grade copies of it."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbgrader.api import Gradebook

from tools.chapters import SOLUTIONS, derive, read, tidy, write

FIRST = sorted(SOLUTIONS.glob("00_*.ipynb"))


def nbgrader(course: Path, *command: str) -> None:
    """One of nbgrader's own commands, with nothing configured but the time that a cell may take."""
    path = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader starts `alembic` by name
    )
    env = {k: v for k, v in os.environ.items() if k != "MINI_STRICT"} | {
        "PATH": path,
        "MINI_HOME": str(course / "home"),
    }
    call = [sys.executable, "-m", "nbgrader", *command, "--Execute.timeout=300"]
    result = subprocess.run(call, cwd=course, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def submit(course: Path, student: str, nb: NotebookNode) -> None:
    path = course / "submitted" / student / "first" / "chapter.ipynb"
    path.parent.mkdir(parents=True)
    write(path, nb)


def fill(released: NotebookNode, source: NotebookNode) -> NotebookNode:
    """The released notebook with the answers of the source."""
    nb = copy.deepcopy(released)
    answers = {
        c.metadata.nbgrader.grade_id: c.source
        for c in source.cells
        if c.metadata.get("nbgrader", {}).get("solution")
    }
    for cell in nb.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = answers[cell.metadata.nbgrader.grade_id]
    return nb


def points(course: Path, student: str) -> tuple[float, float]:
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        submission = gradebook.find_submission("first", student)
        return submission.score, submission.max_score


def grade(
    course: Path, source: NotebookNode, wrong: dict[str, str] | None = None
) -> dict[str, tuple[float, float]]:
    """Release the source with nbgrader, hand in copies, grade them: student -> (points, most points)."""
    write(course / "source" / "first" / "chapter.ipynb", source)
    nbgrader(course, "generate_assignment", "first")
    released = nbformat.read(course / "release" / "first" / "chapter.ipynb", as_version=4)
    assert released.cells == derive(source).cells
    submit(course, "untouched", released)
    submit(course, "filled", fill(released, source))
    if wrong:
        nb = fill(released, source)
        for cell in nb.cells:
            cell.source = wrong.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
        submit(course, "mistaken", nb)
    nbgrader(course, "autograde", "first")
    return {folder.name: points(course, folder.name) for folder in (course / "submitted").iterdir()}


@pytest.fixture
def course(tmp_path):
    (tmp_path / "source" / "first").mkdir(parents=True)
    yield tmp_path
    shutil.rmtree(tmp_path)  # the kernels' files and the gradebook are not worth keeping


def test_sample_is_graded(course, solved):
    wrong = {"ex-99-1": "def mean_square(x):\n    return (x * x).sum()"}
    assert grade(course, tidy(solved), wrong) == {"filled": (2, 2), "untouched": (0, 2), "mistaken": (0, 2)}


@pytest.mark.parametrize("path", FIRST, ids=lambda path: path.stem)
def test_first_chapter_is_graded(course, path):
    source = tidy(read(path))
    most = sum(cell.metadata.get("nbgrader", {}).get("points", 0) for cell in source.cells)
    assert most > 0
    assert grade(course, source) == {"filled": (most, most), "untouched": (0, most)}
