"""``quartet-train check``: reads data as the stages would, so that a bad row is known before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from trainer.comparisons import load_comparisons
from trainer.config import CheckSettings
from trainer.data import load_demonstrations, load_judged, load_preferences, load_prompts
from trainer.rows import Row

_LOADERS: dict[str, Callable[[Sequence[str]], Sequence[Row]]] = {
    "comparisons": load_comparisons,
    "demonstrations": load_demonstrations,
    "judged": load_judged,
    "preferences": load_preferences,
    "prompts": load_prompts,
}


def main(settings: CheckSettings) -> None:
    """Reads every row and says how many there are.

    Raises:
        DataError: a row doesn't fit; with file, line and field.
    """
    for kind in settings.kinds:
        rows = _LOADERS[kind](settings.data)
        sys.stdout.write(f"{', '.join(settings.data)}: {len(rows):,} {kind}\n")
