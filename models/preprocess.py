"""Pictures to what a vision tower takes.

Letters: B batch, H height, W width (px).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from infra.errors import DataError
from infra.images import composite

if TYPE_CHECKING:
    from torch import Tensor

# Mean and standard deviation of ImageNet's channels in 0..1: what InternViT was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def over_background(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, 4] on a plain background -> uint8 [H, W, 3]; RGB passes unchanged."""
    return composite(image, background)


def resize(images: np.ndarray, side_px: int) -> np.ndarray:
    """uint8 [B, H, W, 3] -> uint8 [B, side, side, 3], bicubic, the aspect ratio not kept."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3]; "
            "lay transparent pictures over a background first"
        )
    if images.shape[1:3] == (side_px, side_px):
        return images
    from PIL import Image

    size = (side_px, side_px)
    resized = [
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        for image in images
    ]
    return np.stack(resized) if resized else np.empty((0, *size, 3), np.uint8)


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], ImageNet mean and deviation taken out."""
    import torch

    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return pixels.float().mul_(1 / (255 * std)).sub_(mean / std)


def standardise(pictures: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in 0..1 -> the same with ImageNet's mean and deviation taken out."""
    import torch

    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (pictures - mean) / std
