"""Random numbers that are a function of where they are needed, and not of what was drawn before."""

from collections.abc import Sequence

import numpy as np


def mix64(words: np.ndarray) -> np.ndarray:
    """SplitMix64's step (Steele et al. 2014): uint64 -> uint64, every bit depending on all."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def numbers_of(seed: int, positions: Sequence[tuple[int, int]]) -> np.ndarray:
    """A number of its own for each (epoch, index), by one round for each key part. uint64 [N]."""
    keys = np.asarray(positions, np.uint64).reshape(-1, 2)
    with np.errstate(over="ignore"):
        state = mix64(np.full(len(keys), seed & 0xFFFFFFFFFFFFFFFF, np.uint64))
        state = mix64(state ^ mix64(keys[:, 0] + np.uint64(0x51ED270B)))
        return mix64(state ^ mix64(keys[:, 1] + np.uint64(0xA3C59AC3)))
