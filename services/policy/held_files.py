"""Files that live exactly as long as the process that needs them, also when it is killed: the next one removes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "quartet-held-"
_LOCK = "lock"


class HeldFolder:
    """A folder below ``parent`` under a lock that ends with this process; removes those whose process has ended."""

    def __init__(self, parent: Path) -> None:
        _remove_orphans(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Locked before it goes by the name that others look for.
        new = self.path / f"{_LOCK}.new"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path / _LOCK)

    def take(self, name: str, folder: Path) -> Path:
        """Makes the files of a ``folder`` on the same file system stay, and returns where.

        Raises:
            OSError: there is no room for their names.
        """
        taken = self.path / name
        taken.mkdir()
        for file in folder.iterdir():
            os.link(file, taken / file.name)
        return taken

    def drop(self, name: str) -> None:
        """Removes what ``take`` kept."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def close(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_orphans(parent: Path) -> None:
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # Another user's, or gone since.
            handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(handle)
