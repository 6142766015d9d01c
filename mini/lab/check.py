"""Exercises: `check` runs a check cell, `agree` compares an answer with the reference and says what is wrong."""

import copy
import dataclasses
import math
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


class CheckFailed(AssertionError):
    """A wrong answer. IPython shows the diagnosis alone, without frames of the course's own code."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class check:
    """Context manager around the body of a check cell: `with check("1.2", points=2): agree(...)`.

    Passed prints one line. An exercise that is still the stub prints one friendly line and the notebook goes
    on; under nbgrader (NBGRADER_EXECUTION) and with MINI_STRICT=1 it raises. Anything wrong raises CheckFailed.
    """

    current: "check | None" = None
    record: ClassVar[
        dict[str, tuple[bool, int]]
    ] = {}  # exercise -> (passed, points), in this kernel's session

    def __init__(self, exercise: str, points: int = 1) -> None:
        self.exercise, self.points, self.compared, self.mistakes = exercise, points, 0, 0

    def __enter__(self) -> "check":
        check.current = self
        check.record[self.exercise] = (False, self.points)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, tb: Any) -> bool:
        check.current = None
        name = self.exercise
        if _is_stub(error):
            line = f"○ {name} not attempted yet: fill in the cell above, run it, then run this one again"
            if strict() or os.environ.get("NBGRADER_EXECUTION"):
                raise CheckFailed(line) from None
            print(line)
            return True
        if isinstance(error, NameError) and error.name:
            raise CheckFailed(
                f"✗ {name}: there is no `{error.name}` yet. Run the cell above, and keep its name."
            ) from None
        if isinstance(error, AssertionError):
            raise CheckFailed(
                f"✗ {name} is not right yet.\n{error or 'An assertion of this check does not hold.'}"
            ) from None
        if error is not None:
            return False
        if strict() and not (self.compared and self.mistakes):
            raise CheckFailed(f"✗ {name}: this check compares nothing, or registers no known mistake")
        check.record[name] = (True, self.points)
        print(f"✓ {name} passed, {_count(self.points, 'point')}")
        return True


def progress() -> None:
    """Print how many of the checks that ran in this kernel have passed, and which are open."""
    done = [points for passed, points in check.record.values() if passed]
    total = sum(points for _, points in check.record.values())
    print(f"{len(done)} of {_count(len(check.record), 'exercise')}, {sum(done)} of {_count(total, 'point')}")
    if still_open := [name for name, (passed, _) in check.record.items() if not passed]:
        print("still open:", ", ".join(still_open))


def agree(
    mine: Any,
    reference: Any,
    cases: Iterable[Any] | None = None,
    mistakes: Mapping[str, Any] | None = None,
    atol: float = 1e-5,
    rtol: float | None = None,
) -> None:
    """Raise CheckFailed, with a diagnosis, unless the answer equals the reference.

    A function is compared on `cases`, each a tuple of arguments; it gets its own copies, and a fixed random
    seed. Where `reference` raises ValueError, so must `mine`. Without cases both are plain values. Integers have
    to be equal unless `rtol` is given; for floats it is 1e-5 unless given.
    `mistakes` gives known wrong answers (functions of the same arguments, or values) by their description in
    words: an answer that equals one of them is told so. With MINI_STRICT=1 each of them is tried once the answer
    has passed, and has to fail and be named.
    """
    mistakes = dict(mistakes or {})
    cases = None if cases is None else [case if isinstance(case, tuple) else (case,) for case in cases]
    if callable(mine) and not cases:
        raise ValueError(
            f"agree() compares the function {_name(mine)} but has no cases; give cases=[(arguments…), …]"
        )
    cases = cases or [()]  # a plain value is a function without arguments
    expected = [_outcome(reference, case) for case in cases]
    for outcome in expected:
        if isinstance(outcome, Raised) and not isinstance(outcome.error, ValueError):
            raise outcome.error
    got = [_outcome(mine, case) for case in cases]
    for outcome in got:
        if isinstance(outcome, Raised) and _is_stub(outcome.error):
            raise outcome.error

    def diagnose(answers: list[Any]) -> str | None:
        """What is wrong with these answers, or None; a known mistake is named first."""
        unlike = [difference(a, e, atol, rtol) for a, e in zip(answers, expected, strict=True)]
        if not any(unlike):
            return None
        for words, wrong in mistakes.items():
            theirs = [_outcome(wrong, case) for case in cases]
            if not any(difference(a, t, atol, rtol) for a, t in zip(answers, theirs, strict=True)):
                return f"This is a known mistake: {words}."
        i = next(i for i, text in enumerate(unlike) if text)
        where = (
            f"Case {i + 1} of {len(cases)}, called with ({', '.join(map(_describe, cases[i]))}):\n  "
            if cases[i]
            else ""
        )
        return f"{where}{unlike[i]}"

    if problem := diagnose(got):
        raise CheckFailed(problem)
    if check.current:
        check.current.compared += 1
        check.current.mistakes += len(mistakes)
    if strict():
        for words, wrong in mistakes.items():
            answers = [_outcome(wrong, case) for case in cases]
            if broken := next(
                (a for a in answers if isinstance(a, Raised) and not isinstance(a.error, ValueError)), None
            ):
                raise CheckFailed(f"the mistake {words!r} cannot be computed: {broken.error!r}")
            said = diagnose(answers)
            if said is None:
                raise CheckFailed(f"the mistake {words!r} passes this check; choose cases that catch it")
            if words not in said:
                raise CheckFailed(
                    f"the mistake {words!r} is caught but not named; the learner would read: {said}"
                )


def difference(mine: Any, reference: Any, atol: float = 1e-5, rtol: float | None = None) -> str | None:
    """The first difference between two values in words: kind, shape, dtype, NaN, then where and by how much."""
    if isinstance(mine, Raised) or isinstance(reference, Raised):
        return _unlike_errors(mine, reference)
    if mine is None and reference is not None:
        return f"yours is None, expected {_describe(reference)}; is the `return` missing?"
    if isinstance(reference, np.ndarray | np.generic):
        reference = torch.as_tensor(reference)
    if isinstance(mine, np.ndarray | np.generic):
        mine = torch.as_tensor(mine)
    for this, other in ((mine, reference), (reference, mine)):
        if (
            isinstance(this, Tensor) and this.dim() == 0 and _is_number(other)
        ):  # tensor(3.) and 3.0 are the same answer
            mine, reference = (v.item() if isinstance(v, Tensor) else v for v in (mine, reference))
    if isinstance(mine, Tensor) and isinstance(reference, Tensor):
        return _unlike_tensors(mine, reference, atol, rtol)
    if _is_number(mine) and _is_number(reference):
        return _unlike_numbers(mine, reference, atol, rtol)
    if isinstance(mine, str) and isinstance(reference, str):
        return _unlike_strings(mine, reference)
    if isinstance(mine, Mapping) and isinstance(reference, Mapping):
        if mine.keys() != reference.keys():
            return f"yours has the keys {sorted(map(repr, mine))}, expected {sorted(map(repr, reference))}"
        parts = [(f"[{key!r}]", mine[key], reference[key]) for key in reference]
    elif _is_sequence(mine) and _is_sequence(reference):
        if len(mine) != len(reference):
            return f"yours has {len(mine)} items, expected {len(reference)}"
        parts = [(f"[{i}]", m, r) for i, (m, r) in enumerate(zip(mine, reference, strict=True))]
    elif dataclasses.is_dataclass(reference) and type(mine) is type(reference):
        parts = [
            (f".{f.name}", getattr(mine, f.name), getattr(reference, f.name))
            for f in dataclasses.fields(reference)
        ]
    elif type(mine) is type(reference):
        return None if mine == reference else f"yours is {mine!r}, expected {reference!r}"
    else:
        return f"yours is {_describe(mine)}, expected {_describe(reference)}"
    for where, m, r in parts:
        if text := difference(m, r, atol, rtol):
            return f"in {where}: {text}"
    return None


def strict() -> bool:
    """Whether the course tests itself: an open exercise, a missed mistake or a failed claim then raises."""
    return os.environ.get("MINI_STRICT") == "1"


@dataclasses.dataclass
class Raised:
    """The outcome of a call that raised."""

    error: Exception
    function: Any

    def where(self) -> str:
        """The last line of the learner's own cell that the error went through."""
        code = getattr(getattr(self.function, "forward", self.function), "__code__", None)
        frames = traceback.extract_tb(self.error.__traceback__)
        # a notebook's cells are files that exist in linecache only
        cells = [f for f in frames if f.line and not os.path.exists(f.filename)]
        own = cells or [f for f in frames if code is not None and f.filename == code.co_filename]
        return f"\n    in {own[-1].name}, line {own[-1].lineno}:  {own[-1].line}" if own else ""


def _outcome(answer: Any, case: tuple) -> Any:
    """What the answer gives on a case, which it cannot change for others; a plain value gives itself."""
    if not callable(answer):
        return answer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return answer(*(_clone(argument) for argument in case))
        except Exception as error:
            return Raised(error, answer)


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if type(value) in (list, tuple):
        return type(value)(map(_clone, value))
    if type(value) is dict:
        return {key: _clone(v) for key, v in value.items()}
    return copy.deepcopy(value)


def _is_stub(error: BaseException | None) -> bool:
    """nbgrader's stub raises NotImplementedError without a message; torch's own have one and are errors."""
    return isinstance(error, NotImplementedError) and not error.args


def _unlike_errors(mine: Any, reference: Any) -> str | None:
    if not isinstance(reference, Raised):
        return f"your code raised {type(mine.error).__name__}: {mine.error}{mine.where()}"
    if not isinstance(mine, Raised):
        return (
            f"yours gives {_describe(mine)}, expected a {type(reference.error).__name__} ({reference.error})"
        )
    if isinstance(mine.error, type(reference.error)):
        return None
    name = type(reference.error).__name__
    return f"your code raised {type(mine.error).__name__}: {mine.error}, expected a {name}{mine.where()}"


def _unlike_tensors(mine: Tensor, reference: Tensor, atol: float, rtol: float | None) -> str | None:
    if mine.shape != reference.shape:
        return f"the shape of yours is {list(mine.shape)}, expected {list(reference.shape)}"
    if mine.dtype != reference.dtype:
        return f"the dtype of yours is {_dtype(mine)}, expected {_dtype(reference)}"
    mine, reference = mine.detach().cpu(), reference.detach().cpu()
    floating = mine.is_floating_point() or mine.is_complex()
    rtol = (1e-5 if floating else 0) if rtol is None else rtol
    for what, test in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        odd = test(mine) & ~test(reference)
        if odd.any():
            many = f"{int(odd.sum())} of {odd.numel()} values"
            return f"yours is {what} at {_index(odd)} ({many}), expected {_at(reference, odd)}"
    bad = ~torch.isclose(mine, reference, rtol=rtol, atol=atol if floating else 0, equal_nan=True)
    if not bad.any():
        return None
    text = f"at {_index(bad)} yours is {_at(mine, bad)}, expected {_at(reference, bad)}"
    if bad.numel() == 1 or mine.dtype == torch.bool:
        return f"{text} ({int(bad.sum())} of {bad.numel()} values differ)"
    most = (mine[bad].to(torch.complex128) - reference[bad].to(torch.complex128)).abs().max()
    return f"{text} ({int(bad.sum())} of {bad.numel()} values differ, by at most {float(most):.3g})"


def _unlike_numbers(mine: float, reference: float, atol: float, rtol: float | None) -> str | None:
    if isinstance(mine, bool) != isinstance(reference, bool):
        return f"yours is {mine!r}, expected {reference!r}"
    if isinstance(mine, int) and isinstance(reference, int):
        rtol, atol = rtol or 0.0, 0.0
    both_nan = math.isnan(mine) and math.isnan(reference)
    if both_nan or math.isclose(mine, reference, rel_tol=1e-5 if rtol is None else rtol, abs_tol=atol):
        return None
    text = f"yours is {mine!r}, expected {reference!r}"
    if reference and not isinstance(mine, bool) and math.isfinite(mine) and math.isfinite(reference):
        text += f" (yours is {mine / reference:.4g} times that)"
    return text


def _unlike_strings(mine: str, reference: str) -> str | None:
    if mine == reference:
        return None
    i = next(
        (i for i, (a, b) in enumerate(zip(mine, reference, strict=False)) if a != b),
        min(len(mine), len(reference)),
    )
    return f"from character {i} on yours is {mine[i : i + 20]!r}, expected {reference[i : i + 20]!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _index(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()


def _at(values: Tensor, mask: Tensor) -> str:
    value = values[mask][0].item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value)}{list(value.shape)}"
    if _is_sequence(value) and any(isinstance(item, Tensor) for item in value):
        return f"({', '.join(map(_describe, value))})"
    text = _name(value) if callable(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
