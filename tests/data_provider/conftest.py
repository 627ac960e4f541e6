from collections.abc import Callable

import pandas as pd
import pytest

from tests.conftest import Finished

# A short training run of a plain forecaster.
FLAGS = [
    *("--data", "custom", "--seq_len", "48", "--label_len", "8", "--pred_len", "12", "--learning_rate", "0.003"),
    *("--max_steps", "60", "--lradj", "constant", "--eval_windows", "300", "--skip_epoch_test", "--patch_len", "8"),
]


@pytest.fixture
def trained(run, tmp_path) -> Callable[..., Finished]:
    """Return a function that trains on a frame, as NAME.csv, and returns the run."""

    def train(name: str, frame: pd.DataFrame, *more: str) -> Finished:
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        here = ["--root_path", tmp_path, "--data_path", f"{name}.csv", "--model_id", name]
        done = run(*FLAGS, *here, *(() if "--model" in more else ("--model", "DLinear")), *more)
        assert done.code == 0, done.err
        return done._replace(folders=[folder for folder in done.folders if f"forecast_{name}_" in folder.name])

    return train
