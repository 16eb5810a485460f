"""How a model is given pictures: the one table, for training, evaluation and use.

Letters: S side of a square that the vision tower takes (px), N such squares of one picture.
Sources: the transforms of clip_benchmark, the caption evaluation and the chat code of
OpenGVLab/InternVL at 2410d1d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.data.images.bulk import composite
from vlfoundry.infra.data.images.geometry import crop, squeeze

if TYPE_CHECKING:
    from vlfoundry.infra.data.images.decode import Picture
    from vlfoundry.models.preprocess.tiling import Tiling

Geometry = Literal["tiles", "squeeze", "pad", "crop"]
Task = Literal["train", "zero_shot", "linear_probe", "retrieval", "caption", "chat"]

TASKS: dict[Task, Geometry] = {
    "train": "squeeze",  # stages 1 and 2, whose augmentation crops and stretches
    "zero_shot": "crop",
    "linear_probe": "crop",
    "retrieval": "squeeze",
    "caption": "squeeze",
}
"""what is done with a picture where the model is no chat model; a chat model has its own way, the
one that it was trained with, whatever it is asked for"""
WORDS: dict[Geometry, str] = {
    "tiles": "tiles: cut into squares by the nearest grid, and a thumbnail of the whole",
    "squeeze": "squeeze: the whole picture as one square, its proportions not kept",
    "pad": "pad: the shorter side filled up with ImageNet's mean colour to a square",
    "crop": "crop: the middle square",
}
CHAT = "chat"


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How a chat model is given pictures, in training and when it is asked."""

    geometry: Geometry = "tiles"
    """tiles (dynamic resolution, InternVL 1.5 and later), squeeze (1.1 and 1.2), pad (1.0, and
    `pad2square`) or crop (LLaVA's form without `image_aspect_ratio`)"""
    min_tiles: int = 1
    """fewest tiles of a grid"""
    max_tiles: int = 6
    """most tiles of a grid; the thumbnail comes on top"""
    thumbnail: bool = True
    """whether the whole picture follows the tiles of a grid of more than one"""

    def __post_init__(self) -> None:
        if self.geometry not in WORDS:
            raise ConfigError(
                f"pictures.geometry is {self.geometry!r}, expected one of {sorted(WORDS)}"
            )
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(
                f"pictures.min_tiles is {self.min_tiles} and max_tiles {self.max_tiles}, "
                "expected 1 <= min_tiles <= max_tiles"
            )

    def tiling(self, side_px: int) -> Tiling:
        """The same as the tiling of squares of this side."""
        from vlfoundry.models.preprocess.tiling import Tiling

        if self.geometry != "tiles":
            return Tiling(tile_px=side_px, max_tiles=1, thumbnail=False, fit=self.geometry)
        return Tiling(
            tile_px=side_px,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            thumbnail=self.thumbnail,
        )


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How one model is given pictures."""

    chats: bool
    """whether it is a chat model"""
    side_px: int
    """S"""
    pictures: PictureConfig
    """a chat model's way"""

    def geometry(self, task: str) -> Geometry:
        """What is done with a picture. Raises ConfigError for a task that there is not."""
        if self.chats:
            return self.pictures.geometry
        if task not in TASKS:
            raise ConfigError(
                f"task {task!r} is none of a model that does not chat; choose from {list(TASKS)}"
            )
        return TASKS[task]

    def squares(self, picture: Picture, task: str) -> np.ndarray:
        """What the vision tower is given of one picture: uint8 [N, S, S, 3], on white.

        Raises DataError if it cannot be read.
        """
        geometry = self.geometry(task)
        if self.chats:
            from vlfoundry.models.preprocess.tiling import tile

            return tile(picture, self.pictures.tiling(self.side_px))
        from vlfoundry.infra.data.images import (
            decode,
        )  # Pillow: not where only numbers of models are asked for

        return composite(_SQUARES[geometry](decode.pixels(picture), self.side_px))[None]


_SQUARES: dict[Geometry, Callable[[np.ndarray, int], np.ndarray]] = {
    "squeeze": squeeze,
    "crop": crop,
}
