"""Tell TensorBoard of a run, through accelerate's tracker."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import is_tensorboard_available

from utils.errors import UserError


def check_reporting(report_to: str) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        UserError: names the package.
    """
    if report_to == "tensorboard" and not is_tensorboard_available():
        raise UserError("--report_to tensorboard needs the package tensorboard: pip install tensorboard")


def start_reporting(accelerator: Accelerator, report_to: str, folder: Path, flags: dict) -> None:
    """Let `accelerator.log` write to a folder `tensorboard` in the run folder, beginning with the run's flags."""
    if report_to == "none":
        return
    accelerator.log_with = [TensorBoardTracker("tensorboard", folder)]
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flags.items()}
    accelerator.init_trackers("tensorboard", plain)


def stop_reporting(accelerator: Accelerator) -> None:
    """Close what `start_reporting` has opened."""
    for tracker in accelerator.trackers:
        tracker.finish()
