"""The TRLs that we compare with, each in a folder of its own beside what quartet runs with: they have one name."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

TRL, TRL_PPO = "trl", "trl_ppo"
"""Folders of TRL 1.16, and of 1.12, the last that has PPO; made by ``make test-oracles`` and ``make bench-trainer``."""
_VERSIONS = {TRL: "1.16.", TRL_PPO: "1.12."}


def has_trl(name: str) -> bool:
    """Whether the TRL of this folder can be imported: from there, or installed as any library is."""
    if _folder(name).is_dir():
        return True
    try:
        return metadata.version("trl").startswith(_VERSIONS[name])
    except metadata.PackageNotFoundError:
        return False


def use_trl(name: str) -> None:
    """Makes ``import trl`` find that of the folder. In a process of its own, before the first import."""
    if _folder(name).is_dir():
        sys.path.insert(0, str(_folder(name)))


def _folder(name: str) -> Path:
    return Path(sys.prefix) / "oracles" / name
