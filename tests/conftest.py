"""What the tests share: tiny LLMs, small CSVs, and the command line run in a folder of its own."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Before torch is loaded, and for the processes that tests start: two workers share the cores, and threads of the one
# that wait for each other would take them from the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import run_main
from base_models.make_tiny_llm import make_tiny_llm
from dataset.demo import write_demo_csv
from utils.memory import trial_step
from utils.runs import pictures
from utils.system.files import atomic_write

PNG = b"\x89PNG"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the kill test kills a run")
    parser.addoption("--fuzz", type=int, default=15, help="examples of each fuzz test")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Write pictures without drawing them, which takes a third of a short run, but in tests with the marker `draws`."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(pictures, "save_picture", lambda _, path: atomic_write(path, lambda file: file.write(PNG)))


@pytest.fixture(autouse=True, scope="session")
def small_rounds():
    """Fit fewer trees between two looks at the validation error: the small data of tests need few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_provider.boosting._TREES_OF_ROUND", 15)
        yield


# Flags that no memory plan depends on.
WITHOUT_PLAN = {
    *("checkpoints", "checkpoint", "model_id", "model_comment", "des", "root_path", "data_path", "is_training"),
    *("max_steps", "train_epochs", "patience", "learning_rate", "lradj", "grad_clip", "mapping_rate", "residual_rate"),
    *("eval_windows", "eval_steps", "eval_batch_size", "test_windows", "skip_epoch_test", "save_steps", "resume"),
    *("itr", "seed", "level", "save_predictions", "predict", "report_to", "optimizer", "grad_accum"),
}
PLANS = {}


@pytest.fixture(autouse=True)
def shared_plans(request, monkeypatch):
    """Plan the memory of equal runs once, which takes a quarter of a short run, but in the tests of plans."""
    if "memory" in request.path.parts:
        return
    try_steps = trial_step.try_steps

    def try_once(args, device):
        config = Path(args.llm_model_path) / "config.json"
        changed = config.stat().st_mtime_ns if config.is_file() else 0
        key = (changed, *(f"{name}={value}" for name, value in vars(args).items() if name not in WITHOUT_PLAN))
        if key not in PLANS:
            PLANS[key] = try_steps(args, device)
        return PLANS[key]

    monkeypatch.setattr(trial_step, "try_steps", try_once)


def needs_shared(*parts: str) -> pytest.MarkDecorator:
    """Skip a test whose figures of the original code are not beside the checkout."""
    path = SHARED.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f"no {path}: the original's figures are not there")


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Callable[[str], str]:
    """Return a function from a family's name to the folder of its tiny LLM."""
    folder = tmp_path_factory.mktemp("llm")
    return lambda family: str(make_tiny_llm(family, folder / family))


@pytest.fixture(scope="session")
def csv_folder(tmp_path_factory) -> Path:
    """A folder with small.csv, 400 hours of seven channels."""
    return write_demo_csv(tmp_path_factory.mktemp("data") / "small.csv", rows=400).parent


@pytest.fixture
def flags(csv_folder, tiny_llm) -> list[str]:
    """The flags of a run that takes a second."""
    return [
        *("--data", "custom", "--root_path", str(csv_folder), "--data_path", "small.csv"),
        *("--seq_len", "48", "--label_len", "8", "--pred_len", "8", "--d_model", "8", "--n_heads", "2"),
        *("--d_ff", "8", "--batch_size", "16", "--llm_model_path", tiny_llm("qwen2"), "--content", "Demo.  "),
        *("--train_epochs", "1", "--max_steps", "4", "--eval_windows", "40", "--learning_rate", "0.01"),
    ]


class Finished(NamedTuple):
    """What a run left: exit code, what it printed, and its folders under checkpoints/."""

    code: int
    out: str
    err: str
    folders: list[Path]

    @property
    def folder(self) -> Path:
        (folder,) = self.folders
        return folder

    def metrics(self) -> dict:
        assert self.code == 0, self.err  # else they are an earlier run's
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    def history(self) -> list[dict[str, str]]:
        header, *rows = (self.folder / "history.csv").read_text(encoding="utf-8").splitlines()
        return [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., Finished]:
    """Return a function that runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_in_folder(*argv: str) -> Finished:
        code = run_main.main([str(word) for word in argv])
        printed = capsys.readouterr()
        return Finished(code, printed.out, printed.err, sorted(Path("checkpoints").glob("*")))

    return run_in_folder


@pytest.fixture
def assert_refused(run) -> Callable[..., None]:
    """Return a function that asserts: exit code 2, one line that holds these words, nothing written."""

    def check(argv: list[str], *words: str) -> None:
        finished = run(*argv)
        assert finished.code == 2
        assert finished.err.startswith("error: ")
        assert finished.err.count("\n") == 1, finished.err
        for word in words:
            assert word in finished.err
        assert not list(Path.cwd().iterdir()), "a refused run has written something"

    return check


def names_in(folder: Path) -> list[str]:
    """Return the names of a run folder's files but the lock's, which stays on some systems."""
    return sorted(file.name for file in folder.iterdir() if file.name != ".lock")


def largest_difference(one, other) -> float:
    """Return the largest difference, as a share of the largest value of `other`."""
    one, other = (np.asarray(values.detach() if hasattr(values, "detach") else values) for values in (one, other))
    return float(np.abs(one - other).max() / np.abs(other).max())
