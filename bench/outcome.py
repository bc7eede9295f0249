"""How a measurement ends: verdicts on the screen, figures in bench/out, and an exit code that a script can believe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bench.machine import machine

# Looked at when the program starts: the load it tells is of before the measurement.
_MACHINE = machine()
OUTPUT = Path(__file__).resolve().parent / "out"


@dataclass(frozen=True)
class Verdict:
    """Whether a target is met, and the sentence that says so."""

    held: bool
    text: str

    def __str__(self) -> str:
        return f"{'PASS' if self.held else 'MISS'}  {self.text}"


@contextmanager
def log_of(name: str) -> Iterator[BinaryIO]:
    """bench/out/``name``.log, for what a service says: as much as it does by default, and not on the screen."""
    OUTPUT.mkdir(exist_ok=True)
    with (OUTPUT / f"{name}.log").open("ab") as file:
        yield file


def conclude(name: str, verdicts: Sequence[Verdict], figures: Mapping[str, Any]) -> None:
    """Prints the verdicts and writes bench/out/``name``.json, with the machine that the figures are of.

    Raises:
        SystemExit: with 1, when a target is missed.
    """
    print("\n" + "\n".join(map(str, verdicts)))
    OUTPUT.mkdir(exist_ok=True)
    judged = [{"held": verdict.held, "text": verdict.text} for verdict in verdicts]
    content = {"machine": _MACHINE, **figures, "verdicts": judged}
    (OUTPUT / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if not all(verdict.held for verdict in verdicts):
        sys.exit(1)
