"""Uncertainty of a mean over items."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of the mean; for shares the binomial sqrt(p (1 - p) / n)."""
    return float(np.std(values) / math.sqrt(len(values)))


def wilson_interval(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share: honest near 0 and 1, where p +- 2 stderr is not.

    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    denominator = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, rounds: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over `rounds` seeded resamplings of the items."""
    numbers = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(rounds)
    for index in range(rounds):
        means[index] = numbers[rng.integers(0, len(numbers), len(numbers))].mean()
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
