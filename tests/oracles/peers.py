"""The libraries that serve as oracles: whether they are there, and code of theirs that stands inside long functions.

Each has a folder of its own, made by ``make test-oracles`` from tests/oracles/NAME/requirements.txt, which is on the
path while the tests in tests/oracles/NAME run: the two TRLs have the same name, and none of them is to change what
quartet runs with.
"""

from __future__ import annotations
import __future__ as future

import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent


def require(name: str) -> None:
    """Skips the module that calls it unless exactly what its folder's requirements pin can be imported."""
    for line in (FOLDER / name / "requirements.txt").read_text().splitlines():
        package, _, version = line.partition("#")[0].strip().partition("==")
        if not package:
            continue
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found != version:
            pytest.skip(
                f"{package} is {found}, needed is {version}: `make test-oracles` installs it and runs this",
                allow_module_level=True,
            )


def statements(function: Callable[..., Any], first: str, last: str) -> CodeType:
    """The statements of ``function`` from the one that begins with ``first`` to the last that begins with ``last``.

    For an algorithm that stands in the middle of a training loop: executed with the loop's variables given, it is the
    code itself that answers, and not a copy of it.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        texts = [ast.unparse(statement) for statement in body] if isinstance(body, list) else []
        starts = [i for i, text in enumerate(texts) if text.startswith(first)]
        ends = [i for i, text in enumerate(texts) if text.startswith(last)]
        if starts and ends:
            block = ast.Module(body=body[starts[0] : ends[-1] + 1], type_ignores=[])
            return compile(block, inspect.getsourcefile(function) or "", "exec")
    raise LookupError(f"{function.__qualname__} has no statements from {first!r} to {last!r}")


def function_of(module: str, name: str, **names: object) -> Callable[..., Any]:
    """The function ``name`` of a module that itself can not be imported here; ``names`` are the globals it uses."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    (definition,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    block = ast.Module(body=[definition], type_ignores=[])
    namespace = dict(names)
    # Annotations stay unread, as they name classes of the modules that are not there.
    exec(compile(block, spec.origin, "exec", flags=future.annotations.compiler_flag), namespace)
    return namespace[name]  # type: ignore[return-value]
