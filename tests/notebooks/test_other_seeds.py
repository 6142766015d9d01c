"""`tools.other_seeds`: every seed is another, and the cards of both runs stand side by side."""

import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mini.lab.claims import cards
from tools import other_seeds
from tools.chapters import execute, tidy

DRAW = """
import random, torch
torch.manual_seed(3)
print(torch.rand(1).item(), torch.rand(1, generator=torch.Generator().manual_seed(3)).item())
print(random.Random("cards").random(), random.Random(3).random())
"""
CELLS = """
import random
from mini.lab import claim
x = random.Random(0).random()
claim("A draw is large", source="this test", measured=x, holds=x > 0.8, verdict="reproduced")
claim("Two is even", source="arithmetic", measured="0 left", holds=True, verdict="derived")
"""


def drawn(**more: str) -> list[str]:
    return subprocess.check_output([sys.executable, "-c", DRAW], env=os.environ | more, text=True).split()


def test_every_seed_is_shifted_and_the_run_repeats():
    shift = {"PYTHONPATH": str(other_seeds.HERE / "shifted")}
    plain, shifted = drawn(), drawn(**shift)
    assert shifted == drawn(**shift)
    assert all(a != b for a, b in zip(plain, shifted, strict=True))
    assert shifted[0] == shifted[1], "both seeds of PyTorch move by the same"


@pytest.fixture
def one_chapter(tmp_path, monkeypatch):
    for name in ("SOLUTIONS", "KEPT"):
        monkeypatch.setattr(other_seeds, name, tmp_path / name)
    monkeypatch.setattr(other_seeds, "REPORT", tmp_path / "report.md")
    (tmp_path / "SOLUTIONS").mkdir()
    stops = "assert x > 0.8, 'small'"
    nb = new_notebook(cells=[new_markdown_cell("# One"), new_code_cell(CELLS), new_code_cell(stops)])
    nbformat.write(execute(tidy(nb), tmp_path, strict=False), tmp_path / "SOLUTIONS" / "00_one.ipynb")
    return tmp_path


def test_a_verdict_that_flips_is_told(one_chapter):
    other_seeds.start(one_chapter / "SOLUTIONS" / "00_one.ipynb")
    other = nbformat.read(one_chapter / "KEPT" / "00_one.ipynb", as_version=4)
    assert [card["holds"] for card in cards(other)] == [False, True]
    text = other_seeds.report()
    assert "2 cards, 1 with the same verdict" in text
    assert "| A draw is large | 0.8444 |" in text
    assert "**reproduced; at other seeds: did not hold**" in text
    assert "Two is even" not in text
    assert "- stopped: `assert x > 0.8, 'small'`: AssertionError: small" in text
