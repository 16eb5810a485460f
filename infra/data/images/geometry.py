"""Pictures of any size to squares: the ways that need to know nothing of a model.

Letters: H x W size of the picture, S side of the square (px). Pictures are uint8 [H, W, 3], or
[H, W, 4] with straight alpha.
"""

import numpy as np

Box = tuple[float, float, float, float]
"""left, top, right, bottom"""


def squeeze(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """The whole picture, its proportions not kept: uint8 [S, S, C]."""
    return _resize(pixels, side_px)


def crop(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """The shorter side to S and the middle of the longer: uint8 [S, S, C].

    Sizes and edges are rounded as torchvision's Resize and CenterCrop do; what falls outside is
    never made, so that a strip takes no more memory than a square.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    x = _middle(width, int(side_px * width / short), side_px)
    y = _middle(height, int(side_px * height / short), side_px)
    return _resize(pixels, side_px, (x[0], y[0], x[1], y[1]))


def _middle(length: int, resized: int, side: int) -> tuple[float, float]:
    """From where to where the middle `side` of `resized` px lies in the original `length`."""
    first = round((resized - side) / 2)
    return first * length / resized, (first + side) * length / resized


def _resize(pixels: np.ndarray, side_px: int, box: Box | None = None) -> np.ndarray:
    """Bicubic; colour is weighted by alpha, so that what is clear does not bleed into the rest."""
    if pixels.shape[:2] == (side_px, side_px):
        return pixels
    from PIL import Image

    size, image = (side_px, side_px), Image.fromarray(pixels)
    if image.mode == "RGBA":
        weighted = image.convert("RGBa").resize(size, Image.Resampling.BICUBIC, box)
        return np.asarray(weighted.convert("RGBA"))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box))
