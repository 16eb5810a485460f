"""What every metric asks of its inputs."""

from collections.abc import Sized

import numpy as np

from vlfoundry.infra.core.errors import DataError


def same_length(**named: Sized) -> int:
    """The common length of the named inputs. Raises DataError if they differ or are empty."""
    lengths = {name: len(values) for name, values in named.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"inputs of different length: {lengths}; give one of each an item")
    (length,) = set(lengths.values())
    if not length:
        raise DataError(f"no items to score: {' and '.join(lengths)} are empty")
    return length


def table(name: str, values: object, dimensions: int = 2) -> np.ndarray:
    """`values` as a float64 array. Raises DataError unless it is finite, full and not empty."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: rows of different length, or not numbers: {error}") from error
    if array.ndim != dimensions or not array.size:
        raise DataError(f"{name} has shape {array.shape}, expected {dimensions} dimensions, none 0")
    if not np.isfinite(array).all():
        raise DataError(f"{name} holds values that are not finite; a model gave them: find out why")
    return array


def indices(name: str, values: object, below: int) -> np.ndarray:
    """`values` as int64 [N]. Raises DataError unless each is whole and from 0 to `below` - 1."""
    array = table(name, values, 1)
    if (array != np.floor(array)).any() or array.min() < 0 or array.max() >= below:
        raise DataError(f"{name} must be whole numbers from 0 to {below - 1}")
    return array.astype(np.int64)
