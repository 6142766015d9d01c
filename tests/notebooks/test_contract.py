"""Every notebook keeps to the contract; and each rule of the contract is shown to bite."""

import copy
import functools

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mini.lab.claims import MIME
from tests.notebooks import contract
from tools import chapters
from tools.chapters import CHAPTERS, SOLUTIONS, WIDGET

read = functools.cache(chapters.read)
NOTEBOOKS = sorted(SOLUTIONS.glob("*.ipynb")) + sorted(CHAPTERS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("rule", contract.RULES, ids=lambda rule: rule.__name__)
def test_notebook_keeps_to(rule, path):
    assert list(rule(read(path), path.parent == SOLUTIONS)) == []


@pytest.mark.parametrize("rule", contract.RULES, ids=lambda rule: rule.__name__)
def test_the_sample_keeps_to(rule, solved, unsolved):
    assert list(rule(solved, True)) == []
    assert list(rule(unsolved, False)) == []


def cell_with(nb: NotebookNode, text: str) -> NotebookNode:
    return next(cell for cell in nb.cells if text in cell.source)


def figure_of(nb: NotebookNode) -> NotebookNode:
    return next(o for o in contract.outputs(nb) if "image/png" in o.get("data", {}))


def exercise(nb: NotebookNode) -> NotebookNode:
    return next(cell for cell in nb.cells if contract.graded(cell, "solution"))


def check_cell(nb: NotebookNode) -> NotebookNode:
    return next(cell for cell in nb.cells if contract.graded(cell, "grade"))


def swap(nb: NotebookNode, i: int, j: int) -> None:
    nb.cells[i], nb.cells[j] = nb.cells[j], nb.cells[i]


def replace(cell: NotebookNode, old: str, new: str) -> None:
    assert old in cell.source
    cell.source = cell.source.replace(old, new)


def add_output(nb: NotebookNode, output: NotebookNode) -> None:
    contract.code(nb)[0].outputs.append(output)


def without_calls(nb: NotebookNode, name: str) -> None:
    nb.cells = [cell for cell in nb.cells if f"{name}(" not in cell.source]


def plain(text: str) -> NotebookNode:
    return new_output("display_data", {"text/plain": text})


BROKEN = {
    "another kernel": (contract.kernel, lambda nb: nb.metadata.kernelspec.update(name="conda-env")),
    "a Python version": (contract.kernel, lambda nb: nb.metadata.language_info.update(version="3.12.1")),
    "jupytext's metadata": (contract.kernel, lambda nb: nb.metadata.update(jupytext={})),
    "repeated ids": (contract.cells, lambda nb: nb.cells[1].update(id=nb.cells[0].id)),
    "timings": (contract.cells, lambda nb: nb.cells[1].metadata.update(execution={})),
    "a misspelt tag": (contract.cells, lambda nb: nb.cells[1].metadata.update(tags=["nbval-ignore"])),
    "no title": (contract.title, lambda nb: nb.cells.pop(0)),
    "a long cell": (contract.length, lambda nb: nb.cells.append(new_code_cell("1\n" * 26))),
    "long cells": (contract.length, lambda nb: nb.cells.extend(new_code_cell("1\n" * 9) for _ in range(9))),
    "no exercise": (contract.exercises, lambda nb: nb.cells.remove(exercise(nb))),
    "no check": (contract.exercises, lambda nb: nb.cells.remove(check_cell(nb))),
    "check before exercise": (
        contract.exercises,
        lambda nb: swap(nb, nb.cells.index(exercise(nb)), nb.cells.index(check_cell(nb))),
    ),
    "code between": (
        contract.exercises,
        lambda nb: nb.cells.insert(nb.cells.index(check_cell(nb)), new_code_cell("1")),
    ),
    "no hint": (contract.exercises, lambda nb: replace(cell_with(nb, "<details>"), "<details>", "")),
    "a wrong number": (contract.exercises, lambda nb: replace(check_cell(nb), '"99.1"', '"99.2"')),
    "other points": (contract.exercises, lambda nb: check_cell(nb).metadata.nbgrader.update(points=3)),
    "another chapter's": (
        contract.exercises,
        lambda nb: exercise(nb).metadata.nbgrader.update(grade_id="ex-98-1"),
    ),
    "no mistakes": (contract.exercises, lambda nb: replace(check_cell(nb), "mistakes=", "mistake=")),
    "no solution": (contract.exercises, lambda nb: replace(exercise(nb), "### BEGIN SOLUTION", "")),
    "a failed check": (contract.exercises, lambda nb: check_cell(nb).outputs[0].update(text="✗ 99.1")),
    "an absolute path": (contract.paths, lambda nb: nb.cells.append(new_code_cell("open('/home/me/x')"))),
    "a path in an output": (contract.paths, lambda nb: add_output(nb, plain("saved to /Users/me/x"))),
    "a Windows path": (contract.paths, lambda nb: add_output(nb, plain(r"C:\Users\me"))),
    "a download": (contract.network, lambda nb: nb.cells.append(new_code_cell("import requests"))),
    "an install": (contract.network, lambda nb: nb.cells.append(new_code_cell("%pip install x"))),
    "a remote picture": (
        contract.network,
        lambda nb: nb.cells.append(new_markdown_cell("![x](https://a.b/c.png)")),
    ),
    "prices": (
        contract.dollars,
        lambda nb: nb.cells.append(new_markdown_cell("from $5 M for one to $500 M")),
    ),
    "a price": (contract.dollars, lambda nb: nb.cells.append(new_markdown_cell("it was $5 M"))),
    "no alt": (contract.figures, lambda nb: figure_of(nb).metadata.clear()),
    "a bare figure": (
        contract.figures,
        lambda nb: figure_of(nb).data.update({"text/plain": "<Figure size 1>"}),
    ),
    "no figure": (
        contract.figures,
        lambda nb: [o.data.pop("image/png", 0) for o in contract.outputs(nb) if "data" in o],
    ),
    "a late figure": (
        contract.figures,
        lambda nb: [nb.cells.insert(1, new_code_cell("1")) for _ in range(6)],
    ),
    "an error": (
        contract.clean,
        lambda nb: add_output(nb, new_output("error", ename="E", evalue="", traceback=[])),
    ),
    "a warning": (
        contract.clean,
        lambda nb: add_output(nb, new_output("stream", name="stderr", text="Warning")),
    ),
    "a widget": (contract.clean, lambda nb: add_output(nb, new_output("display_data", {WIDGET: {}}))),
    "an address": (contract.clean, lambda nb: add_output(nb, plain("<Thing at 0x7f9a8b7c6d50>"))),
    "not run": (contract.run, lambda nb: contract.code(nb)[0].update(execution_count=None)),
    "out of order": (contract.run, lambda nb: contract.code(nb)[0].update(execution_count=9)),
    "edited after the run": (contract.run, lambda nb: nb.cells[0].update(source="# 99 · Another")),
    "too large": (contract.size, lambda nb: add_output(nb, plain("x" * 1_000_000))),
    "nothing to play with": (contract.play, lambda nb: without_calls(nb, "explore")),
    "no prediction": (contract.play, lambda nb: without_calls(nb, "predict")),
    "no recall": (contract.play, lambda nb: without_calls(nb, "recall")),
    "no claim": (contract.claims, lambda nb: without_calls(nb, "claim")),
    "a claim that fails": (
        contract.claims,
        lambda nb: (
            next(o for o in contract.outputs(nb) if MIME in o.get("data", {})).data[MIME].update(holds=False)
        ),
    ),
    "a compared recall": (contract.measured, lambda nb: cell_with(nb, 'recall("').metadata.pop("tags")),
    "no assertion": (
        contract.measured,
        lambda nb: nb.cells.append(new_code_cell("print(1)", metadata={"tags": ["nbval-ignore-output"]})),
    ),
}


@pytest.mark.parametrize(("rule", "spoil"), BROKEN.values(), ids=BROKEN)
def test_a_broken_notebook_is_refused(rule, spoil, solved):
    nb = copy.deepcopy(solved)
    spoil(nb)
    assert list(rule(nb, True)) != []


def test_every_rule_is_broken_once():
    assert {rule for rule, _ in BROKEN.values()} == set(contract.RULES)


@pytest.mark.parametrize(
    "text",
    [
        r"\$5 M for one, \$500 M",
        "$O(n^2)$ and $$\\frac{a}{b} \\text{ if it holds}$$",
        "`$a` and `$b for it$`",
        "$a b$",
    ],
)
def test_mathematics_and_escaped_prices_pass(text):
    assert list(contract.dollars(new_notebook(cells=[new_markdown_cell(text)]), True)) == []


def test_a_solution_left_in_a_chapter_is_refused(solved, unsolved):
    assert any("not a stub" in problem for problem in contract.exercises(solved, False))
    assert any("no solution" in problem for problem in contract.exercises(unsolved, True))
