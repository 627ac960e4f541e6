"""--report_to tensorboard."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from utils.training import reporting


def scalars(folder):
    """Read what event files hold: records of a length, its checksum, an event and its checksum."""
    found = []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[12 + length + 4 :]
    return found


def test_tensorboard_is_told_what_the_history_says(run, flags):
    flags = [*flags, "--max_steps", 6, "--eval_steps", 2]
    plain = run(*flags).metrics()["mse"]
    done = run(*flags, "--report_to", "tensorboard", "--des", "told", "--max_steps", 4)
    done = run(*flags, "--report_to", "tensorboard", "--des", "told", "--resume")
    assert done.code == 0, done.err
    (folder,) = (folder for folder in done.folders if "_told_" in folder.name)
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["mse"] == plain
    told = scalars(folder / "tensorboard")
    for row in done._replace(folders=[folder]).history():
        for name in ("lr", "train_loss", "vali_loss", "test_loss", "attention_entropy"):
            values = [value for step, tag, value in told if (step, tag) == (int(row["steps"]), name)]
            assert values == [pytest.approx(float(row[name]), rel=1e-6)]


def test_an_earlier_run_of_the_name_keeps_its_own(run, flags):
    for _ in range(2):
        folder = run(*flags, "--report_to", "tensorboard").folder
    assert len({step for step, _, _ in scalars(folder / "tensorboard")}) == 1
    assert scalars(folder / "tensorboard.old")


def test_by_default_nobody_is_told(run, flags):
    assert not (run(*flags).folder / "tensorboard").exists()


def test_a_package_that_is_missing_is_named(assert_refused, flags, monkeypatch):
    monkeypatch.setattr(reporting, "is_tensorboard_available", lambda: False)
    assert_refused([*flags, "--report_to", "tensorboard"], "--report_to tensorboard", "pip install tensorboard")
