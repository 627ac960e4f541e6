"""Run folders: checkpoints, records and plots, and `load_run` to forecast with a trained run."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.runs.trained import TrainedRun


def load_run(folder: str | Path, device: str | None = None, **changes: object) -> "TrainedRun":
    """Load a trained run to forecast from Python.

        from utils.runs import load_run

        run = load_run("checkpoints/RUN")
        forecast = run.predict(frame)                    # a DataFrame with the columns of forecast.csv
        forecast = run.predict(frame, level=[80, 95])    # with intervals, if the run was tested with --level

    For the columns of `frame`, see `TrainedRun.predict`. The forecasts equal those of `--predict` to the last digit.

    Args:
        folder: the run folder.
        device: such as "cpu" or "cuda:1"; None for the first GPU, or the CPU if there is no GPU.
        changes: flags that differ from the run's, such as `llm_model_path` if the LLM's folder was moved.

    Raises:
        UserError: if the folder has no checkpoint, or the LLM is not the run's.
    """
    from utils.runs.trained import TrainedRun  # importing torch takes seconds; `utils.runs.finished` does not need it

    return TrainedRun.load(Path(folder), device, **changes)
