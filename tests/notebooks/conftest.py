from pathlib import Path

import jupytext
import pytest
from nbformat import NotebookNode

from tools.chapters import derive, execute, tidy

HERE = Path(__file__).parent


def graded(**values) -> dict:
    """nbgrader's metadata for a cell."""
    return {"schema_version": 3, "task": False, "locked": False, "grade": False, "solution": False, **values}


def read_sample() -> NotebookNode:
    """The sample chapter, not run; its short marks for exercise and check become nbgrader's metadata."""
    nb = jupytext.read(HERE / "sample.py")
    for cell in nb.cells:
        if number := cell.metadata.pop("exercise", None):
            cell.metadata.nbgrader = graded(solution=True, grade_id=f"ex-{number}")
        if number := cell.metadata.pop("check", None):
            cell.metadata.nbgrader = graded(grade=True, locked=True, points=2, grade_id=f"check-{number}")
    return tidy(nb)


@pytest.fixture(scope="session")
def solved() -> NotebookNode:
    """The sample chapter with its solutions, run strictly."""
    return execute(read_sample(), HERE, strict=True)


@pytest.fixture(scope="session")
def unsolved(solved) -> NotebookNode:
    """The sample chapter as a learner first meets it, run."""
    return execute(derive(solved), HERE, strict=False)
