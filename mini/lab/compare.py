"""Answers: run one on copies of its inputs, and say in words how two of them differ."""

import copy
import dataclasses
import math
import os
import traceback
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def outcome(answer: Any, case: tuple) -> Any:
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


def difference(mine: Any, reference: Any, atol: float = 1e-5, rtol: float | None = None) -> str | None:
    """The first difference between two values in words: kind, shape, dtype, NaN, then where and by how much."""
    if isinstance(mine, Raised) or isinstance(reference, Raised):
        return _unlike_errors(mine, reference)
    if mine is None and reference is not None:
        return f"yours is None, expected {describe(reference)}; is the `return` missing?"
    if isinstance(reference, np.ndarray | np.generic):
        reference = torch.as_tensor(reference)
    if isinstance(mine, np.ndarray | np.generic):
        mine = torch.as_tensor(mine)
    for this, other in ((mine, reference), (reference, mine)):
        if isinstance(this, Tensor) and this.dim() == 0 and _is_number(other):  # tensor(3.) will do for 3.0
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
        names = [field.name for field in dataclasses.fields(reference)]
        parts = [(f".{name}", getattr(mine, name), getattr(reference, name)) for name in names]
    elif type(mine) is type(reference):
        return None if mine == reference else f"yours is {mine!r}, expected {reference!r}"
    else:
        return f"yours is {describe(mine)}, expected {describe(reference)}"
    for where, m, r in parts:
        if text := difference(m, r, atol, rtol):
            return f"in {where}: {text}"
    return None


def _unlike_errors(mine: Any, reference: Any) -> str | None:
    name = type(reference.error).__name__ if isinstance(reference, Raised) else ""
    if not isinstance(mine, Raised):
        return f"yours gives {describe(mine)}, expected a {name} ({reference.error})"
    if name and isinstance(mine.error, type(reference.error)):
        return None
    text = f"your code raised {type(mine.error).__name__}: {mine.error}"
    return f"{text}{f', expected a {name}' if name else ''}{mine.where()}"


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
    i = next(i for i, (a, b) in enumerate(zip_longest(mine, reference)) if a != b)
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


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value)}{list(value.shape)}"
    if _is_sequence(value) and any(isinstance(item, Tensor) for item in value):
        return f"({', '.join(map(describe, value))})"
    text = name_of(value) if callable(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def name_of(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
