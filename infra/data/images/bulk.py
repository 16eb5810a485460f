"""Small pictures in bulk: decode, composite, fixed features, and training augmentation.

Letters: N pictures, H x W pixels, C channels, S side in pixels, F features. Pictures are uint8
arrays [N, H, W, C] with C = 3 (RGB) or 4 (RGBA, straight alpha).
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from vlfoundry.infra.core.config import check_ranges
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.splitmix import mix64, numbers_of

if TYPE_CHECKING:
    import torch

WHITE = (255, 255, 255)
HOG_SIDE = 64
HOG_CELL = 8
HOG_BINS = 8
COLOUR_GRID = 8
COLOUR_WEIGHT = 1.0
AT_ONCE_PX = 1 << 20
"""pixels of a large picture that are composited at once"""
GREY = np.array([0.299, 0.587, 0.114], np.float32)


def decode_rgba(data: bytes, size_px: int | None = None, where: str = "picture") -> np.ndarray:
    """Decode a picture (`data.images.decode`) to uint8 [H, W, 4]; squeezed to a square if asked.

    Raises DataError naming `where` if the bytes cannot be read as a picture.
    """
    from vlfoundry.infra.data.images import decode
    from vlfoundry.infra.data.images.geometry import squeeze

    rgba = decode.decode_rgba(data, where)
    return rgba if size_px is None else squeeze(rgba, size_px)


def decode_batch(encoded: Sequence[bytes], size_px: int, names: Iterable[object]) -> np.ndarray:
    """Squeezed squares, uint8 [N, S, S, 4]. Raises DataError with the name of a bad picture."""
    pairs = zip(encoded, names, strict=True)
    return np.stack([decode_rgba(data, size_px, f"picture {name}") for data, name in pairs])


def encode_webp(rgba: np.ndarray, quality: int | None = None) -> bytes:
    """Encode uint8 [H, W, 3 or 4] as WebP: lossless, or lossy at `quality` (0-100)."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(rgba)
    if quality is None:  # exact keeps the colour under transparent pixels: decode gives it back
        image.save(buffer, "WEBP", lossless=True, quality=50, method=2, exact=True)
    else:
        image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def composite(images: np.ndarray, background: Sequence[int] = WHITE) -> np.ndarray:
    """Lay RGBA pictures on one colour: uint8 [..., H, W, 4] -> uint8 [..., H, W, 3].

    RGB pictures are returned as they are.
    """
    if images.shape[-1] == 3:
        return images
    rows = max(1, AT_ONCE_PX // images.shape[-2])
    if images.ndim == 3 and len(images) > rows:  # the sums below are several times as large
        parts = (images[at : at + rows] for at in range(0, len(images), rows))
        return np.concatenate([composite(part, background) for part in parts])
    alpha = images[..., 3:].astype(np.uint16)
    ground = np.asarray(background, np.uint16) * (255 - alpha)
    return ((images[..., :3] * alpha + ground + 127) // 255).astype(np.uint8)


def content_box(rgb: np.ndarray) -> tuple[int, int, int, int]:
    """Bounding box (x1, y1, x2, y2) of what differs from the corner colour in [H, W, 3]."""
    height, width = rgb.shape[:2]
    ground = rgb[0, 0].astype(np.int16)
    differs = np.abs(rgb.astype(np.int16) - ground).max(axis=-1) > 12
    columns, rows = np.flatnonzero(differs.any(axis=0)), np.flatnonzero(differs.any(axis=1))
    if not len(columns):
        return 0, 0, width, height
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def hog_features(images: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients and a colour grid, box-normalised, unit length.

    uint8 [N, H, W, 3 or 4] -> float32 [N, F], F = 8*8*8 + 8*8*3 = 704; both halves have the same
    norm, so that their inner product weighs shape and colour alike. Source of the cells:
    Dalal and Triggs 2005, with signed orientations and one block norm over 3x3 cells.
    """
    rgb = np.stack([_normalise_box(image) for image in composite(images)])
    rgb = rgb.astype(np.float32) / 255.0
    shape = _gradient_cells(rgb @ GREY)
    side = rgb.shape[1] // COLOUR_GRID
    colour = rgb.reshape(len(rgb), COLOUR_GRID, side, COLOUR_GRID, side, 3).mean(axis=(2, 4))
    colour = (1.0 - colour).reshape(len(rgb), -1)
    return _unit(np.concatenate([_unit(shape), COLOUR_WEIGHT * _unit(colour)], axis=1))


def _normalise_box(rgb: np.ndarray) -> np.ndarray:
    from PIL import Image

    left, top, right, bottom = content_box(rgb)
    side = max(right - left, bottom - top)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    canvas = Image.new("RGB", (side, side), tuple(int(c) for c in rgb[0, 0]))
    canvas.paste(Image.fromarray(rgb[top:bottom, left:right]), (round(left - x), round(top - y)))
    return np.asarray(canvas.resize((HOG_SIDE, HOG_SIDE), Image.Resampling.BILINEAR))


def _gradient_cells(grey: np.ndarray) -> np.ndarray:
    """Oriented energy by cell: float32 [N, S, S] -> [N, cells * cells * bins]."""
    down = np.zeros_like(grey)
    right = np.zeros_like(grey)
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    right[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    energy = np.hypot(down, right)
    angle = np.arctan2(down, right) * (HOG_BINS / (2 * np.pi)) % HOG_BINS
    cells = grey.shape[1] // HOG_CELL
    result = np.empty((len(grey), cells, cells, HOG_BINS), np.float32)
    for b in range(HOG_BINS):
        distance = np.abs(angle - b)
        weight = np.maximum(0.0, 1.0 - np.minimum(distance, HOG_BINS - distance))
        tiles = (weight * energy).reshape(len(grey), cells, HOG_CELL, cells, HOG_CELL)
        result[..., b] = tiles.mean(axis=(2, 4))
    return (result / _block_norm(result)).reshape(len(grey), -1)


def _block_norm(cells: np.ndarray) -> np.ndarray:
    power = np.pad((cells**2).sum(axis=-1), ((0, 0), (1, 1), (1, 1)))
    n = cells.shape[1]
    total = sum(power[:, i : i + n, j : j + n] for i in range(3) for j in range(3))
    return np.sqrt(total + 1e-3)[..., None]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training pictures vary. Never mirrored: arrows, letters and clocks have a direction."""

    scale_min: float = 0.75
    """Smallest size of the drawing relative to its canvas."""
    scale_max: float = 1.15
    """Largest size of the drawing relative to its canvas."""
    shift: float = 0.1
    """Largest shift, as a share of the canvas, each way."""
    stretch: float = 0.08
    """Largest change of the aspect ratio, as a share."""
    rotate_degrees: float = 12.0
    """Largest rotation, each way."""
    brightness: float = 0.15
    """Largest relative change of all channels."""
    contrast: float = 0.2
    """Largest relative change of the distance from mid-grey."""
    saturation: float = 0.25
    """Largest relative change of the distance from the pixel's own grey."""
    white_share: float = 0.5
    """Share of pictures on white; the rest get a random plain colour."""


def check_augment(where: str, config: AugmentConfig) -> None:
    """Raises ConfigError, with the full name, for a number that cannot be."""
    sizes = ("scale_min", "scale_max")
    others = tuple(f.name for f in fields(config) if f.name not in (*sizes, "white_share"))
    check_ranges(where, config, above_zero=sizes, from_zero=others, shares=("white_share",))
    if config.scale_min > config.scale_max:
        raise ConfigError(
            f"{where}.scale_min is {config.scale_min}, above scale_max, {config.scale_max}"
        )


UNIFORMS = 12


def augment(
    rgba: np.ndarray,
    seed: int,
    positions: Sequence[tuple[int, int]],
    config: AugmentConfig | None = None,
    *,
    size_px: int | None = None,
) -> "torch.Tensor":
    """Vary RGBA pictures for training: uint8 [N, H, W, 4] -> float32 [N, 3, S, S] in 0..1.

    `positions` are the (epoch, index) of `SampleStream.indices`: what happens to a picture depends
    on (seed, epoch, index) alone, not on the batch or rank in which it comes. S is `size_px`, or as
    the pictures have it: what the model sees decides, never the augmentation.
    """
    import torch

    config = config or AugmentConfig()
    draws = uniforms(seed, positions, UNIFORMS)
    planes = np.ascontiguousarray(rgba.transpose(0, 3, 1, 2))  # as bytes: 4x less to move
    picture = torch.from_numpy(planes).float().mul_(1.0 / 255.0)
    picture[:, :3] *= picture[:, 3:]  # premultiplied: no dark fringes
    grid = torch.from_numpy(_sampling_grid(draws, config, size_px or rgba.shape[1]))
    moved = torch.nn.functional.grid_sample(picture, grid, "bilinear", "zeros", False)
    colour = _jitter(moved[:, :3], moved[:, 3:], draws, config)
    white = draws[:, 8:9] < config.white_share
    ground = np.where(white, 1.0, draws[:, 9:12]).astype(np.float32)
    return colour + torch.from_numpy(ground)[:, :, None, None] * (1.0 - moved[:, 3:])


def uniforms(seed: int, positions: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """Random numbers in [0, 1) that depend on (seed, epoch, index, k) alone. float64 [N, count].

    A counter hashed by SplitMix64's finaliser (Steele et al. 2014).
    """
    state = numbers_of(seed, positions)
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = mix64(state[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _sampling_grid(draws: np.ndarray, config: AugmentConfig, size_px: int) -> np.ndarray:
    """Where each output pixel reads its input, in -1..1. float32 [N, S, S, 2]."""
    signed = 2.0 * draws - 1.0
    scale = config.scale_min + draws[:, 0] * (config.scale_max - config.scale_min)
    stretch = 1.0 + config.stretch * signed[:, 1]
    angle = np.deg2rad(config.rotate_degrees) * signed[:, 2]
    shift_x, shift_y = 2 * config.shift * signed[:, 3], 2 * config.shift * signed[:, 4]
    axis = (np.arange(size_px) + 0.5) * (2.0 / size_px) - 1.0
    x = axis[None, None, :] - shift_x[:, None, None]
    y = axis[None, :, None] - shift_y[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    grid = np.empty((len(draws), size_px, size_px, 2), np.float32)
    grid[..., 0] = (cos * x + sin * y) / (scale * stretch)[:, None, None]
    grid[..., 1] = (cos * y - sin * x) / (scale / stretch)[:, None, None]
    return grid


def _jitter(
    colour: "torch.Tensor", alpha: "torch.Tensor", draws: np.ndarray, config: AugmentConfig
) -> "torch.Tensor":
    """Change brightness, contrast and saturation of premultiplied colour [N, 3, S, S]."""
    import torch

    def factor(column: int, width: float) -> "torch.Tensor":
        values = 1.0 + width * (2.0 * draws[:, column] - 1.0)
        return torch.from_numpy(values.astype(np.float32))[:, None, None, None]

    grey = (colour * torch.from_numpy(GREY)[None, :, None, None]).sum(dim=1, keepdim=True)
    colour = grey + (colour - grey) * factor(5, config.saturation)
    middle = 0.5 * alpha
    colour = middle + (colour - middle) * factor(6, config.contrast)
    colour = colour * factor(7, config.brightness)
    return torch.minimum(colour.clamp_min(0.0), alpha)
