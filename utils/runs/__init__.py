"""What a run leaves: checkpoints, records, pictures; and the way back from a run folder to forecasts."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.runs.trained import TrainedRun


def load_run(folder: str | Path, device: str | None = None, **changes: object) -> "TrainedRun":
    """Load a trained run, to forecast from Python.

        from utils.runs import load_run

        run = load_run("checkpoints/RUN")
        forecast = run.predict(frame)                    # a DataFrame, as forecast.csv has it
        forecast = run.predict(frame, level=[80, 95])    # with intervals, if the run was tested with --level

    `frame` is like the run's CSV: a column `date`, or dates as index, and the run's channels. The LLM is loaded once
    and stays; the figures are those of `--predict`, to the last digit.

    Args:
        folder: the run folder, with a checkpoint.
        device: such as "cpu" or "cuda:1"; None for the first GPU if there is one.
        changes: flags that are different now, such as `llm_model_path` if the LLM's folder was moved.

    Raises:
        UserError: if there is no checkpoint, or the LLM is not the run's.
    """
    from utils.runs.trained import TrainedRun  # torch takes seconds to import: `utils.runs.finished` does without

    return TrainedRun.load(Path(folder), device, **changes)
