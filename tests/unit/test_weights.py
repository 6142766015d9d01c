"""`make weights` runs every chapter of a folder, in order, and stops at one that fails."""

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tools.weights import main


def notebook(folder, name, source):
    cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")


def test_all_chapters_are_run_in_order(tmp_path, capsys):
    for name in ("01_b", "00_a"):
        notebook(tmp_path, name, f"open('log', 'a').write('{name} ')")
    main(tmp_path)
    assert (tmp_path / "log").read_text() == "00_a 01_b "
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["00_a", "01_b"]


def test_a_chapter_that_fails_is_not_passed_over(tmp_path):
    notebook(tmp_path, "00_a", "1 / 0")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        main(tmp_path)
