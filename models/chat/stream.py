"""Several sources of conversations as one endless stream in training order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.data.shards.mixture import Mixture
from vlfoundry.models.chat.examples import Conversations, Example

Source = Conversations | Callable[[int], Example]
"""a chat file, or whatever makes the example for any number"""


class ConversationStream:
    """Sample g of the stream depends on (seed, g) alone.

    Args:
        sources: by name.
        weights: of each: how often it comes, relatively; None: the square root of how many
            conversations it has.
        seed: of all orders and draws.
    """

    def __init__(
        self, sources: Mapping[str, Source], weights: Mapping[str, float | None], *, seed: int
    ) -> None:
        self._sources, self._seed = dict(sources), seed
        # What has no end has no epochs: it is asked for the number of the sample in the stream.
        lengths = {n: len(s) if isinstance(s, Conversations) else 1 for n, s in sources.items()}
        self._mixture = Mixture(
            lengths,
            {n: math.sqrt(lengths[n]) if w is None else w for n, w in weights.items()},
            seed=seed,
        )

    def take(self, first: int, count: int) -> list[Example]:
        """The samples first, first + 1, ..."""
        places = self._mixture.indices(first, count)
        return [
            self._example(number, place.source, place.epoch, place.index)
            for number, place in enumerate(places, start=first)
        ]

    def _example(self, number: int, name: str, epoch: int, index: int) -> Example:
        source = self._sources[name]
        if not isinstance(source, Conversations):
            return source(number)
        key = [stream_seed(self._seed, Stream.CHAT), (epoch << 32) + index]
        return source.example(index, np.random.Generator(np.random.Philox(key=key)))
