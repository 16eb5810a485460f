"""Several data sets as one stream, in given proportions.

Every window of WINDOW global samples holds the same number of each source, in an order of its own.
So sample g is known without those before it, and the state is (seed, global index) as ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.data.shards.read import SampleStream, global_order, rank_slice

WINDOW = 1 << 14


class SampleRef(NamedTuple):
    """One sample of a mixture."""

    source: str
    epoch: int
    """of the source, each of which has epochs of its own"""
    index: int


@dataclass(frozen=True)
class _Order:
    """One window: who comes at each place, and which of its samples in this window it is."""

    source: np.ndarray
    number: np.ndarray


class Mixture:
    """The endless stream over several sources, each in its own global shuffle.

    Args:
        lengths: samples of each source.
        weights: how often each comes, relatively; None: the square root of its length, as
            InternVL mixes its data sets.
        seed: of all orders.

    Raises:
        ConfigError: sources and weights do not go together, or a weight is too small to be kept.
    """

    def __init__(
        self, lengths: Mapping[str, int], weights: Mapping[str, float] | None = None, *, seed: int
    ) -> None:
        if weights is None:
            weights = {name: math.sqrt(length) for name, length in lengths.items()}
        self.counts = _counts(lengths, weights)
        """samples of each source in a window"""
        self._seed = seed
        self._streams = [
            # Sources of one length would otherwise be permuted alike.
            SampleStream(lengths[name], stream_seed(seed, Stream.SOURCES, number))
            for number, name in enumerate(self.counts)
        ]
        self._windows: dict[int, _Order] = {}

    def indices(self, start: int, count: int) -> list[SampleRef]:
        """The global samples start, start + 1, ..., start + count - 1."""
        names = list(self.counts)
        each = np.array(list(self.counts.values()))
        windows, places = np.divmod(np.arange(start, start + count), WINDOW)
        source, number = np.empty_like(places), np.empty_like(places)
        for window in np.unique(windows).tolist():
            here, order = windows == window, self._window(window)
            source[here] = order.source[places[here]]
            number[here] = order.number[places[here]] + window * each[source[here]]
        result: list[SampleRef | None] = [None] * count
        for which in np.unique(source).tolist():
            rows = np.flatnonzero(source == which)
            found = self._streams[which].at(number[rows])
            for row, (epoch, index) in zip(rows.tolist(), found, strict=True):
                result[row] = SampleRef(names[which], epoch, index)
        return [place for place in result if place is not None]

    def rank_indices(self, step: int, batch: int, rank: int, ranks: int) -> list[SampleRef]:
        """The contiguous slice of global batch `step` that belongs to `rank` of `ranks`."""
        return self.indices(*rank_slice(step, batch, rank, ranks))

    def _window(self, window: int) -> _Order:
        if window not in self._windows:
            if len(self._windows) >= 2:  # a batch is shorter than a window
                del self._windows[min(self._windows)]
            each = np.array(list(self.counts.values()))
            order = global_order(WINDOW, stream_seed(self._seed, Stream.MIXTURE), window)
            source = np.repeat(np.arange(len(each)), each)[order]
            number = np.empty_like(source)
            number[source.argsort(kind="stable")] = np.concatenate([np.arange(n) for n in each])
            self._windows[window] = _Order(source, number)
        return self._windows[window]


def _counts(lengths: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """How many of a window each source gets: its share, rounded by largest remainder."""
    if not lengths or set(lengths) != set(weights):
        raise ConfigError(
            f"a mixture has weights for {sorted(weights)}, expected one for each of its sources "
            f"{sorted(lengths)}"
        )
    bad = {name: weight for name, weight in weights.items() if not 0 < weight < math.inf}
    if bad:
        raise ConfigError(f"weights of a mixture are {bad}, expected more than 0; or leave it out")
    names = sorted(lengths)
    total = math.fsum(weights.values())
    shares = [WINDOW * weights[name] / total for name in names]
    counts = {name: int(share) for name, share in zip(names, shares, strict=True)}
    left = WINDOW - sum(counts.values())
    by_remainder = sorted(zip(names, shares, strict=True), key=lambda it: (-(it[1] % 1), it[0]))
    for name, _ in by_remainder[:left]:
        counts[name] += 1
    if not all(counts.values()):
        rare = [name for name, count in counts.items() if not count]
        raise ConfigError(
            f"{rare} would come less than once in {WINDOW} samples of the mixture; "
            "raise its weight or leave it out"
        )
    return counts
