"""docs/correctness.md names tests that exist, and every exception among the oracles' tests is named there."""

from __future__ import annotations

import re
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
