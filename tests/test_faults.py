"""Disks that fail or are full: the last good state survives every one of it."""

import errno
import os
import shutil
import stat
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.conftest import names_in
from utils.system import files

from .test_resume import LONGER, needs_forks, outcome, run_in_process, start, undisturbed  # noqa: F401

SHORT = [*LONGER, "--percent", "6", "--save_steps", "3", "--eval_steps", "4"]


class FailingDisk:
    """Let the n-th file not reach the disk, and all after it."""

    def __init__(self, monkeypatch, number=None):
        self.calls = 0
        original = os.fsync

        def fsync(descriptor):
            self.calls += 1
            if number is not None and self.calls >= number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_the_last_good_state_survives_every_failed_write(run, flags, undisturbed, monkeypatch, request):  # noqa: F811
    argv = [*flags, *SHORT]
    with monkeypatch.context() as patch:
        writes = FailingDisk(patch)
        expected = undisturbed(*argv)
    assert writes.calls >= (20 if os.name == "posix" else 12)  # under Windows no folder is made to last
    # Every write and every folder that is made to last in the long mode, some by default.
    step = 1 if request.config.getoption("--kills") >= 100 else 7
    # But for the very last: that syncs a folder, which some file systems refuse, and every file is in its place.
    for number in range(1, writes.calls, step):
        with monkeypatch.context() as patch:
            FailingDisk(patch, number)
            broken = run(*argv)
        assert broken.code == 2, broken.err
        assert broken.err.count("\n") == 1 and "No space left on device" in broken.err
        assert not list(broken.folder.glob("*.unfinished"))
        for name in ("checkpoint", "last"):
            if (broken.folder / name).exists():
                torch.load(broken.folder / name, weights_only=True)
        resumed = run(*argv, "--resume", "auto")
        assert resumed.code == 0, resumed.err
        assert outcome(resumed.folder) | {"files": 0} == expected | {"files": 0}
        shutil.rmtree("checkpoints")


def run_with_small_files(argv, log):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    run_in_process(argv, log)


def test_a_file_system_that_does_not_sync_folders_will_do(run, flags, monkeypatch):
    original = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(*flags).code == 0


@needs_forks
def test_files_that_cannot_grow(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start(flags, Path("log"), run_with_small_files)
    process.join()
    last_line = Path("log").read_text(encoding="utf-8").splitlines()[-1]
    assert process.exitcode == 2
    assert last_line.startswith("error: cannot write ") and "File too large" in last_line
    (folder,) = Path("checkpoints").iterdir()
    assert names_in(folder) == ["args.json", "history.csv"]


@pytest.mark.parametrize("refusals", [3, 4])
def test_a_file_that_somebody_has_open_is_waited_for(run, flags, monkeypatch, refusals):
    """As under Windows, where a virus scanner looks at every new file and none that is open can be replaced."""
    replace, tries = Path.replace, Counter()

    def open_elsewhere(path, target):
        tries[path.name] += 1
        if tries[path.name] <= refusals:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", open_elsewhere)
    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0, 0.0))
    done = run(*flags)
    if refusals == 3:
        assert done.code == 0, done.err
        assert not list(done.folder.glob("*.unfinished"))
    else:
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "Permission denied" in done.err


def test_a_folder_that_cannot_be_made(run, flags, monkeypatch):
    def read_only(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused = run(*flags)
    assert refused.code == 2
    assert refused.err.count("\n") == 1 and "Permission denied" in refused.err and "--checkpoints" in refused.err
