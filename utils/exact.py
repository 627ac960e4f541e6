"""Mean and variance that are identical on every machine."""

import math

import numpy as np

# The largest distance from the mean, in standard deviations, whose squared errors stay well within float32.
FARTHEST = 1e12

# The largest magnitude whose sums of squares stay within float64.
HUGE = 1e150


def mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    """Compute the mean and the population variance of float64 values, (n,).

    The rounding of an ordinary sum depends on the order in which a CPU adds; `math.fsum` rounds only once, at the end.
    IEEE 754 defines every other operation here exactly. So no bit depends on the CPU, the versions of libraries or the
    order of the values.
    """
    mean = math.fsum(values.tolist()) / len(values)
    deviations = values - mean
    return mean, math.fsum((deviations * deviations).tolist()) / len(values)
