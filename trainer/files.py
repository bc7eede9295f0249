"""Folders and files that appear whole or not at all, whenever the power goes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import OutputError


def require_folder(flag: str, folder: Path) -> None:
    """Checks that ``folder``, the value of ``flag``, is one or can be made.

    Raises:
        OutputError: it or a part of its path is a file, or nothing may be written there.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        what = "it is a file" if nearest == folder else f"{str(nearest)!r} is a file"
        raise OutputError(f"{flag} is {str(folder)!r}: {what}; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{flag} is {str(folder)!r}: {str(nearest)!r} may not be written to")


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``folder`` to fill, which then takes its name and place.

    After an exception the old folder, if there was one, is as it was. Only when one is replaced is there a moment in
    which neither stands there; the old one is then still beside it under a name ending in ``.old``.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    remove_folder(partial)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        remove_folder(partial)
        raise
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    old = folder.with_name(f".{folder.name}.old")
    remove_folder(old)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    remove_folder(old)


def replace_file(path: Path, text: str) -> None:
    """Writes ``text`` under a temporary name and renames it: the file is the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remove_folder(folder: Path) -> None:
    """Removes ``folder`` and what is in it; renamed first, so that a kill leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
