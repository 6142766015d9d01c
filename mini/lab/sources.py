"""What a result depends on: the text of a function, and of everything that it uses of its own module and of `mini`."""

import ast
import dis
import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import numpy as np
from torch import Tensor


def sources(run: Callable) -> list[str]:
    """The text of `run`, of the functions and values that it uses of its own module, and of the modules of `mini`.

    A module counts whole, but for comments and docstrings, with all modules of `mini` that it imports; `mini.lab` and
    other libraries are left out.
    Raises ValueError for a tensor or a class of the notebook, whose content a text would not show.
    """
    found: dict[str, str] = {}

    def add(name: str, value: object) -> None:
        kind = value if inspect.ismodule(value) or callable(value) else type(value)
        module = kind.__name__ if inspect.ismodule(kind) else getattr(kind, "__module__", None) or ""
        if module.startswith("mini.lab") and module != run.__module__:
            return  # the classroom: what keeps and shows results does not change them
        if module.startswith("mini.") and module != run.__module__:
            found.update((name, text(name)) for name in imported(module))
        if name in found or inspect.ismodule(value):
            return
        if isinstance(value, Tensor | np.ndarray):
            raise ValueError(
                f"{run.__name__} uses {name}, a tensor of the notebook; make it inside {run.__name__}"
            )
        if not callable(value):
            found[name] = repr(value)
        elif module == run.__module__:
            if not inspect.isfunction(value):
                raise ValueError(
                    f"{run.__name__} uses {name}, a class of the notebook; use functions, or a class of mini"
                )
            found[name] = written(value)
            for key in sorted(globals_read(value.__code__) & value.__globals__.keys()):
                add(key, value.__globals__[key])

    add(run.__qualname__, run)
    return [f"{name}: {text}" for name, text in sorted(found.items())]


def written(function: Callable) -> str:
    """The text of a function; its compiled form in a process of `study`, which has no text of the notebook's cells."""
    try:
        return inspect.getsource(function)
    except OSError:
        return compiled(function.__code__)


def compiled(code: CodeType) -> str:
    """What a function does, the same in every process (the order of a set is not)."""
    parts = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts]
    parts = [compiled(part) if isinstance(part, CodeType) else repr(part) for part in parts]
    return " ".join((code.co_code.hex(), *code.co_names, *parts))


def globals_read(code: CodeType) -> set[str]:
    """The global names that a function reads, also in the functions and comprehensions inside it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(globals_read(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


@functools.cache
def text(module: str) -> str:
    """The source of a module without what does not change a result: comments, docstrings, layout."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_bytes())
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def imported(module: str) -> frozenset[str]:
    """This module and all modules of `mini` that it imports, at whatever remove, as names such as "mini.model"."""
    found, todo = set(), [module]
    while todo:
        if (name := todo.pop()) in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(text(name))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias}" for alias in names)]
            todo += [n for n in names if n.startswith("mini.") and is_module(n)]
    return frozenset(found)


def is_module(name: str) -> bool:
    """Whether this is a module's name, and not that of something in a module."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False
