"""What needs no learning: the nearest training picture by HOG features and a grid of colours.

Letters: N pictures under test, T training pictures, C classes, F features.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from vlfoundry.eval.datasets.folders import ConceptSet
from vlfoundry.eval.datasets.pictures import decode_squares

SIDE_PX = 64
BATCH = 256


def picture_features(data: ConceptSet) -> np.ndarray:
    """Features of all pictures, on white: float32 [N, F]."""
    from vlfoundry.infra.data.images.bulk import hog_features

    shown, which = data.files
    parts = []
    for start in range(0, len(shown), BATCH):
        part = shown[start : start + BATCH]
        names = [file.where for file in part]
        parts.append(hog_features(decode_squares([f.data for f in part], SIDE_PX, names=names)))
    return np.concatenate(parts)[which]


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 [N, T] from [N, F] and [T, F]."""
    cross = left @ right.T
    lengths = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None, :]
    return np.maximum(lengths - 2 * cross, 0)


class NearestPicture:
    """Says of each picture under test how near the nearest training picture of each class is."""

    def __init__(self, train: ConceptSet, data: ConceptSet) -> None:
        self._train, self._data = train, data
        self.concepts = tuple(sorted({*train.drawn, *data.drawn}))

    @cached_property
    def _table(self) -> np.ndarray:
        distances = squared_distances(picture_features(self._data), picture_features(self._train))
        column = {concept: index for index, concept in enumerate(self.concepts)}
        owner = np.array([column[picture.concept] for picture in self._train.pictures])
        table = np.full((len(self._data), len(self.concepts)), -np.inf, np.float32)
        for index in np.unique(owner):
            table[:, index] = -distances[:, owner == index].min(axis=1)
        return table

    def scores(self, concepts: Sequence[str]) -> np.ndarray:
        """Minus the distance to the nearest picture of each concept: float32 [N, C].

        A concept without a training picture gets minus infinity.
        """
        column = {concept: index for index, concept in enumerate(self.concepts)}
        return self._table[:, [column[concept] for concept in concepts]]
