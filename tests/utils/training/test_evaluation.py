import numpy as np
import pytest
import torch
from accelerate import Accelerator

from data_provider.data_factory import data_provider
from utils.cli.options import get_parser
from utils.errors import UserError
from utils.training.evaluation import Split, evaluate


class LastValue(torch.nn.Module):
    """Forecast the last value seen; say in which mode."""

    def forward(self, windows):
        assert not self.training
        return windows[:, -1:].repeat(1, 8, 1)


@pytest.fixture
def scored(flags):
    """Return a function that scores LastValue on the test windows, and those windows."""

    def score(*more, target=None):
        args = get_parser().parse_args([*flags, "--eval_windows", "0", *more])
        dataset, loader = data_provider(args, "test")
        accelerator = Accelerator()
        return evaluate(accelerator, LastValue(), Split(dataset, accelerator.prepare(loader)), target), dataset

    return score


def errors_by_hand(dataset, indices):
    """Squared and absolute errors, (windows, 2, pred_len)."""
    errors = []
    for index in indices:
        seq_x, seq_y, *_ = dataset[index]
        error = seq_y[-8:, 0].astype(np.float64) - seq_x[-1, 0]
        errors.append([error**2, abs(error)])
    return np.array(errors)


@pytest.mark.parametrize("batch", ["1", "100", "1000"])
def test_every_window_counts_the_same_whatever_the_batch(scored, batch):
    scores, dataset = scored("--eval_batch_size", batch)
    by_hand = errors_by_hand(dataset, range(len(dataset))).mean((0, 2))
    assert (scores.mse, scores.mae) == pytest.approx(tuple(by_hand), rel=1e-6)
    assert scores.windows == 511


def test_channels_are_scored_by_their_own_windows(scored):
    scores, dataset = scored("--eval_windows", "50")
    by_hand = errors_by_hand(dataset, range(73, 146))  # HULL is the second channel, of 73 windows
    spaced = [index for index in np.linspace(0, 510, 50).round().astype(int) if 73 <= index < 146]
    assert scores.per_channel["HULL"]["windows"] == len(spaced)
    few = by_hand[[index - 73 for index in spaced]].mean((0, 2))
    assert (scores.per_channel["HULL"]["mse"], scores.per_channel["HULL"]["mae"]) == pytest.approx(tuple(few), rel=1e-6)
    assert sum(channel["windows"] for channel in scores.per_channel.values()) == 50


def test_a_target_without_a_window_is_an_error(scored):
    assert scored(target="OT")[0].windows == 73
    with pytest.raises(UserError, match="HULL"):
        scored("--eval_windows", "1", "--features", "MS", "--target", "HULL", target="HULL")


def test_the_model_goes_on_in_the_mode_it_came_in(flags):
    dataset, loader = data_provider(get_parser().parse_args(flags), "val")
    for training in (True, False):
        model = LastValue().train(training)
        evaluate(Accelerator(), model, Split(dataset, loader))
        assert model.training is training
