"""Folders and files that appear whole or not at all, whenever the power goes or the disk is full."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors

from trainer.errors import OutputError, TrainerError

_LEFTOVERS = (".*.partial", ".*.removed")
# A full disk is an OSError to Python, the second to safetensors and the third to torch.save.
_WRITE_ERRORS = (OSError, safetensors.SafetensorError, RuntimeError)


@contextlib.contextmanager
def written(what: Path, kind: type[TrainerError] = OutputError) -> Iterator[None]:
    """What is done within writes ``what`` and nothing else.

    Raises:
        TrainerError: of this ``kind``, that it can't be written; says why, and what to do.
    """
    try:
        yield
    except _WRITE_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise kind(
            f"{what} can't be written: {reason}{room(what)}; make room or mend the cause, then give the same command "
            "again (a run goes on with --resume)"
        ) from error


def room(path: Path) -> str:
    """How much of the disk that holds ``path`` is free, for messages; nothing where that can't be known."""
    with contextlib.suppress(OSError):
        nearest = next(folder for folder in path.absolute().parents if folder.is_dir())
        disk = shutil.disk_usage(nearest)
        return f" ({disk.free / 1e6:,.1f} of {disk.total / 1e6:,.1f} MB are free there)"
    return ""


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

    After an exception the old folder, if there was one, is as it was. What is written in it is the caller's, so are the
    errors of that (``written``). Only when one is replaced is there a moment in
    which neither stands there; the old one is then still beside it under a name ending in ``.old``.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    remove_folder(partial)
    partial.mkdir()
    old = folder.with_name(f".{folder.name}.old")
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        remove_folder(old)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        remove_folder(partial)
        raise
    _sync(folder.parent)
    remove_folder(old)


def replace_file(path: Path, text: str) -> None:
    """Writes ``text`` under a temporary name and renames it: the file is the old one or the whole new one.

    Raises:
        OutputError: it can't be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def remove_folder(folder: Path) -> None:
    """Removes ``folder`` and what is in it; renamed first, so that a kill leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Removes what a kill amid writing or removing left in ``folder``; nothing reads it."""
    for pattern in _LEFTOVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
