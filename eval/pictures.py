"""Encoded pictures of any kind and size to square arrays.

Letters: N pictures, S side in pixels.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from infra.errors import DataError

WHITE = (255, 255, 255, 255)


def decode_rgba(data: bytes, where: str = "picture") -> Image.Image:
    """Any file that Pillow reads, upright, as RGBA. Raises DataError naming `where`."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            return _to_8_bit(upright).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: {len(data)} bytes cannot be read as a picture ({error}); "
            "expected JPEG, PNG, WebP or another format that Pillow reads"
        ) from error


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey files: Pillow would clip instead of scale them."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture, dtype=np.float64)
    scale = 255.0 / 65535.0 if picture.mode.startswith("I") and values.max() > 255 else 1.0
    return Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8), mode="L")


def square(picture: Image.Image, side_px: int, *, keep_alpha: bool = False) -> np.ndarray:
    """Fit an RGBA picture into a square without changing its proportions.

    Returns uint8 [S, S, 3] on white, or [S, S, 4] with a transparent border.
    """
    scale = side_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if size != picture.size:
        # premultiplied alpha: or the hidden colour of clear pixels bleeds into the edges
        picture = picture.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    offset = ((side_px - size[0]) // 2, (side_px - size[1]) // 2)
    canvas = Image.new("RGBA", (side_px, side_px), (255, 255, 255, 0))
    canvas.paste(picture, offset)
    if keep_alpha:
        return np.asarray(canvas)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", canvas.size, WHITE), canvas))[..., :3]


def decode_squares(
    encoded: Sequence[bytes], side_px: int, *, names: Sequence[str] = (), keep_alpha: bool = False
) -> np.ndarray:
    """Decode pictures to uint8 [N, S, S, 3] (on white) or [N, S, S, 4]."""
    channels = 4 if keep_alpha else 3
    out = np.empty((len(encoded), side_px, side_px, channels), np.uint8)
    for index, data in enumerate(encoded):
        where = names[index] if names else f"picture {index}"
        out[index] = square(decode_rgba(data, where), side_px, keep_alpha=keep_alpha)
    return out


def pixel_key(data: bytes, where: str = "picture") -> bytes:
    """A key that is equal for pictures that look the same: colours under full alpha are ignored."""
    import hashlib

    pixels = np.array(decode_rgba(data, where))
    pixels[pixels[..., 3] == 0] = 0
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
