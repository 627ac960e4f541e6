"""One training run a folder."""

import contextlib
import json
import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError


class RunLock:
    """While it is entered, no other process can enter the lock of the same folder.

    The lock is the operating system's: it falls with its owner, however that ends. Beside it lies a note of who
    the owner is.

    Args:
        folder: the run folder; made if need be.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / ".lock")
        self._owner = folder / ".owner"

    def __enter__(self) -> "RunLock":
        """Take the lock.

        Raises:
            UserError: if another process has it, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._owner.unlink(missing_ok=True)  # of an owner that was killed; "x" writes through no link
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
        # The lock's file stays: who waited for it would hold a file that has no name any more, beside the next owner.
        self._lock.release()

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {owner['process']} on {owner['host']}"
        except (OSError, ValueError, RecursionError, KeyError, TypeError):  # it may be half-written
            return "another process"
