"""Which tests bear others beside them: those of runs, which take the time that they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

OF_RUNS = {
    "test_dpo.py",
    "test_killed.py",
    "test_online_dpo.py",
    "test_optimum.py",
    "test_ppo.py",
    "test_ppo_killed.py",
    "test_ppo_lora.py",
}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in OF_RUNS:
            item.add_marker(pytest.mark.alone)
