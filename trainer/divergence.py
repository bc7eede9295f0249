"""Numbers that are not finite: which rows they come from, and what is left to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.checkpoint import latest_checkpoint
from trainer.errors import DivergedError

# How many rows a message names.
_NAMED_ROWS = 5


def row_names(names: Sequence[str]) -> str:
    """The first ones, each once, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = f"; and {len(different) - _NAMED_ROWS} more" if len(different) > _NAMED_ROWS else ""
    return "; ".join(different[:_NAMED_ROWS]) + more


def diverged(problem: str, names: Sequence[str] | None, of: int, output: Path) -> DivergedError:
    """The error to raise: what is not finite, because of which of so many rows, and what is kept.

    Args:
        problem: such as "step 13: the loss is nan".
        names: file and line of each of the rows that it comes from; empty: of none by itself; None: not of rows.
        of: rows that were looked at.
        output: folder of the run.
    """
    newest = latest_checkpoint(output)
    kept = "there is no checkpoint before it" if newest is None else f"the last good checkpoint is kept: {newest}"
    if names is None:
        because = ""
    elif not names:
        because = f", in none of its {of} rows alone, but in all of them together"
    elif len(names) == of > 1:
        because = f", in every one of its {of} rows ({row_names(names)}), so it is the weights that have diverged"
    else:
        because = f", in {len(names)} of its {of} rows: {row_names(names)}"
    return DivergedError(
        f"{problem}{because}. The run stops, and {kept}. With --resume it comes to the same rows again: if they are "
        "as they should be, training diverged; lower the learning rate, in another --output"
    )


def finite(
    figures: dict[str, float], alone: Callable[[int], float], names: Sequence[str], output: Path
) -> dict[str, float]:
    """``figures`` of an evaluation on held-out rows.

    Args:
        figures: by name.
        alone: a number that is finite if those of one row are.
        names: file and line of each row.
        output: folder of the run.

    Raises:
        DivergedError: one is not finite; names the rows of which it is not.
    """
    odd = [name for name, value in figures.items() if not math.isfinite(value)]
    if odd:
        bad = [name for place, name in enumerate(names) if not math.isfinite(alone(place))]
        raise diverged(f"on held-out rows {odd[0]} is {figures[odd[0]]}", bad, len(names), output)
    return figures
