"""solutions/ works as nbgrader's source folder: its own commands release chapter 00 and grade copies of it."""

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


def grade(course: Path, source: NotebookNode) -> dict[str, tuple[float, float]]:
    """Release the source with nbgrader, hand in three copies, grade them: student -> (points, most points)."""
    write(course / "source" / "first" / "chapter.ipynb", source)
    nbgrader(course, "generate_assignment", "first")
    released = nbformat.read(course / "release" / "first" / "chapter.ipynb", as_version=4)
    assert released.cells == derive(source).cells
    mistaken = copy.deepcopy(released)
    for cell in mistaken.cells:
        cell.source = cell.source.replace("raise NotImplementedError()", "return None")
    for student, nb in (("untouched", released), ("mistaken", mistaken), ("filled", fill(released, source))):
        submit(course, student, nb)
    nbgrader(course, "autograde", "first")
    return {student: points(course, student) for student in ("untouched", "mistaken", "filled")}


@pytest.fixture
def course(tmp_path):
    (tmp_path / "source" / "first").mkdir(parents=True)
    yield tmp_path
    shutil.rmtree(tmp_path)  # the kernels' files and the gradebook are not worth keeping


def test_first_chapter_is_graded(course):
    source = tidy(read(next(SOLUTIONS.glob("00_*.ipynb"))))
    most = sum(cell.metadata.get("nbgrader", {}).get("points", 0) for cell in source.cells)
    assert most > 0
    assert grade(course, source) == {"untouched": (0, most), "mistaken": (0, most), "filled": (most, most)}
