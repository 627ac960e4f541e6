import numpy as np
import pandas as pd
import pytest

from data_provider.timefeatures import integer_features, scaled_features
from utils.errors import UserError

DATES = pd.DatetimeIndex(["2024-01-01 00:00:00", "2024-12-31 23:59:59"])


@pytest.mark.parametrize(
    ("freq", "count"),
    [
        *(("h", 4), ("H", 4), ("2h", 4), ("t", 5), ("min", 5), ("15min", 5), ("15t", 5), ("s", 6), ("d", 3)),
        *(("b", 3), ("w", 2), ("W-SUN", 2), ("m", 1), ("ME", 1), ("QE-DEC", 1), ("y", 0)),
    ],
)
def test_each_step_has_its_features(freq, count):
    features = scaled_features(DATES, freq)
    assert features.shape == (2, count)
    assert features.dtype == np.float32


def test_scaled_features_run_from_minus_half_to_half():
    seconds = scaled_features(DATES, "s")
    np.testing.assert_allclose(seconds[0], [-0.5] * 6)  # second, minute, hour, weekday (a Monday), day, day of year
    np.testing.assert_allclose(seconds[1], [0.5, 0.5, 0.5, 1 / 6 - 0.5, 0.5, 0.5], atol=1e-6)  # a leap year's 366th
    np.testing.assert_allclose(scaled_features(DATES, "m")[:, 0], [-0.5, 0.5])


def test_integer_features_are_calendar_numbers():
    assert integer_features(DATES, quarter_hours=False).tolist() == [[1, 1, 0, 0], [12, 31, 1, 23]]
    assert integer_features(DATES, quarter_hours=True)[:, 4].tolist() == [0, 3]


@pytest.mark.parametrize("freq", ["", "fortnight", "5", "h5", "15 min", "ms"])
def test_an_unknown_step_is_refused(freq):
    with pytest.raises(UserError, match="--freq"):
        scaled_features(DATES, freq)
