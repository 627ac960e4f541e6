"""Files that are never half-written, and their hashes."""

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

# Seconds to wait for whoever has a file open: under Windows it can neither be renamed meanwhile nor be replaced.
_PAUSES = (0.1, 0.3, 1, 3) if os.name == "nt" else ()


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, make sure that it is on the disk, then give it its name.

    Whatever happens on the way, a power cut too, `path` holds either what it held before or all of the new.

    Args:
        path: the file; it is replaced if it is there.
        write: writes the contents to the open file that it is given.

    Raises:
        UserError: if the disk is full, cannot be written or fails.
    """
    unfinished = unfinished_name(path)
    try:
        with unfinished.open("xb") as file:  # x: a file that is there, or a link to one, is not written to
            write(file)
            file.flush()
            os.fsync(file.fileno())
        rename(unfinished, path)
        _sync_folder(path.parent)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if cause := _failed_write(problem):
            raise UserError(f"cannot write {path}: {cause.strerror or cause}: what it held before is kept") from problem
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all."""
    atomic_write(path, lambda file: file.write(text.encode()))


def unfinished_name(path: Path) -> Path:
    """Return a name beside `path` that nobody can foresee: a link that was planted there would be written through."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")


def read_json(path: Path) -> dict:
    """Return the contents of a JSON file that a run has written.

    Raises:
        UserError: if it is damaged.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} is damaged ({problem}): move it away and run again") from problem
    if not isinstance(contents, dict):
        raise UserError(f"{path} is damaged (no JSON object): move it away and run again")
    return contents


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file, an empty text if it is not there."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename(unfinished: Path, path: Path) -> None:
    """Give a file or a folder its name; under Windows, wait for a virus scanner or a viewer that has it open.

    Raises:
        OSError: if it cannot be renamed, or cannot take the place of what is there.
    """
    for seconds in _PAUSES:
        try:
            unfinished.replace(path)
            return
        except PermissionError:
            time.sleep(seconds)
    unfinished.replace(path)


def back_up(files: Sequence[Path]) -> None:
    """Rename files of one folder that are there to *.old, or, if there are such, to *.old2 and so on, all alike.

    Raises:
        UserError: if one cannot be renamed, as Windows has it of a file that a viewer shows; none is then.
    """
    folder = files[0].parent
    endings = itertools.chain([".old"], (f".old{number}" for number in itertools.count(2)))
    ending = next(ending for ending in endings if not any(folder.glob(f"*{ending}")))
    renamed = []
    for file in filter(Path.exists, files):
        kept = file.with_name(file.name + ending)
        try:
            rename(file, kept)
        except OSError as problem:
            for before, after in renamed:  # all or none
                rename(after, before)
            reason = problem.strerror or problem
            raise UserError(
                f"cannot rename {file}: {reason}: close what has it open, or name this run with --des"
            ) from problem
        renamed.append((file, kept))


def _failed_write(problem: BaseException | None) -> OSError | None:
    """Return the error of the operating system behind an exception; torch.save puts others on top of it."""
    while problem is not None and not isinstance(problem, OSError):
        problem = problem.__cause__ or problem.__context__
    return problem


def _sync_folder(folder: Path) -> None:
    """Make a new name last, where a folder can be opened for that."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse; the file is in its place already
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
