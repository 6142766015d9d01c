"""chapters/, docs/CLAIMS.md and docs/images/ are what their tools make of solutions/; the tools do what they say."""

import copy

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from tests.notebooks.conftest import HERE, read_sample
from tools import chapters
from tools.chapters import CHAPTERS, SOLUTIONS, derive, execute, executed, read, tidy
from tools.claims import LEDGER, README, collect, counted
from tools.pictures import IMAGES, pictures

NAMES = sorted(path.name for path in SOLUTIONS.glob("*.ipynb"))


def sources(nb: nbformat.NotebookNode) -> list[dict]:
    """The cells without what running them adds."""
    cells = copy.deepcopy(nb.cells)
    for cell in cells:
        cell.pop("outputs", None), cell.pop("execution_count", None)
    return cells


def test_each_solution_has_its_chapter():
    assert NAMES
    assert sorted(path.name for path in CHAPTERS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_chapter_is_not_stale(name):
    assert sources(read(CHAPTERS / name)) == sources(derive(read(SOLUTIONS / name))), "run make chapters"


@pytest.mark.parametrize("name", NAMES)
def test_solution_is_tidy(name):
    assert read(SOLUTIONS / name) == tidy(read(SOLUTIONS / name)), "run make chapters"


def test_ledger_is_not_stale():
    assert LEDGER.read_text(encoding="utf-8") == collect(), "run make claims"


def test_the_count_of_claims_in_the_readme_is_not_stale():
    text = README.read_text(encoding="utf-8")
    assert counted(text, LEDGER.read_text(encoding="utf-8")) == text, "run make claims"


def test_pictures_are_not_stale():
    """Each is the stored figure, small, and stands in README.md with the figure's own text."""
    found, readme = pictures(), README.read_text(encoding="utf-8")
    assert sorted(path.name for path in IMAGES.iterdir()) == sorted(found)
    for name, (data, text) in found.items():
        assert (IMAGES / name).read_bytes() == data, "run make claims"
        assert len(data) < 120_000, f"{name} is too large for README.md"
        assert f'<img src="docs/images/{name}" width="440" alt="{text}">' in readme, (
            f"README.md: text of {name}"
        )


def test_running_again_gives_the_same_file(solved):
    again = execute(tidy(solved), HERE, strict=True)
    assert nbformat.writes(again) == nbformat.writes(solved)


def test_a_run_chapter_has_the_cells_that_deriving_gave(solved, unsolved):
    assert sources(unsolved) == sources(derive(solved))


def test_deriving_clears_outputs_and_solutions_and_keeps_ids_of_the_rest(solved):
    chapter = derive(solved)
    assert all(not cell.get("outputs") for cell in chapter.cells)
    changed = [
        cell for cell, was in zip(chapter.cells, solved.cells, strict=True) if cell.source != was.source
    ]
    assert [cell.metadata.nbgrader.grade_id for cell in changed] == ["ex-99-1"]
    assert [cell.id for cell in chapter.cells] == [cell.id for cell in solved.cells]
    assert "mini" in solved.metadata
    assert "mini" not in chapter.metadata


def test_an_edit_after_the_run_is_seen(solved):
    nb = copy.deepcopy(solved)
    assert executed(nb)
    nb.cells[3].source += "  # edited"
    assert not executed(nb)
    assert not executed(read_sample())


def test_equal_cells_get_different_ids_which_do_not_depend_on_their_place():
    one = tidy(new_notebook(cells=[new_code_cell("1"), new_code_cell("1"), new_code_cell("2")]))
    two = tidy(new_notebook(cells=[new_code_cell("2"), new_code_cell("1")]))
    assert len({cell.id for cell in one.cells}) == 3
    assert [two.cells[0].id, two.cells[1].id] == [one.cells[2].id, one.cells[0].id]


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of one small notebook, for the command itself."""
    monkeypatch.setattr(chapters, "SOLUTIONS", tmp_path / "solutions")
    monkeypatch.setattr(chapters, "CHAPTERS", tmp_path / "chapters")
    (tmp_path / "solutions").mkdir()
    nb = new_notebook(cells=[new_code_cell("import os; print(os.environ['MINI_STRICT'] or 'not strict')")])
    chapters.write(tmp_path / "solutions" / "00_small.ipynb", nb)
    return tmp_path


def test_command_runs_derives_and_skips_what_did_not_change(course, capsys):
    assert chapters.main([]) == 0
    said = [
        read(course / folder / "00_small.ipynb").cells[0].outputs[0].text
        for folder in ("solutions", "chapters")
    ]
    assert said == ["1\n", "not strict\n"]
    capsys.readouterr()
    assert chapters.main(["00", "--changed"]) == 0
    assert (
        capsys.readouterr().out == "solutions/00_small.ipynb: unchanged\nchapters/00_small.ipynb: unchanged\n"
    )
    with pytest.raises(SystemExit):
        chapters.main(["77"])


def test_command_leaves_a_notebook_that_stops_as_it_was(course, capsys):
    path = course / "solutions" / "00_small.ipynb"
    chapters.write(path, new_notebook(cells=[new_code_cell("1 / 0")]))
    before = path.read_bytes()
    assert chapters.main([]) == 1
    assert path.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (course / "chapters").exists()


def test_command_names_a_chapter_without_solution(course, capsys):
    (course / "chapters").mkdir()
    chapters.write(course / "chapters" / "07_lost.ipynb", new_notebook())
    assert chapters.main([]) == 1
    assert "07_lost.ipynb has no solution" in capsys.readouterr().err


def test_strict_run_stops_at_an_exercise_that_is_open(unsolved):
    with pytest.raises(CellExecutionError, match=r"99\.1 not attempted yet"):
        execute(tidy(unsolved), HERE, strict=True)
