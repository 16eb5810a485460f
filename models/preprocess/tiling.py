"""Dynamic resolution: one picture of any size to equal square tiles (InternVL 1.5 and later).

Letters: W x H size of the picture (px), S side of a tile (px), N tiles, the thumbnail among them.
A grid is (columns, rows). Source: `dynamic_preprocess` of OpenGVLab/InternVL at 2410d1d, whose
grids, boxes and (with `compat`) pixels are reproduced.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.data.images import decode
from vlfoundry.infra.data.images.decode import Encoded
from vlfoundry.infra.data.images.geometry import crop
from vlfoundry.models.preprocess.normalize import MEAN, over_background

if TYPE_CHECKING:
    from PIL.Image import Image

type Picture = Encoded | bytes | np.ndarray | Image
"""An encoded picture, upright uint8 [H, W, 3 or 4], or a Pillow image."""

WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How pictures are cut."""

    tile_px: int = 448
    """Side of a tile."""
    min_tiles: int = 1
    """Fewest tiles of a grid."""
    max_tiles: int = 12
    """Most tiles of a grid; the thumbnail comes on top."""
    thumbnail: bool = True
    """Append the whole picture as last tile wherever the grid has more than one."""
    fit: Literal["squeeze", "pad", "crop"] = "squeeze"
    """How a picture that is not cut becomes a square: its proportions not kept; ImageNet's mean
    colour added to the shorter side; or the middle of the longer side alone."""
    compat: bool = False
    """Pixels as the official code gives them under Pillow 13 (several times slower): bit-exact, and
    transparency is dropped and not laid on white, EXIF orientation is ignored, and grey of more
    than 8 bits is clipped. Otherwise at most 2 levels from Pillow 11.3,
    which published checkpoints saw; Pillow 13 is up to 12 levels from it."""

    def __post_init__(self) -> None:
        if self.tile_px < 1:
            raise ConfigError(f"tile_px is {self.tile_px}, expected 1 or more")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(
                f"min_tiles is {self.min_tiles} and max_tiles {self.max_tiles}, "
                "expected 1 <= min_tiles <= max_tiles"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of a picture; known from its size alone."""

    grid: tuple[int, int]
    """columns, rows"""
    tile_px: int
    """Side of a tile."""
    has_thumbnail: bool
    """Whether the whole picture follows the grid."""

    @property
    def resized_px(self) -> tuple[int, int]:
        """Width and height that the picture is stretched to before it is cut."""
        return self.grid[0] * self.tile_px, self.grid[1] * self.tile_px

    @property
    def tiles(self) -> int:
        """Pictures that the vision tower gets, the thumbnail among them."""
        return self.grid[0] * self.grid[1] + self.has_thumbnail

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of each tile of the grid, row by row, px."""
        side = self.tile_px
        return [
            (column * side, row * side, (column + 1) * side, (row + 1) * side)
            for row in range(self.grid[1])
            for column in range(self.grid[0])
        ]

    def tokens(self, patch_px: int = 14, merge: int = 2) -> int:
        """Visual tokens of the picture, without the two that mark its ends."""
        return self.tiles * tokens_per_tile(self.tile_px, patch_px, merge)


def tokens_per_tile(tile_px: int, patch_px: int = 14, merge: int = 2) -> int:
    """Visual tokens of one tile; pixel shuffle merges squares of merge x merge patches."""
    if tile_px % (patch_px * merge):
        raise ConfigError(
            f"tile_px is {tile_px}, expected a multiple of {patch_px * merge} "
            f"({patch_px} px a patch, {merge} x {merge} patches a token)"
        )
    return (tile_px // (patch_px * merge)) ** 2


def share_tiles(max_tiles: int, pictures: int) -> int:
    """The `max_tiles` of each picture of a sample that has several."""
    if max_tiles < 1 or pictures < 1:
        raise ConfigError(f"{max_tiles} tiles for {pictures} pictures, expected 1 or more of both")
    return max(1, max_tiles // pictures)


@functools.cache
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids of min_tiles to max_tiles tiles, the fewest tiles first."""
    grids = (
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    )
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], *grid)))


def closest_grid(width_px: int, height_px: int, config: Tiling) -> tuple[int, int]:
    """The grid whose ratio of columns to rows is nearest to W/H.

    Of equally near ones a larger is taken only while the picture fills more than half of it.
    Ratios are compared as doubles: the official ties are ties of doubles.
    """
    ratio = width_px / height_px
    best, nearest = (1, 1), float("inf")
    for columns, rows in candidate_grids(config.min_tiles, config.max_tiles):
        distance = abs(ratio - columns / rows)
        if distance < nearest or (
            distance == nearest
            and _fills_half(width_px * height_px, columns * rows * config.tile_px**2)
        ):
            best, nearest = (columns, rows), distance
    return best


def _fills_half(picture_px2: int, grid_px2: int) -> bool:
    return picture_px2 > 0.5 * grid_px2


def plan(width_px: int, height_px: int, config: Tiling | None = None) -> Plan:
    """Grid, thumbnail and number of tiles of a picture of this size, which need not be decoded."""
    config = config or Tiling()
    if width_px < 1 or height_px < 1:
        raise DataError(f"a picture of {width_px} x {height_px} px, expected 1 px or more each way")
    grid = closest_grid(width_px, height_px, config)
    return Plan(
        grid=grid, tile_px=config.tile_px, has_thumbnail=config.thumbnail and grid != (1, 1)
    )


def picture_size(picture: Encoded | bytes, *, compat: bool = False) -> tuple[int, int]:
    """Width and height (px) of an encoded picture, from its header: upright, but for `compat`."""
    data, where = _encoded(picture)
    return decode.picture_size(data, where, upright=not compat)


def tile(picture: Picture, config: Tiling | None = None) -> np.ndarray:
    """Cut one picture into uint8 [N, S, S, 3]: the grid row by row, then the thumbnail.

    The picture is stretched to the grid, its aspect ratio not kept; one that is not cut becomes a
    square as `fit` says. Raises DataError if it cannot be read.
    """
    config = config or Tiling()
    source = _Source(picture, config.compat)
    layout = plan(*source.full_px, config)
    (columns, rows), side = layout.grid, config.tile_px
    if config.fit != "squeeze" and layout.tiles == 1:
        return source.fitted(config.fit, side)
    whole = source.resized(layout.resized_px)
    tiles = np.empty((layout.tiles, side, side, 3), np.uint8)
    tiles[: rows * columns].reshape(rows, columns, side, side, 3)[:] = whole.reshape(
        rows, side, columns, side, 3
    ).swapaxes(1, 2)
    if layout.has_thumbnail:
        tiles[-1] = source.resized((side, side))
    return tiles


def single(
    picture: Picture, side_px: int = 448, *, pad: bool = False, compat: bool = False
) -> np.ndarray:
    """One picture as one tile: uint8 [1, S, S, 3], stretched, or first padded to a square.

    The padding is ImageNet's mean colour, in equal parts on both sides.
    """
    fit = "pad" if pad else "squeeze"
    return tile(picture, Tiling(tile_px=side_px, max_tiles=1, fit=fit, compat=compat))


def pad_to_square(rgb: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [max(H, W), max(H, W), 3] with ImageNet's mean colour around it."""
    height, width, _ = rgb.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in MEAN]
    square[top : top + height, left : left + width] = rgb
    return square


def pillow_resize(rgb: Image, size_px: tuple[int, int], *, vertical_first: bool) -> Image:
    """Bicubic resize with the order of its two passes fixed, whatever Pillow is installed.

    Each pass rounds to 8 bits, so the order shows. Pillow 11.3 always begins with the horizontal.
    """
    from PIL.Image import Resampling

    between = (rgb.width, size_px[1]) if vertical_first else (size_px[0], rgb.height)
    return rgb.resize(between, Resampling.BICUBIC).resize(size_px, Resampling.BICUBIC)


def pillow13_vertical_first(from_px: tuple[int, int], to_px: tuple[int, int]) -> bool:
    """Whether Pillow 13 begins with the vertical pass.

    It does where the height loses more than twice what the width loses (src/libImaging/Resample.c).
    """
    lost_width, lost_height = from_px[0] - to_px[0], from_px[1] - to_px[1]
    return lost_height > max(0, 2 * lost_width)


class _Source:
    """A picture that is decoded once and resized to one or two sizes."""

    def __init__(self, picture: Picture, compat: bool) -> None:
        self.rgb, self._compat = _rgb(picture, compat), compat
        self.full_px = self.size_px
        """width and height of the picture itself: a very large one is decoded smaller"""
        if isinstance(picture, Encoded | bytes):
            self.full_px = picture_size(picture, compat=compat)
        self._image = None
        if compat:
            from PIL import Image

            self._image = Image.fromarray(self.rgb)

    @property
    def size_px(self) -> tuple[int, int]:
        return self.rgb.shape[1], self.rgb.shape[0]

    def fitted(self, fit: str, side_px: int) -> np.ndarray:
        """uint8 [1, S, S, 3], padded or cropped."""
        if fit == "crop":
            return np.array(crop(self.rgb, side_px))[None]
        square = _Source(pad_to_square(self.rgb), self._compat)
        return np.array(square.resized((side_px, side_px)))[None]

    def resized(self, size_px: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W, 3] of this (width, height)."""
        if size_px == self.size_px:
            return self.rgb
        if self._image is None:
            return _fast_resize(self.rgb, size_px)
        order = pillow13_vertical_first(self.size_px, size_px)
        return np.asarray(pillow_resize(self._image, size_px, vertical_first=order))


def _fast_resize(rgb: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Antialiased bicubic on bytes, the horizontal pass first: uint8 [H, W, 3] -> the same."""
    import torch
    from torch.nn.functional import interpolate

    # [1, 3, H, W] in channels-last order, for which torch has a kernel that leaves them so.
    planes = torch.from_numpy(rgb).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(planes, size=size_px[::-1], mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def _rgb(picture: Picture, compat: bool) -> np.ndarray:
    """uint8 [H, W, 3], contiguous and writable."""
    if compat and not isinstance(picture, np.ndarray):
        return _official_rgb(picture)
    if not isinstance(picture, Encoded | bytes | np.ndarray):
        picture = _of_pillow(picture)
    found = decode.pixels(picture)
    flat = found[..., :3] if compat else over_background(found, WHITE)
    return np.require(flat, requirements=["C", "W"])


def _of_pillow(image: Image) -> np.ndarray:
    """uint8 [H, W, 3 or 4] of a Pillow image, which is taken as it stands."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _official_rgb(picture: Encoded | bytes | Image) -> np.ndarray:
    """What the official code has: the file as it is stored, converted to RGB by Pillow."""
    if not isinstance(picture, Encoded | bytes):
        return np.array(picture.convert("RGB"))
    data, where = _encoded(picture)
    return decode.with_pillow(data, where, lambda image: np.array(image.convert("RGB")))


def _encoded(picture: Encoded | bytes) -> tuple[bytes, str]:
    if isinstance(picture, Encoded):
        return picture.data, picture.where
    return picture, "picture"
