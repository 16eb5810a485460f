"""Random numbers that are a function of where they are needed, and not of what was drawn before."""

import numpy as np


def mix64(words: np.ndarray) -> np.ndarray:
    """SplitMix64's step (Steele et al. 2014): uint64 -> uint64, every bit depending on all."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
