"""The bench's report: where its tables go. Speeds are not tested."""

import re

import pytest

from bench import report
from bench.report import MARKER, REPORT, method, setting, write


def test_tables_replace_what_stands_below_the_marker(tmp_path):
    path = tmp_path / "BENCH.md"
    path.write_text(f"# Speed\n\nmethod\n\n{MARKER}\n\nold\n", encoding="utf-8")
    for tables in ("\n## One\n\n| 1 × 2 |\n", "## Two\n"):
        write(path, tables)
        text = path.read_text(encoding="utf-8")
        assert text == f"# Speed\n\nmethod\n\n{MARKER}\n\n{tables.strip()}\n"


@pytest.mark.parametrize("text", ["no marker", f"{MARKER}\n{MARKER}\n"])
def test_a_report_without_one_marker_is_left_alone(tmp_path, text):
    path = tmp_path / "BENCH.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"BENCH\.md has [02] lines"):
        write(path, "tables")
    assert path.read_text(encoding="utf-8") == text


def test_setting_names_date_machine_versions_and_threads():
    text = setting(1, packages=("pytest",))
    assert re.fullmatch(
        r"- Date: \d{4}-\d\d-\d\d\n- Machine: \S.*, \d+ cores; .+\n"
        rf"- Versions: Python 3\.\S+, pytest {re.escape(pytest.__version__)}\n- Numbers: float32, 1 thread",
        text,
    )
    assert setting(2, packages=()).endswith("2 threads")


def test_a_run_of_all_parts_writes_and_a_run_of_some_does_not(tmp_path, monkeypatch, capsys):
    speed = pytest.importorskip("bench.speed")
    path = tmp_path / "BENCH.md"
    path.write_text(f"method\n\n{MARKER}\n\nold\n", encoding="utf-8")
    monkeypatch.setattr(speed, "REPORT", path)
    monkeypatch.setattr(speed, "PARTS", {"one": lambda: report.say("\n## One\n\n| 1 |")})
    speed.main(["one"])
    assert path.read_text(encoding="utf-8").endswith("\nold\n")
    with pytest.raises(SystemExit, match="no part 'two'"):
        speed.main(["two"])
    speed.main([])
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"method\n\n{MARKER}\n\n- Date: ")
    assert text.endswith("\n\n## One\n\n| 1 |\n")
    assert text.count("## One") == 1
    assert "| 1 |" in capsys.readouterr().out


def test_the_method_describes_every_part():
    speed = pytest.importorskip("bench.speed")
    assert re.findall(r"^\| `(\w+)` \|", method(REPORT), re.M) == list(speed.PARTS)
