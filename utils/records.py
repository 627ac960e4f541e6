"""The text files of a run folder: args.json, metrics.json, history.csv."""

import argparse
import csv
import io
import itertools
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from utils.errors import UserError
from utils.evaluation import Scores
from utils.files import UNFINISHED, write_text
from utils.llm import LoadedLLM

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "numpy", "pandas", "scikit-learn", "tqdm")

HISTORY_COLUMNS = (
    *("epoch", "steps", "lr", "train_loss", "vali_loss", "vali_mae", "test_loss", "test_mae", "seconds"),
)


# What training writes. Of an earlier run of the same name they are kept, under names with an `.old` behind.
_FILES = ("checkpoint", "last", "args.json", "metrics.json", "history.csv")


def open_run_folder(folder: Path, args: argparse.Namespace, repetition: int, device: str, resumes: bool) -> None:
    """Make the run folder and write args.json: every flag, the versions of the packages, the device.

    Training starts with a clean set of files: those of an earlier run of the same name are kept as *.old, *.old2
    and so on. A test of the run's own checkpoint leaves its args.json as it is.

    Args:
        folder: the run folder.
        args: the run's flags.
        repetition: which of them this is.
        device: that it runs on.
        resumes: whether training goes on with the files that are there.

    Raises:
        UserError: if the folder cannot be written.
    """
    tests_itself = not args.checkpoint or Path(args.checkpoint).resolve() == folder.resolve()
    if not args.is_training and tests_itself:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if args.is_training:
            for leftover in folder.glob(f"*{UNFINISHED}"):
                leftover.unlink()
            if not resumes:
                _keep_earlier_files(folder)
    except OSError as problem:
        raise UserError(f"cannot write to {folder}: {problem.strerror or problem} (--checkpoints)") from problem
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    flags = {**vars(args), "seed": args.seed + repetition}
    _write_json(folder / "args.json", {**flags, "versions": versions, "device": device})


def _keep_earlier_files(folder: Path) -> None:
    present = [folder / name for name in _FILES if (folder / name).is_file()]
    endings = itertools.chain([".old"], (f".old{number}" for number in itertools.count(2)))
    ending = next(ending for ending in endings if not any(folder.glob(f"*{ending}")))
    for file in present:
        file.replace(file.with_name(file.name + ending))


def write_metrics(
    folder: Path, scores: Scores, seconds: float, llm: LoadedLLM | None, checkpoint: Path, csv: Path
) -> None:
    """Write the test scores of the best checkpoint to metrics.json."""
    contents = {
        "split": "test",
        "mse": scores.mse,
        "mae": scores.mae,
        "windows": scores.windows,
        "per_channel": scores.per_channel,
        "seconds": round(seconds, 3),
        "llm": llm.as_dict() if llm else None,
        "checkpoint": str(checkpoint),
        "data": str(csv),
    }
    _write_json(folder / "metrics.json", contents)


def _write_json(path: Path, contents: dict) -> None:
    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


class History:
    """history.csv: a row a validation, written as soon as it is known.

    Args:
        path: the file.
        rows: of the run so far, if it is resumed: lists of cells.
    """

    def __init__(self, path: Path, rows: Sequence[list[str]] = ()):
        self.path = path
        self.rows = [list(row) for row in rows]
        self._write()

    def add(self, **row: float | None) -> None:
        """Append a row; a column that is None stays empty."""
        self.rows.append(["" if row[name] is None else str(row[name]) for name in HISTORY_COLUMNS])
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([HISTORY_COLUMNS, *self.rows])
        write_text(self.path, text.getvalue())
