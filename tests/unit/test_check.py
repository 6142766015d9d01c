"""Exercises: what passes, what each wrong answer is told, and that strict mode catches weak checks."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from mini.lab import CheckFailed, agree, check, progress

X = torch.tensor([1.0, 2.0, 4.0])
CASES = [(X,), (X * 3,)]


def mean_square(x):
    return (x * x).mean()


def stub(x):
    raise NotImplementedError()


@pytest.fixture(autouse=True)
def session(monkeypatch):
    """A kernel's session of its own, as a learner has it."""
    for name in ("MINI_STRICT", "NBGRADER_EXECUTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(check, "record", {})


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setenv("MINI_STRICT", "1")


def told(mine, reference, **kwargs) -> str:
    with pytest.raises(CheckFailed) as caught:
        agree(mine, reference, **kwargs)
    return str(caught.value)


# --- check


def test_passed_says_the_same_with_and_without_strict(capsys, monkeypatch):
    for value in ("", "1"):
        monkeypatch.setenv("MINI_STRICT", value)
        with check("1.2", points=2):
            agree(mean_square, mean_square, cases=CASES, mistakes={"a sum": lambda x: (x * x).sum()})
        assert capsys.readouterr().out == "✓ 1.2 passed, 2 points\n"


def test_not_attempted_is_one_line_and_goes_on(capsys):
    with check("1.2"):
        agree(stub, mean_square, cases=CASES)
    assert capsys.readouterr().out.startswith("○ 1.2 not attempted yet")


@pytest.mark.parametrize("name", ["MINI_STRICT", "NBGRADER_EXECUTION"])
def test_not_attempted_raises_for_graders(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(CheckFailed, match="not attempted"), check("1.2"):
        agree(stub, mean_square, cases=CASES)


def test_torchs_own_not_implemented_is_an_error_not_a_stub():
    class Empty(nn.Module):
        pass

    with pytest.raises(CheckFailed, match="missing the required"), check("1.2"):
        agree(Empty(), mean_square, cases=CASES)


def test_wrong_is_shown_without_frames():
    with pytest.raises(CheckFailed) as caught, check("1.2"):
        agree(lambda x: x, mean_square, cases=CASES)
    lines = caught.value._render_traceback_()
    assert lines[0] == "✗ 1.2 is not right yet."
    assert not any("File" in line or "Traceback" in line for line in lines)


def test_missing_name_is_told():
    with pytest.raises(CheckFailed, match="there is no `my_answer` yet"), check("1.2"):
        agree(my_answer, 3)


def test_plain_assertion_and_other_errors():
    with pytest.raises(CheckFailed, match="rows have to sum to 1"), check("1.2"):
        raise AssertionError("rows have to sum to 1")
    with pytest.raises(KeyError), check("1.2"):
        raise KeyError("x")


def test_progress(capsys):
    with check("1.1", points=2):
        agree(3, 3)
    with check("1.2", points=3):
        agree(stub, mean_square, cases=CASES)
    capsys.readouterr()
    progress()
    assert capsys.readouterr().out == "1 of 2 exercises, 2 of 5 points\nstill open: 1.2\n"
    with check("1.2", points=3):
        agree(mean_square, mean_square, cases=CASES)
    capsys.readouterr()
    progress()
    assert capsys.readouterr().out == "2 of 2 exercises, 5 of 5 points\n"


def test_a_later_failure_takes_the_points_back():
    with check("1.1"):
        agree(3, 3)
    with pytest.raises(CheckFailed), check("1.1"):
        agree(4, 3)
    assert check.record["1.1"] == (False, 1)


# --- agree: known mistakes


def test_known_mistake_is_named():
    mistakes = {"a sum": lambda x: (x * x).sum(), "the square of the mean": lambda x: x.mean() ** 2}
    text = told(lambda x: x.mean().square(), mean_square, cases=CASES, mistakes=mistakes)
    assert text == "This is a known mistake: the square of the mean."


def test_a_mistake_is_named_only_where_every_case_fits():
    mistakes = {"always 7": lambda x: torch.tensor(7.0) if x[0] == 1 else mean_square(x) + 1}
    assert "known mistake" not in told(
        lambda x: torch.tensor(7.0), lambda x: x.sum() * 2, cases=CASES, mistakes=mistakes
    )


def test_known_mistake_in_a_number():
    mistakes = {"the embedding is left out": 670.1e9}
    assert "the embedding is left out" in told(670.1e9, 671.03e9, rtol=1e-4, mistakes=mistakes)
    agree(671.0e9, 671.03e9, rtol=1e-4, mistakes=mistakes)


# --- agree: what differs otherwise


@pytest.mark.parametrize(
    ("mine", "reference", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "the shape of yours is [2, 3], expected [3, 2]"),
        (torch.zeros(2).double(), torch.zeros(2), "the dtype of yours is float64, expected float32"),
        (torch.tensor([0, 1.0]), torch.tensor([0, 1]), "the dtype of yours is float32, expected int64"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), "yours is NaN at [1] (1 of 2 values), expected 1"),
        (
            torch.tensor([1.0, float("inf")]),
            torch.ones(2),
            "yours is infinite at [1] (1 of 2 values), expected 1",
        ),
        (torch.tensor([-float("inf")]), torch.tensor([float("inf")]), "at [0] yours is -inf, expected inf"),
        (
            torch.tensor([1.0, 2.5, 4]),
            X,
            "at [1] yours is 2.5, expected 2 (1 of 3 values differ, by at most 0.5)",
        ),
        (torch.tensor([1, 5]), torch.tensor([1, 4]), "at [1] yours is 5, expected 4"),
        (torch.tensor([True]), torch.tensor([False]), "at [0] yours is True, expected False"),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j]), "at [0] yours is"),
        (torch.zeros(0, 3), torch.zeros(0, 2), "the shape of yours is [0, 3], expected [0, 2]"),
        (None, torch.zeros(2), "yours is None, expected float32[2]; is the `return` missing?"),
        ([1.0, 2.0], torch.zeros(2), "yours is [1.0, 2.0], expected float32[2]"),
        ((X, X), (X, X * 2), "in [1]: at [0] yours is 1, expected 2"),
        ((X,), (X, X), "yours has 1 items, expected 2"),
        (3.0, 6.0, "yours is 3.0, expected 6.0 (yours is 0.5 times that)"),
        (float("nan"), 1.0, "yours is nan, expected 1.0"),
        (1_000_000_001, 1_000_000_000, "yours is 1000000001"),
        (True, 1, "yours is True, expected 1"),
        ("1", 1, "yours is '1', expected 1"),
        ("attention", "attenuate", "from character 5 on yours is 'tion', expected 'uate'"),
        ("att", "attention", "from character 3 on yours is '', expected 'ention'"),
        ([1, 2, 4], [1, 2, 3], "in [2]: yours is 4, expected 3"),
        ({"a": 1}, {"b": 1}, "yours has the keys [\"'a'\"], expected [\"'b'\"]"),
        ({"a": 1}, {"a": 2}, "in ['a']: yours is 1, expected 2"),
        ({1}, {2}, "yours is {1}, expected {2}"),
        (np.array([1.0, 2.0]), np.array([1.0, 3.0]), "at [1] yours is 2, expected 3"),
    ],
)
def test_first_difference_is_named(mine, reference, words):
    assert words in told(mine, reference)
    assert words in told(lambda: mine, reference, cases=[()])


@pytest.mark.parametrize(
    ("mine", "reference"),
    [
        (torch.ones(3) + 1e-7, torch.ones(3)),
        (torch.tensor([float("nan"), float("inf")]), torch.tensor([float("nan"), float("inf")])),
        (torch.tensor(3.0), 3.0),
        (3.0, torch.tensor(3.0)),
        (nn.Parameter(X), X),
        ([1, 2], (1, 2)),
        (671_000, 671_000.0),
        (float("inf"), float("inf")),
        (float("nan"), float("nan")),
        ("same", "same"),
        ({"a": [X]}, {"a": [X]}),
        (np.ones(2), torch.ones(2, dtype=torch.float64)),
        (None, None),
    ],
)
def test_equal_answers_pass(mine, reference):
    agree(mine, reference)


def test_tolerances_are_those_that_are_given():
    agree(1.0, 1.05, atol=0.1)
    agree(X, X + 0.05, atol=0.1)
    agree(101, 100, rtol=0.02)
    agree(torch.tensor([101]), torch.tensor([100]), rtol=0.02)
    told(1.0, 1.05, atol=0.01, rtol=0.0)
    told(X, X + 0.05, atol=0.01, rtol=0.0)
    told(103, 100, rtol=0.02)
    told(1.0 + 1e-6, 1.0, atol=0.0, rtol=0.0)


def test_dataclasses_are_compared_by_field():
    @dataclasses.dataclass
    class Sizes:
        width: int
        depth: int

    agree(Sizes(1, 2), Sizes(1, 2))
    assert told(Sizes(1, 2), Sizes(1, 3)) == "in .depth: yours is 2, expected 3 (yours is 0.6667 times that)"


def test_the_failing_case_is_described():
    text = told(lambda x, n: x.sum() * min(n, 3), lambda x, n: x.sum() * n, cases=[(X, 2), (X, 4)])
    assert text.startswith("Case 2 of 2, called with (float32[3], 4):\n  at [] yours is 21, expected 28")


# --- agree: answers that raise


def test_the_learners_own_error_is_shown_with_its_line():
    def broken(x):
        return x @ torch.ones(5)

    text = told(broken, mean_square, cases=CASES)
    assert "your code raised RuntimeError: " in text
    assert "in broken, line" in text
    assert text.endswith("return x @ torch.ones(5)")


def test_error_in_a_notebook_cell_shows_the_cells_line_even_through_a_lambda():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.run_cell("def learner(x):\n    y = x + 1\n    return y.wrong")
    answer = shell.user_ns["learner"]
    text = told(lambda x: answer(x), mean_square, cases=CASES)
    assert text.endswith("in learner, line 3:  return y.wrong")


def test_a_notebook_shows_the_diagnosis_alone(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.run_cell('from mini.lab import agree, check\nwith check("1.2"):\n    agree(3.0, 6.0)')
    shown = capsys.readouterr().out.strip()
    assert shown == "✗ 1.2 is not right yet.\nyours is 3.0, expected 6.0 (yours is 0.5 times that)"


def refuses_odd(n):
    if n % 2:
        raise ValueError(f"n={n} is odd")
    return n // 2


def test_a_refusal_can_be_asked_for():
    agree(refuses_odd, refuses_odd, cases=[(4,), (3,)])
    assert "yours gives 1, expected a ValueError (n=3 is odd)" in told(
        lambda n: n // 2, refuses_odd, cases=[4, 3]
    )

    def other(n):
        return refuses_odd(n) if n % 2 == 0 else {}["n"]

    assert "your code raised KeyError" in told(other, refuses_odd, cases=[4, 3])
    assert "does not refuse" in told(
        lambda n: n // 2, refuses_odd, cases=[4, 3], mistakes={"does not refuse": lambda n: n // 2}
    )


def test_an_error_of_the_reference_is_the_authors():
    with pytest.raises(ZeroDivisionError):
        agree(lambda n: n, lambda n: n / 0, cases=[1])


def test_a_function_without_cases_is_the_authors_error():
    with pytest.raises(ValueError, match="has no cases for mean_square"):
        agree(mean_square, mean_square)


# --- agree: an answer cannot reach anything but its own copies


def test_inputs_are_copied_for_each():
    seen = []

    def greedy(x, items, module, generator):
        x.zero_()
        items.append(1)
        module.weight.data.zero_()
        torch.rand(3, generator=generator)
        return torch.ones(1)

    def reference(x, items, module, generator):
        seen.append(
            (x.clone(), list(items), module.weight.sum().item(), torch.rand(1, generator=generator).item())
        )
        return torch.ones(1)

    x, items, module, generator = X.clone(), [0], nn.Linear(2, 2), torch.Generator().manual_seed(1)
    was, state = module.weight.sum().item(), generator.get_state()
    agree(greedy, reference, cases=[(x, items, module, generator)] * 2, mistakes={"m": greedy})
    assert torch.equal(x, X)
    assert items == [0]
    assert module.weight.sum().item() == was
    assert torch.equal(generator.get_state(), state)
    assert all(torch.equal(s[0], X) and s[1] == [0] and s[2] == was and s[3] == seen[0][3] for s in seen)


def test_gradients_flow_through_copies():
    def gradient(x):
        (x * x).sum().backward()
        return x.grad

    leaf = X.clone().requires_grad_()
    agree(gradient, lambda x: 2 * x, cases=[(leaf,), (leaf * 1,)])
    assert leaf.grad is None


def test_randomness_is_the_same_for_both_and_leaves_the_notebooks_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    agree(lambda n: torch.rand(n), lambda n: torch.rand(n), cases=[4])
    assert torch.equal(torch.rand(3), expected)


# --- strict mode: the mutation test


def test_strict_passes_a_good_check(strict):
    agree(mean_square, mean_square, cases=CASES, mistakes={"a sum": lambda x: (x * x).sum()})


def test_strict_finds_a_mistake_that_the_check_does_not_catch(strict):
    one = [(torch.tensor([2.0]),)]  # of one value, mean and sum are the same
    with pytest.raises(CheckFailed, match="the mistake 'a sum' passes this check"):
        agree(mean_square, mean_square, cases=one, mistakes={"a sum": lambda x: (x * x).sum()})


def test_strict_finds_a_tolerance_that_hides_a_mistake(strict):
    with pytest.raises(CheckFailed, match="'one expert too many' passes"):
        agree(37.0, 37.0, rtol=0.1, mistakes={"one expert too many": 38.0})


def test_strict_finds_a_mistake_that_is_not_named(strict):
    twice = {"a sum": lambda x: (x * x).sum(), "a total": lambda x: x.square().sum()}
    with pytest.raises(CheckFailed, match=r"'a total' is caught but not named; it is told: .*a sum"):
        agree(mean_square, mean_square, cases=CASES, mistakes=twice)


def test_strict_finds_a_mistake_that_cannot_be_computed(strict):
    with pytest.raises(CheckFailed, match="'a slip' cannot be computed"):
        agree(mean_square, mean_square, cases=CASES, mistakes={"a slip": lambda x: x @ torch.ones(9)})


@pytest.mark.parametrize("body", [lambda: None, lambda: agree(3, 3)], ids=["compares nothing", "no mistakes"])
def test_strict_finds_an_empty_check(strict, body):
    with pytest.raises(CheckFailed, match="compares nothing, or registers no known mistake"), check("1.2"):
        body()


def test_without_strict_mistakes_are_not_run_for_a_right_answer():
    def never(x):
        raise AssertionError("run")

    agree(mean_square, mean_square, cases=CASES, mistakes={"never": never})
