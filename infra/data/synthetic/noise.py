"""What goes wrong with pictures on the web, done on purpose and repeatably.

Every function takes uint8 RGBA [H, W, 4] and a generator, and returns a new picture of that size.
"""

import numpy as np

from vlfoundry.infra.data.images.bulk import decode_rgba, encode_webp

LOW_SIDES_PX = (16, 24)
REENCODE_QUALITY = (50, 85)
BAR_SHARE = 0.7
PHRASES = (
    "www.pix.net", "SAMPLE", "FREE IMAGE", "SALE 50%", "(c) 2019", "@artist_7", "stock-photo",
    "PREVIEW", "example.org", "do not copy", "id 48213377", "#trending", "demo demo demo",
)  # fmt: skip


def low_resolution(rgba: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Shrink to 16-24 pixels and blow up again; also returns that true side in pixels."""
    from PIL import Image

    side = int(rng.integers(LOW_SIDES_PX[0], LOW_SIDES_PX[1] + 1))
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
    enlarge = filters[int(rng.integers(len(filters)))]
    small = Image.fromarray(rgba).convert("RGBa").resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize(rgba.shape[1::-1], enlarge).convert("RGBA")), side


def reencode(rgba: np.ndarray, rng: np.random.Generator) -> bytes:
    """The same picture as another site would serve it: cropped or shrunk a little, lossy."""
    from PIL import Image

    size = rgba.shape[1::-1]
    image = Image.fromarray(rgba).convert("RGBa")
    if rng.random() < 0.5:
        least = min(round(0.9 * size[0]), size[0] - 1)
        side = max(1, int(rng.integers(least, size[0])))
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        image = image.resize(size, Image.Resampling.BICUBIC)
    quality = int(rng.integers(REENCODE_QUALITY[0], REENCODE_QUALITY[1] + 1))
    return encode_webp(np.asarray(image.convert("RGBA")), quality)


def overlay_text(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Print a line of text over the picture, mostly on a bar from edge to edge."""
    from PIL import Image, ImageDraw, ImageFont

    side, width = rgba.shape[:2]
    text = PHRASES[int(rng.integers(len(PHRASES)))]
    least = min(side, max(2, side // 6))
    height = int(rng.integers(least, max(least, side // 4) + 1))
    top = int(rng.integers(0, side - height + 1))
    is_dark = bool(rng.random() < 0.5)
    level = int(rng.integers(0, 60))
    bar = (level,) * 3 if is_dark else (255 - level,) * 3
    ink = (255, 255, 255) if is_dark else (0, 0, 0)
    layer = Image.new("RGBA", (width, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    font = ImageFont.load_default(size=max(1, height - 1))
    at = (int(rng.integers(-4, 3)), top - height // 6)
    if rng.random() < BAR_SHARE:
        opacity = int(rng.integers(170, 256))
        draw.rectangle((0, top, width, top + height - 1), fill=(*bar, opacity))
        draw.text(at, text, font=font, fill=(*ink, 255))
    else:
        draw.text(at, text, font=font, fill=(*ink, 255), stroke_width=1, stroke_fill=(*bar, 255))
    return np.asarray(Image.alpha_composite(Image.fromarray(rgba), layer))


def lossless(rgba: np.ndarray) -> bytes:
    """Encode a changed picture for storage; checked to come back as it was."""
    data = encode_webp(rgba)
    assert np.array_equal(decode_rgba(data), rgba), "lossless WebP changed the picture"
    return data
