"""Pictures with their captions in training order: what a stage's batches are made from."""

import dataclasses
from typing import Any

import numpy as np

from infra.images import PictureTable, decode_table, uniforms
from infra.loader import SampleStream, ShardSet

CAPTION_STREAM = 1 << 34
"""added to the seed, so that the choice of captions does not follow the augmentation's numbers"""


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
    """The distinct pictures of a shard folder, decoded once, in an order that the seed decides.

    A picture that several shard samples share is one sample here, and brings `captions` of its
    captions, drawn anew in each epoch: encoding a picture costs many times what a caption does, so
    each is made to learn from several.

    Memory: 4 * size_px**2 bytes for each distinct picture.
    """

    def __init__(self, shards: ShardSet, *, seed: int, size_px: int, captions: int = 1) -> None:
        samples = list(shards)
        encoded = [sample.image_bytes for sample in samples]
        self._table: PictureTable = decode_table(encoded, size_px)
        self._metas: list[list[dict[str, Any]]] = [[] for _ in self._table.pictures]
        for sample, picture in zip(samples, self._table.index, strict=True):
            self._metas[picture].append(sample.meta)
        self._most = max(len(metas) for metas in self._metas)
        self._seed, self._captions = seed, captions
        self._order = SampleStream(len(self._metas), seed)

    def __len__(self) -> int:
        """Samples of an epoch: distinct pictures."""
        return len(self._metas)

    def take(self, step: int, batch: int, rank: int, ranks: int) -> Pairs:
        """This rank's slice of global batch number `step`."""
        positions = self._order.rank_indices(step, batch, rank, ranks)
        draws = uniforms(self._seed + CAPTION_STREAM, positions, self._most)
        chosen = [
            self._choose(picture, row) for (_, picture), row in zip(positions, draws, strict=True)
        ]
        return Pairs(
            positions=positions,
            rgba=self._table.pictures[[picture for _, picture in positions]],
            metas=[list(column) for column in zip(*chosen, strict=True)],
        )

    def _choose(self, picture: int, draws: np.ndarray) -> list[dict[str, Any]]:
        """`captions` of a picture's captions in random order, again from the first if too few."""
        metas = self._metas[picture]
        order = draws[: len(metas)].argsort()
        return [metas[order[k % len(order)]] for k in range(self._captions)]
