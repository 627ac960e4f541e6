"""Download files over HTTP: interrupted downloads resume, and each file's size and hash are verified."""

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils.errors import UserError, first_line
from utils.system.files import rename

PART = ".part"
TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 3, 10)  # seconds before each retry; one failure more in a row without a new byte ends the download
BLOCK = 1 << 20


class RemoteFile(NamedTuple):
    """A file to download: its digest is a SHA-256 (64 digits) or a git blob's SHA-1 (40), its remedy ends errors."""

    name: str
    url: str
    size: int
    digest: str
    remedy: str

    def matches(self, path: Path) -> bool:
        """Return whether a file on the disk has this digest."""
        digest = hashlib.sha256()
        if len(self.digest) == 40:
            digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest() == self.digest


class _InterruptedDownloadError(Exception):
    """A request failed before all bytes arrived; a retry may help."""


def download(files: Sequence[RemoteFile], folder: Path) -> None:
    """Download files to a folder; each is named *.part until its hash is verified.

    Raises:
        UserError: if the disk is too full, a server fails for good, or a file has the wrong hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {file: folder / (file.name + PART) for file in files}
    for part in parts.values():
        # The download would overwrite the file that a symbolic or hard link points to.
        if part.is_symlink() or (part.exists() and part.stat().st_nlink > 1):
            part.unlink()
    needed = sum(file.size - _size(part) for file, part in parts.items())
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{folder} needs {needed / 1e9:.2f} GB more, but only {free / 1e9:.2f} GB are free: make room")
    for file, part in parts.items():
        _download_part(file, part)
        if not file.matches(part):
            part.unlink()
            raise UserError(f"{file.url} sent wrong bytes, which were deleted: run the command again or {file.remedy}")
        rename(part, folder / file.name)


def download_missing(files: Sequence[RemoteFile], folder: Path) -> None:
    """Download those files that the folder of an earlier, unfinished download lacks; remove what is no part of them.

    Raises:
        UserError: if the folder is a link, or the download fails.
    """
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, not the folder of an earlier download: remove it")
    wanted = {file.name: file for file in files}
    for path in list(folder.glob("*")):
        file = wanted.get(path.name.removesuffix(PART))
        if file is None or (path.name == file.name and not file.matches(path)):
            path.unlink()  # the server's version has changed since
    download([file for file in files if not (folder / file.name).exists()], folder)


def _download_part(file: RemoteFile, part: Path) -> None:
    """Send requests until all bytes are on the disk; give up after repeated failures without a new byte."""
    if _size(part) > file.size:
        part.unlink()
    longest, failures = _size(part), 0
    while _size(part) < file.size:
        try:
            _append(file, part)
        except _InterruptedDownloadError as problem:
            failures = 1 if _size(part) > longest else failures + 1
            longest = max(longest, _size(part))
            stopped = f"stopped after {_size(part)} of {file.size} bytes ({problem})"
            if failures > len(PAUSES):
                raise UserError(f"{file.url} {stopped}: run the command again to resume, or {file.remedy}") from problem
            print(f"{file.name} {stopped}, retrying in {PAUSES[failures - 1]} s")
            time.sleep(PAUSES[failures - 1])


def _append(file: RemoteFile, part: Path) -> None:
    """Send one request for the missing bytes and append what arrives, never more than the file's size."""
    have = _size(part)
    with _request(file, part) as response:
        content_range = response.headers.get("Content-Range", "") if response.status == 206 else "bytes 0-"
        offset = re.match(r"bytes (\d{1,15})-", content_range)
        start = int(offset[1]) if offset else -1
        if start not in (0, have):
            part.unlink(missing_ok=True)
            raise _InterruptedDownloadError(f"the server did not continue at byte {have}")
        bar = tqdm(desc=file.name, total=file.size, initial=start, unit="B", unit_scale=True, disable=None)
        mode, no_links = "ab" if start else "wb", getattr(os, "O_NOFOLLOW", 0)
        with bar, open(part, mode, opener=lambda path, flags: os.open(path, flags | no_links, 0o666)) as out:
            while start < file.size:
                with _network_errors_as_interruption():
                    block = response.read1(min(BLOCK, file.size - start))
                if not block:
                    raise _InterruptedDownloadError("the response ended")
                start += out.write(block)
                bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())


def _request(file: RemoteFile, part: Path) -> HTTPResponse:
    """Request the bytes that the part lacks; raise UserError where a retry cannot help."""
    request = Request(file.url, headers={"User-Agent": "Time-LLM"})  # some servers reject Python's default
    if have := _size(part):
        request.add_header("Range", f"bytes={have}-")
    with _network_errors_as_interruption():
        try:
            return urlopen(request, timeout=TIMEOUT)
        except HTTPError as error:
            if error.code == 416:  # the server's file is no longer than the part: start over
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{file.url} returned HTTP {error.code}: {file.remedy}") from error
            raise


@contextlib.contextmanager
def _network_errors_as_interruption() -> Iterator[None]:
    """Separate errors of the network, after which a retry may help, from those of the disk."""
    try:
        yield
    except (OSError, HTTPException) as problem:
        raise _InterruptedDownloadError(first_line(problem)) from problem


def _size(path: Path) -> int:
    """Measure a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0
