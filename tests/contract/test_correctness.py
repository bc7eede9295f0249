"""docs/correctness.md names tests that exist; rows, bugs and exceptions are the same there and in the tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "correctness.md").read_text()


def names_in(folder: str) -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "tests" / folder).rglob("test_*.py"):
        found.update(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), flags=re.MULTILINE))
    return found


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 30
    assert named <= names_in(".")


def test_the_page_names_every_exception() -> None:
    exceptions = {name for name in names_in("oracles") if name.startswith("test_exception_")}
    assert exceptions == set(re.findall(r"`(test_exception_\w+)`", PAGE))


def test_the_page_has_the_versions_that_are_installed() -> None:
    pins = [path.read_text() for path in sorted((ROOT / "tests" / "oracles").glob("*/requirements.txt"))]
    versions = re.findall(r"^(verl|trl)==(\S+)$", "\n".join(pins), flags=re.MULTILINE)
    assert len(versions) == 3
    for package, version in versions:
        assert f"{package} {version}" in PAGE.lower()


_BUG = r"[A-Za-z]+#\d+|verl a65c9157"


def every_test() -> Iterator[tuple[str, str]]:
    """Name and source of every test, docstring and comments included."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield node.name, ast.get_source_segment(text, node) or ""


def rows_of(source: str) -> set[int]:
    """As in "Row 7" and "Rows 13 and 14"."""
    found = re.findall(r"\bRows? (\d+(?:(?:, | and )\d+)*)", source)
    return {int(number) for numbers in found for number in re.findall(r"\d+", numbers)}


def listed(heading: str) -> list[tuple[str, set[str]]]:
    """First cell of each line of the table beneath ``heading``, and the tests that it names."""
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and "`test_" in line]
    return [(line.split("|")[1].strip(), set(re.findall(r"`(test_\w+)`", line))) for line in lines]


def test_each_row_of_the_page_has_tests_that_name_it_and_no_test_names_another() -> None:
    labelled: dict[str, set[int]] = {}
    for name, source in every_test():
        labelled.setdefault(name, set()).update(rows_of(source))
    rows = listed("What PPO has to get right")
    assert [int(row) for row, _ in rows] == list(range(1, 23))
    for row, names in rows:
        assert {name for name in names if int(row) not in labelled[name]} == set(), row
    assert set().union(*labelled.values()) == set(range(1, 23))


def test_each_bug_of_the_page_has_a_test_that_names_it_and_no_test_names_another() -> None:
    labelled: dict[str, set[str]] = {}
    for name, source in every_test():
        for said in re.findall(r"Historical: ([^\n]*)", source):
            labelled.setdefault(name, set()).update(re.findall(_BUG, said))
    bugs = listed("Mistakes of others that can't be made here")
    assert len(bugs) > 15
    for cell, names in bugs:
        wanted = set(re.findall(_BUG, cell))
        assert wanted, cell
        assert wanted <= set().union(*(labelled.get(name, set()) for name in names)), cell
    on_page = {bug for cell, _ in bugs for bug in re.findall(_BUG, cell)}
    assert set().union(*labelled.values()) == on_page
