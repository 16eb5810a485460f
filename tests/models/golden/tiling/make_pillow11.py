"""Write `pillow11.npz` beside this file; run with Pillow 11.3.0 and numpy alone."""

from pathlib import Path

import numpy as np
import PIL
from PIL import Image

SEED = 1130
BICUBIC = Image.Resampling.BICUBIC
# (width, height, columns, rows, side), px; the grid is the official one for at most 6 tiles.
CASES = (
    (61, 47, 3, 2, 28),
    (30, 120, 1, 4, 28),
    (120, 40, 3, 1, 28),
    (64, 64, 2, 2, 28),
    (50, 150, 1, 3, 28),
    (19, 23, 2, 3, 28),
    (17, 200, 1, 6, 28),
    (83, 66, 3, 2, 42),
)


def picture(case: int, width: int, height: int, draw: np.random.Generator) -> np.ndarray:
    """Colour patches under grain; every third is hard black and white in each channel."""
    coarse = draw.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
    patches = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    grain = draw.integers(-40, 41, (height, width, 1))
    pixels = (np.asarray(patches).astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
    return np.where(pixels > 128, 255, 0).astype(np.uint8) if case % 3 == 2 else pixels


def main() -> None:
    """Pictures, and their tiles with the thumbnail last."""
    assert PIL.__version__ == "11.3.0", PIL.__version__
    draw = np.random.default_rng(SEED)
    arrays = {}
    for case, (width, height, columns, rows, side) in enumerate(CASES):
        pixels = picture(case, width, height, draw)
        image = Image.fromarray(pixels)
        whole = image.resize((columns * side, rows * side), BICUBIC)
        tiles = [
            whole.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
            for y in range(rows)
            for x in range(columns)
        ]
        tiles.append(image.resize((side, side), BICUBIC))
        arrays[f"picture{case}"] = pixels
        arrays[f"tiles{case}"] = np.stack([np.asarray(tile) for tile in tiles])
    np.savez_compressed(Path(__file__).with_name("pillow11.npz"), **arrays)


if __name__ == "__main__":
    main()
