"""Pictures with their captions in training order: what a stage's batches are made from."""

import dataclasses
from typing import Any

import numpy as np

from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.data.images.bulk import decode_rgba, uniforms
from vlfoundry.infra.data.shards.read import SampleStream, ShardSet

KEEP_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """The part of one global batch that belongs to one rank."""

    positions: list[tuple[int, int]]
    """(epoch, picture) of each sample: what its randomness depends on."""
    rgba: np.ndarray
    """uint8 [N, S, S, 4]"""
    metas: list[list[dict[str, Any]]]
    """[M][N]: caption, language, concept, ... of each sample, M times."""

    @property
    def captions(self) -> list[str]:
        """The captions, all first ones, then all second ones, ...: M * N."""
        return [meta["caption"] for metas in self.metas for meta in metas]


class PairStream:
    """The distinct pictures of a shard folder, in an order that the seed decides.

    A picture that several shard samples share is one sample here, and brings `captions` of its
    captions, drawn anew in each epoch: encoding a picture costs many times what a caption does, so
    each is made to learn from several.

    What a step needs is read then, and pictures are decoded when they are first seen. Decoded ones
    are kept up to `keep_bytes`: with few enough of them only the first epoch decodes, and any
    number will do.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        seed: int,
        size_px: int,
        captions: int = 1,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self._shards, self._size_px, self._keep_bytes = shards, size_px, keep_bytes
        self._seed, self._captions = seed, captions
        # The samples of picture p are order[starts[p] : starts[p + 1]].
        self._samples = shards.pictures.argsort(kind="stable")
        counts = np.bincount(shards.pictures)
        self._starts = np.concatenate([[0], counts.cumsum()])
        self._most = int(counts.max())
        self._order = SampleStream(len(counts), seed)
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Samples of an epoch: distinct pictures."""
        return len(self._starts) - 1

    def take(self, step: int, batch: int, rank: int, ranks: int) -> Pairs:
        """This rank's slice of global batch number `step`."""
        positions = self._order.rank_indices(step, batch, rank, ranks)
        draws = uniforms(stream_seed(self._seed, Stream.CAPTIONS), positions, self._most)
        chosen = [
            self._choose(picture, row) for (_, picture), row in zip(positions, draws, strict=True)
        ]
        columns = list(zip(*chosen, strict=True))
        metas = iter(self._shards.metas([sample for column in columns for sample in column]))
        return Pairs(
            positions=positions,
            rgba=self._pictures([picture for _, picture in positions]),
            metas=[[next(metas) for _ in column] for column in columns],
        )

    def _choose(self, picture: int, draws: np.ndarray) -> list[int]:
        """`captions` of a picture's samples in random order, again from the first if too few."""
        samples = self._samples[self._starts[picture] : self._starts[picture + 1]]
        order = draws[: len(samples)].argsort()
        return [int(samples[order[k % len(order)]]) for k in range(self._captions)]

    def _pictures(self, numbers: list[int]) -> np.ndarray:
        """uint8 [N, S, S, 4]"""
        new = sorted(set(numbers) - self._kept.keys())
        samples = [int(self._samples[self._starts[number]]) for number in new]
        decoded = {}
        for number, i, data in zip(new, samples, self._shards.images(samples), strict=True):
            with self._shards.named(i):
                decoded[number] = decode_rgba(data, self._size_px)
        found = [decoded[n] if n in decoded else self._kept[n] for n in numbers]
        room = self._keep_bytes // (4 * self._size_px**2) - len(self._kept)
        self._kept |= dict(list(decoded.items())[: max(0, room)])
        return np.stack(found)
