"""Write files atomically, rename them, back them up and hash them."""

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

UNFINISHED = ".unfinished"

# Seconds between attempts to rename: Windows can neither rename nor replace a file that another program has open.
_PAUSES = (0.1, 0.3, 1, 3) if os.name == "nt" else ()


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it to `path`, replacing an existing file.

    After a failure at any moment, even a power cut, `path` has either its old or all of its new contents.

    Raises:
        UserError: if the disk is full, cannot be written or fails.
    """
    unfinished = unfinished_name(path)
    try:
        with unfinished.open("xb") as file:  # "x" never follows a link that somebody has planted
            write(file)
            file.flush()
            os.fsync(file.fileno())
        rename(unfinished, path)
        _sync_folder(path.parent)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if cause := _os_error_behind(problem):
            raise UserError(f"cannot write {path}: {cause.strerror or cause}: what it held before is kept") from problem
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def unfinished_name(path: Path) -> Path:
    """Return a temporary name beside `path`, random so that nobody can plant a link there."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")


def read_json(path: Path) -> dict:
    """Read a JSON object that a run has written; raise a UserError if the file is damaged."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} is damaged ({problem}): move it away and run again") from problem
    return contents


def hash_of(path: Path) -> str:
    """Compute the SHA-256 of a file; an empty string if there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename(source: Path, path: Path) -> None:
    """Rename a file or a folder; on Windows, wait for a virus scanner or a viewer that has it open."""
    for seconds in _PAUSES:
        with contextlib.suppress(PermissionError):
            source.replace(path)
            return
        time.sleep(seconds)
    source.replace(path)


def back_up(files: Sequence[Path]) -> None:
    """Rename those of some files in one folder that exist to *.old or, if it has *.old files, to *.old2 and so on.

    Raises:
        UserError: if a file cannot be renamed, for example because a viewer has it open; then none is renamed.
    """
    folder = files[0].parent
    endings = itertools.chain([".old"], (f".old{number}" for number in itertools.count(2)))
    ending = next(ending for ending in endings if not any(folder.glob(f"*{ending}")))
    renamed = []
    for file in filter(Path.exists, files):
        backup = file.with_name(file.name + ending)
        try:
            rename(file, backup)
        except OSError as problem:
            for original, renamed_to in renamed:
                rename(renamed_to, original)
            reason = problem.strerror or problem
            raise UserError(
                f"cannot rename {file}: {reason}: close what has it open, or name this run with --des"
            ) from problem
        renamed.append((file, backup))


def _os_error_behind(problem: BaseException | None) -> OSError | None:
    """Find the operating system's error in a chain of exceptions; torch.save wraps it in others."""
    while problem is not None and not isinstance(problem, OSError):
        problem = problem.__cause__ or problem.__context__
    return problem


def _sync_folder(folder: Path) -> None:
    """Flush a folder, and so a new name in it, to the disk."""
    with contextlib.suppress(OSError):  # Windows and some network file systems refuse; the file is renamed anyway
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
