"""Mean and variance that come out alike on every machine."""

import math

import numpy as np

# Deviations from the mean beyond which the squares of an error would leave float32.
FARTHEST = 1e12

# Numbers beyond which a sum of squares would leave float64.
HUGE = 1e150


def mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and the variance (over n) of some float64 numbers, (n,).

    The last digits of a sum depend on the order in which the CPU at hand adds; `math.fsum` rounds once, at the
    end. Everything else here is a single operation, whose result IEEE 754 prescribes. So neither the CPU, nor a
    library's version, nor the order of the values changes a bit.
    """
    mean = math.fsum(values.tolist()) / len(values)
    apart = values - mean
    return mean, math.fsum((apart * apart).tolist()) / len(values)
