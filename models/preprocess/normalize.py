"""Pictures to what a vision tower takes.

Letters: B batch, H height, W width (px).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlfoundry.infra.data.images.bulk import composite

if TYPE_CHECKING:
    from torch import Tensor

# Mean and standard deviation of ImageNet's channels in 0..1: what InternViT was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def over_background(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, 4] on a plain background -> uint8 [H, W, 3]; RGB passes unchanged."""
    return composite(image, background)


def normalize_uint8(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], ImageNet mean and deviation taken out."""
    import torch

    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return pixels.float().mul_(1 / (255 * std)).sub_(mean / std)


def normalize_float(pictures: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in 0..1 -> the same with ImageNet's mean and deviation taken out."""
    import torch

    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (pictures - mean) / std
