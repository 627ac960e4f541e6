"""Write the records of a run folder: args.json, metrics.json, history.csv, test forecasts, effects of covariates."""

import contextlib
import csv
import io
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import nn

from data_provider.effects import column_effects, note_effects
from data_provider.fit_known_ahead import Choice
from data_provider.series import Series
from data_provider.windows import WindowDataset
from layers.StandardNorm import Normalize
from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint
from utils.runs.intervals import Calibration
from utils.runs.metrics import SERIES_FILE, KeptForecasts, Scores
from utils.runs.pictures import DrawnWindow, draw_covariates, draw_history, draw_windows
from utils.system.files import UNFINISHED, atomic_write, back_up, write_text
from utils.system.gpu import is_gpu, peak_allocated

if TYPE_CHECKING:
    from utils.llm.loading import LoadedLLM

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "numpy", "pandas", "scikit-learn", "tqdm")

HISTORY_COLUMNS = (
    *("epoch", "steps", "lr", "train_loss", "vali_loss", "vali_mae", "test_loss", "test_mae", "seconds"),
    *("attention_entropy", "prototype_rms"),
)

# The files of a run; those of an earlier run with the same name are renamed to *.old.
_FILES = (
    *("checkpoint", "last", "args.json", "metrics.json", "history.csv", "history.png", "calibration.npz", "errors.png"),
    *("pred.npy", "true.npy", "test.png", "forecast.csv", "forecast.png", "prototypes.png", SERIES_FILE, "tensorboard"),
    *("covariates.csv", "covariates.png", "notes.csv"),
)


def open_run_folder(folder: Path, flags: dict, data_sha256: str, device: str, resumes: bool) -> None:
    """Create the run folder and write args.json: all flags, the CSV's hash, the package versions and the device.

    A new training run, unless it resumes, renames the files of an earlier run with the same name to *.old, *.old2 and
    so on. A test of the run's own checkpoint does not change args.json.

    Raises:
        UserError: if the folder cannot be written.
    """
    tests_itself = not flags["checkpoint"] or Path(flags["checkpoint"]).resolve() == folder.resolve()
    if not flags["is_training"] and tests_itself:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if flags["is_training"]:
            for leftover in folder.glob(f"*{UNFINISHED}"):
                leftover.unlink()
            present = [folder / name for name in _FILES if (folder / name).exists()]
            if not resumes and any(map(_holds_results, present)):  # else the run was stopped before its first step
                back_up(present)
    except OSError as problem:
        raise UserError(f"cannot write to {folder}: {problem.strerror or problem} (--checkpoints)") from problem
    _write_json(folder / "args.json", {**flags, "data_sha256": data_sha256, "versions": _versions(), "device": device})


def _versions() -> dict[str, str | None]:
    versions = {"python": platform.python_version(), **dict.fromkeys(_PACKAGES)}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # bitsandbytes is optional
            versions[package] = version(package)
    # torch.__version__ includes the build, such as 2.13.0+cu130; the package metadata may not.
    return versions | {"torch": str(torch.__version__)}


def _holds_results(file: Path) -> bool:
    if file.name == "history.csv":
        return len(file.read_text(encoding="utf-8").splitlines()) > 1
    return file.name != "args.json"


def write_choice(folder: Path, choice: Choice, series: Series) -> None:
    """Write what covariates and notes do to forecasts.

    covariates.csv tells by how much the validation error of each channel rises if a column is shuffled, covariates.png
    shows the effect over the values of the most important columns, and notes.csv lists the effect of each note. Without
    an effect there is no picture, without --notes no notes.csv.

    `series` holds the effect.
    """
    write_text(folder / "covariates.csv", choice.frame().to_csv(index=False, lineterminator="\n"))
    if effects := column_effects(series, choice.rises):
        draw_covariates(folder / "covariates.png", effects)
    if series.table.covariates.notes:
        notes = note_effects(series).to_csv(index=False, lineterminator="\n", float_format="%.6g")
        write_text(folder / "notes.csv", notes)


def write_metrics(
    folder: Path,
    errors: dict,
    intervals: list[dict],
    naive: Scores | None,
    seconds: float,
    llm: "LoadedLLM | None",
    cost: dict,
    origin: dict,
) -> None:
    """Write metrics.json.

    Args:
        errors, intervals: see `UnitErrors.compute` and `IntervalScores.compute`; no intervals without levels.
        naive: the errors of the seasonal naive forecast on the same windows; None if a window is shorter than a season.
        seconds: the duration of the test.
        cost, origin: see `cost_of` and `origin_of`.
    """
    contents = {
        "split": "test",
        **errors,
        **({"intervals": intervals} if intervals else {}),
        "seasonal_naive": {"mse": naive.mse, "mae": naive.mae} if naive else None,
        "seconds": round(seconds, 3),
        "llm": llm.as_dict() if llm else None,
        **origin,
        "cost": cost,
    }
    _write_json(folder / "metrics.json", contents)


def write_series(folder: Path, per_channel: dict[str, dict]) -> None:
    """Write series.csv: one row with the errors of each series of a long CSV."""
    text = io.StringIO()
    columns = ["unique_id", *next(iter(per_channel.values()))]
    rows = csv.DictWriter(text, columns, lineterminator="\n")
    rows.writeheader()
    rows.writerows({"unique_id": name, **errors} for name, errors in per_channel.items())
    write_text(folder / SERIES_FILE, text.getvalue())


def origin_of(
    checkpoint: Checkpoint,
    flags: dict,
    csv: Path,
    data_sha256: str,
    prompt_sha256: str,
    eval_windows: int,
    ended_state: str,
) -> dict:
    """Build the entries of metrics.json that tell which weights, data and flags of the test its scores belong to.

    Args:
        data_sha256, prompt_sha256: the hashes of the CSV and of --prompt_file (empty without one) when they were read.
        eval_windows: the maximum number of windows, 0 for all.
        ended_state: see `checkpoint.ended_state`.
    """
    return {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        "ended_state_sha256": ended_state,
        "data": str(csv),
        "data_sha256": data_sha256,
        "prompt_file_sha256": prompt_sha256,
        "eval_windows": eval_windows,
        "flags": flags,
    }


def cost_of(model: nn.Module, device: torch.device, seconds_per_step: float | None) -> dict:
    """Collect the cost of a model; the peak memory, in bytes, is that of a GPU's tensors, or of the whole process."""
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds_per_step": seconds_per_step,
        "peak_memory": peak_allocated(device) if is_gpu(device) else _peak_of_process(),
    }


def _peak_of_process() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_predictions(
    folder: Path, kept: KeptForecasts, windows: WindowDataset, calibration: Calibration | None, levels: Sequence[int]
) -> None:
    """Write pred.npy and true.npy, (windows, pred_len), and test.png with the best, the median and the worst window."""
    test = kept.compute()
    for name, values in (("pred.npy", test.forecast), ("true.npy", test.target)):
        atomic_write(folder / name, lambda file, values=values: np.save(file, values))
    is_scored = ~np.isnan(test.target).all(axis=-1)
    errors = np.full(len(test.target), np.inf)
    errors[is_scored] = np.nanmean(np.square(test.forecast - test.target)[is_scored], axis=-1)
    order = errors.argsort()[: is_scored.sum()]
    drawn = []
    for rank, place in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        number = int(test.numbers[place])
        context = windows.__getitems__([number])[0][0, :, 0]
        channel = windows.channel_of([number])
        title = f"{rank} of {len(errors)}: window {number}, {windows.channels[channel[0]]}, MSE {errors[place]:.4f}"
        deviation = Normalize()(context)[1].deviation.numpy()
        half_widths = {level: calibration.half_widths(level, channel, deviation)[0] for level in levels}
        shown = windows.whole_context(number), test.target[place], test.forecast[place]
        drawn.append(DrawnWindow(title, *shown, half_widths))
    draw_windows(folder / "test.png", drawn)


def _write_json(path: Path, contents: dict) -> None:
    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


class History:
    """Writer of history.csv, with one row per validation, and of its plot history.png.

    A file that cannot be written, for example because Excel has it open on Windows, only causes a warning; it is
    written with the next row. The plot is updated at most once a second, and at the end. A resumed run begins with the
    rows of its `last`, as lists of cells; those of an earlier version have fewer columns.
    """

    def __init__(self, path: Path, rows: Sequence[list[str]] = ()):
        self.path = path
        self.rows = [[*row, *[""] * (len(HISTORY_COLUMNS) - len(row))] for row in rows]
        self._is_behind = self._has_warned = False
        self._drawn_at, self._rows_drawn = time.monotonic(), 0  # a short run is drawn once, at its end
        self._write()

    def add(self, **row: float | None) -> None:
        """Append a row; columns that are missing or None stay empty."""
        self.rows.append(["" if row.get(name) is None else str(row[name]) for name in HISTORY_COLUMNS])
        self._write()
        if time.monotonic() - self._drawn_at > 1:
            self._draw()

    def finish(self) -> None:
        """Draw the final plot, and write rows that could not be written before, or warn that they are missing."""
        if self._rows_drawn < len(self.rows):
            self._draw()
        if self._is_behind:
            self._write()
        if self._is_behind:
            print(f"Warning: {self.path} lacks the last rows: they are in {self.path.with_name('last')}", flush=True)

    def _write(self) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([HISTORY_COLUMNS, *self.rows])
        self._is_behind = not self._is_written(lambda: write_text(self.path, text.getvalue()))

    def _draw(self) -> None:
        self._drawn_at, self._rows_drawn = time.monotonic(), len(self.rows)
        rows = [dict(zip(HISTORY_COLUMNS, row, strict=False)) for row in self.rows]
        self._is_written(lambda: draw_history(self.path.with_suffix(".png"), rows))

    def _is_written(self, write: Callable[[], None]) -> bool:
        """Write a file and return whether that succeeded; only the first failure prints a warning."""
        try:
            write()
            return True
        except UserError as problem:
            if not self._has_warned:
                print(f"Warning: {problem}; training continues, the next validation tries again", flush=True)
            self._has_warned = True
            return False
