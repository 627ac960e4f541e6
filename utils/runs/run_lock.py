"""Lock a run folder, so that only one process trains in it."""

import contextlib
import json
import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError


class RunLock:
    """A context manager that creates a run folder if needed, and locks it against other processes.

    The operating system releases the lock when its owner ends, however that happens. A file beside it names the owner.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / ".lock")
        self._owner = folder / ".owner"

    def __enter__(self) -> "RunLock":
        """Take the lock; raise UserError if another process holds it, or the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._owner.unlink(missing_ok=True)  # left by a killed owner; mode "x" does not write through a link
            with self._owner.open("x", encoding="utf-8") as file:
                json.dump({"process": os.getpid(), "host": platform.node()}, file)
        except Timeout as problem:
            raise UserError(
                f"{self.folder} is in use by {self._describe_owner()}: wait for it, or name this run with --des"
            ) from problem
        except OSError as problem:
            self._lock.release()
            raise UserError(
                f"cannot write to {self.folder}: {problem.strerror or problem} (--checkpoints)"
            ) from problem
        return self

    def __exit__(self, *problem) -> None:
        with contextlib.suppress(OSError):
            self._owner.unlink(missing_ok=True)
        # Deleting the lock file would let a waiting process lock the deleted file while a third locks a new one.
        self._lock.release()

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {owner['process']} on {owner['host']}"
        except (OSError, ValueError, RecursionError, KeyError, TypeError):  # the file may be half-written
            return "another process"
