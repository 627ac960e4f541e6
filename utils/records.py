"""The text files of a run folder: args.json, metrics.json, history.csv."""

import argparse
import csv
import json
import platform
from importlib.metadata import version
from pathlib import Path

from utils.errors import UserError
from utils.evaluation import Scores
from utils.llm import LoadedLLM

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "numpy", "pandas", "scikit-learn", "tqdm")

HISTORY_COLUMNS = (
    *("epoch", "steps", "lr", "train_loss", "vali_loss", "vali_mae", "test_loss", "test_mae", "seconds"),
)


def open_run_folder(folder: Path, args: argparse.Namespace, repetition: int, device: str) -> None:
    """Make the run folder and write args.json: every flag, the versions of the packages, the device.

    Training starts with a clean set of files: those of an earlier run of the same name are kept as *.old. A test
    of the run's own checkpoint leaves its args.json as it is.

    Raises:
        UserError: if the folder cannot be written.
    """
    tests_itself = not args.checkpoint or Path(args.checkpoint).resolve() == folder.resolve()
    if not args.is_training and tests_itself:
        return
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    flags = {**vars(args), "seed": args.seed + repetition}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if args.is_training:
            for name in ("checkpoint", "args.json", "metrics.json", "history.csv"):
                if (folder / name).is_file():
                    (folder / name).replace(folder / f"{name}.old")
        _write_json(folder / "args.json", {**flags, "versions": versions, "device": device})
    except OSError as problem:
        raise UserError(f"cannot write to {folder}: {problem.strerror or problem} (--checkpoints)") from problem


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
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


class History:
    """history.csv: a row a validation, written as soon as it is known.

    Args:
        path: the file; not there yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self._append(HISTORY_COLUMNS, mode="w")

    def add(self, **row: float | None) -> None:
        """Append a row; a column that is None stays empty."""
        self._append([row[name] for name in HISTORY_COLUMNS], mode="a")

    def _append(self, cells, mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(cells)
