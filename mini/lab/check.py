"""Exercises: `check` runs a check cell, `agree` compares an answer with the reference and says what is wrong."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mini.lab.compare import Raised, describe, difference, name_of, outcome


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
    # exercise -> (passed, points), in this kernel's session
    record: ClassVar[dict[str, tuple[bool, int]]] = {}

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
            text = f"✗ {name}: there is no `{error.name}` yet. Run the cell above, and keep its name."
            raise CheckFailed(text) from None
        if isinstance(error, AssertionError):
            text = str(error) or "An assertion of this check does not hold."
            raise CheckFailed(f"✗ {name} is not right yet.\n{text}") from None
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
        raise ValueError(f"agree() has no cases for {name_of(mine)}; give cases=[(arguments…), …]")
    cases = cases or [()]  # a plain value is a function without arguments
    expected = [outcome(reference, case) for case in cases]
    for result in expected:
        if _broken(result):
            raise result.error
    got = [outcome(mine, case) for case in cases]
    for result in got:
        if isinstance(result, Raised) and _is_stub(result.error):
            raise result.error

    def diagnose(answers: list[Any]) -> str | None:
        """What is wrong with these answers, or None; a known mistake is named first."""
        unlike = [difference(a, e, atol, rtol) for a, e in zip(answers, expected, strict=True)]
        if not any(unlike):
            return None
        for words, wrong in mistakes.items():
            theirs = [outcome(wrong, case) for case in cases]
            if not any(difference(a, t, atol, rtol) for a, t in zip(answers, theirs, strict=True)):
                return f"This is a known mistake: {words}."
        i = next(i for i, text in enumerate(unlike) if text)
        if not cases[i]:
            return unlike[i]
        arguments = ", ".join(map(describe, cases[i]))
        return f"Case {i + 1} of {len(cases)}, called with ({arguments}):\n  {unlike[i]}"

    if problem := diagnose(got):
        raise CheckFailed(problem)
    if check.current:
        check.current.compared += 1
        check.current.mistakes += len(mistakes)
    if strict():
        for words, wrong in mistakes.items():
            answers = [outcome(wrong, case) for case in cases]
            if broken := next(filter(_broken, answers), None):
                raise CheckFailed(f"the mistake {words!r} cannot be computed: {broken.error!r}")
            said = diagnose(answers)
            if said is None:
                raise CheckFailed(f"the mistake {words!r} passes this check; choose cases that catch it")
            if words not in said:
                raise CheckFailed(f"the mistake {words!r} is caught but not named; it is told: {said}")


def strict() -> bool:
    """Whether the course tests itself: an open exercise, a missed mistake or a failed claim then raises."""
    return os.environ.get("MINI_STRICT") == "1"


def _broken(result: Any) -> bool:
    """Whether a call failed in another way than by refusing its input."""
    return isinstance(result, Raised) and not isinstance(result.error, ValueError)


def _is_stub(error: BaseException | None) -> bool:
    """nbgrader's stub raises NotImplementedError without a message; torch's own have one and are errors."""
    return isinstance(error, NotImplementedError) and not error.args


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
