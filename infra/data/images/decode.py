"""The one decoder: an encoded picture of any kind to upright 8-bit pixels, in bounded memory.

Training, evaluation and the report read every picture through it, so that all see the same. Only
the raster formats of `FORMATS` are opened: Pillow hands some of the others to other programs.

Letters: H x W pixels. Sizes are (width, height) of the upright picture, as a viewer shows it.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlfoundry.infra.core.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""what is opened, by content; how a file is named does not matter"""
BUDGET_BYTES = 300_000_000
"""largest estimate of what decoding one picture holds at once; what needs more is refused"""
WHOLE_PX = 32_000_000
"""a larger picture that fits the budget is decoded at a whole fraction of its size"""
LONGEST_PX = 65_535
"""longest side; a strip longer than this is no photograph"""
ORIENTATION = 0x0112
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
PLANAR = 284
WHITE_IS_ZERO, SIGNED, SEPARATE = 0, 2, 2
ROWS = 256
"""rows that are converted at once"""
BROKEN = (
    ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""what Pillow's readers raise on files that are cut or damaged: none of them checks every field"""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A picture as it is stored; it is decoded where it is used, so that a set may be large."""

    data: bytes
    """the file"""
    where: str
    """what errors call it: a row, or a file and its line"""


type Picture = Encoded | bytes | np.ndarray
"""An encoded picture, or upright uint8 [H, W, 3 or 4] (RGB, or RGBA with straight alpha)."""


def pixels(picture: Picture, where: str = "picture") -> np.ndarray:
    """uint8 [H, W, 3], or [H, W, 4] where it has transparency. Raises DataError naming `where`."""
    if isinstance(picture, Encoded):
        return decode(picture.data, picture.where)
    if isinstance(picture, bytes):
        return decode(picture, where)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (3, 4):
        raise DataError(
            f"{where} is {picture.dtype} {list(picture.shape)}, expected uint8 [H, W, 3 or 4]"
        )
    return picture


def decode(data: bytes, where: str = "picture", *, upright: bool = True) -> np.ndarray:
    """Upright pixels: uint8 [H, W, 3], or [H, W, 4] (straight alpha) where it has transparency.

    Of several frames the first. Integers of more than 8 bits are scaled by their type, never by
    what is in them; floats are taken as 0..1. Above `WHOLE_PX` the picture is decoded at a half, a
    third, ... of its size.

    Args:
        data: the file.
        where: what errors call it.
        upright: False leaves it as the camera stored it, whatever its EXIF orientation says.

    Raises:
        DataError: it is in none of `FORMATS`, cut, damaged, too large for `BUDGET_BYTES`, or of
            floats outside 0..1.
    """
    with _named(data, where):
        image = _open(data)
        if image.format == "JPEG" and image.mode in ("RGB", "L") and _factor(image) == 1:
            found = _decode_jpeg(data)
            if found is not None:
                return _turned(found, _orientation(image, data)) if upright else found
        turn = _orientation(image, data) if upright else 1
        _shrink_early(image)
        image.load()
        image = _in_8_bits(image)
        image = _reduced(image)  # step by step: what is done with is let go
        return _turned(_array(image), turn)


def decode_rgba(data: bytes, where: str = "picture") -> np.ndarray:
    """As `decode`, always uint8 [H, W, 4]: a picture without transparency is opaque."""
    found = decode(data, where)
    if found.shape[-1] == 4:
        return found
    rgba = np.full((*found.shape[:2], 4), 255, np.uint8)
    rgba[..., :3] = found
    return rgba


def picture_size(data: bytes, where: str = "picture", *, upright: bool = True) -> tuple[int, int]:
    """Width and height (px), from the header alone. Raises DataError as `decode` does."""
    with _named(data, where):
        image = _open(data)
        turned = upright and _orientation(image, data) >= 5
        return (image.height, image.width) if turned else image.size


def with_pillow(data: bytes, where: str, use: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """What `use` makes of the Pillow image, which is not turned or converted: for what has to see a
    picture as another program does. Raises DataError as `decode` does, also for what `use` raises.
    """
    with _named(data, where):
        return use(_open(data))


@contextlib.contextmanager
def _named(data: bytes, where: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of fields that nobody here reads
            yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except BROKEN as error:
        what = str(error) or type(error).__name__
        raise DataError(
            f"{where}: {len(data)} bytes cannot be read as a picture ({what}); the file is cut or "
            "damaged, or its pixels are of a kind that is not read; expected a whole one in one of "
            f"the formats {', '.join(FORMATS)}"
        ) from error


def _open(data: bytes) -> Image.Image:
    """The header of a picture in one of `FORMATS`.

    The readers are asked one by one: Pillow's own `open` warns and refuses by a limit that it
    sets on pixels, whatever they need.
    """
    _import_readers()
    head = data[:16]
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(head) is True:
            image = factory(io.BytesIO(data), "")
            _check_kind(image)
            _check_size(image)
            return image
    raise DataError(
        f"{len(data)} bytes cannot be read as a picture: they are in none of the formats that are "
        f"opened, {', '.join(FORMATS)}; convert it to one of these"
    )


def _import_readers() -> None:
    from PIL import (  # noqa: F401 - each registers what it reads
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )


def _check_kind(image: Image.Image) -> None:
    """Raises DataError for kinds of TIFF that Pillow reads wrong without a word."""
    bits = _tag(image, BITS_PER_SAMPLE) or 8
    if _tag(image, PLANAR) == SEPARATE and bits > 8:
        raise DataError(
            f"it is a TIFF of {bits} bits whose channels are stored one by one, which is not read; "
            "store them together (PlanarConfiguration 1), or as PNG"
        )
    if _tag(image, SAMPLE_FORMAT) == SIGNED and bits == 8:
        raise DataError("it is a TIFF of signed bytes, which is not read; store 0 to 255")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < 1 or max(width, height) > LONGEST_PX:
        raise DataError(
            f"the picture is {width} x {height} px, expected 1 to {LONGEST_PX} px each way"
        )
    need = width * height * _bytes_a_pixel(image)
    if need > BUDGET_BYTES:
        raise DataError(
            f"the picture is {width} x {height} px; decoding it would take about "
            f"{need / 1e6:.0f} MB of memory, expected at most {BUDGET_BYTES / 1e6:.0f} MB "
            f"({BUDGET_BYTES // _bytes_a_pixel(image) / 1e6:.0f} megapixels of this kind); "
            "make it smaller"
        )


def _bytes_a_pixel(image: Image.Image) -> float:
    """What a picture's reader and the conversion to 8 bits hold at once, for each of its pixels."""
    if image.format in ("JPEG", "MPO"):
        return _kept_by_jpeg(image) + 5.0 / _jpeg_scale(image) ** 2
    if image.format == "WEBP":
        return 18.0  # it decodes as if there were frames to come
    strip = 4.0 if image.format == "TIFF" else 0.0  # one strip may be the whole picture
    if image.mode == "F" or image.mode.startswith("I"):
        return strip + (6.0 if image.mode.startswith("I;16") else 10.0)
    opaque = image.mode in ("1", "L", "RGB") and not image.has_transparency_data
    return strip + (5.5 if opaque else 8.0)


def _kept_by_jpeg(image: Image.Image) -> float:
    """A progressive file's coefficients are kept whole, 2 bytes each; of others only some rows."""
    if not image.info.get("progressive"):
        return 0.0
    areas = [across * down for _, across, down, *_ in getattr(image, "layer", [])]
    return 2.0 * sum(areas) / max(areas, default=1)


def _factor(image: Image.Image) -> int:
    """The smallest whole number that a picture has to be divided by."""
    factor = 1
    while (image.width // factor) * (image.height // factor) > WHOLE_PX:
        factor += 1
    return factor


def _jpeg_scale(image: Image.Image) -> int:
    """What JPEG's own decoder can divide a picture by and still be as large as `_factor` says."""
    return max(scale for scale in (1, 2, 4, 8) if scale == 1 or scale / 2 < _factor(image))


def _shrink_early(image: Image.Image) -> None:
    """Have JPEG's decoder make a smaller picture from the start, where that is needed."""
    scale = _jpeg_scale(image) if image.format in ("JPEG", "MPO") else 1
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))


def _reduced(image: Image.Image) -> Image.Image:
    factor = _factor(image)
    return image.reduce(factor) if factor > 1 else image


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels that Pillow gives, in about half its time; None if anything in the file is odd.

    What is odd is left to Pillow, which reads some of it and says what is wrong with the rest.
    """
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF's number for how the picture is to be turned, 1 to 8; 1: it is upright.

    Pillow turns TIFF files itself, and tells their upright size. To look for EXIF at the end of a
    PNG it would decode it all.
    """
    places = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
    has_none = not any(place in image.info for place in places) and b"eXIf" not in data
    if image.format == "TIFF" or (image.format == "PNG" and has_none):
        return 1
    found = image.getexif().get(ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, C] the right way up (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:  # rows and columns change places
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array if orientation == 1 else np.array(array, order="C")


def _array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3 or 4] of L, RGB or RGBA."""
    array = np.asarray(image)
    return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array


def _in_8_bits(image: Image.Image) -> Image.Image:
    """L or RGB, or RGBA where the picture has transparency."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image)
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """One channel of more than 8 bits, by the range of its type; a transparent level stays so."""
    values, top = _values(image)
    peak = float(values.max())
    if top > 65535.0 and 0 < peak < top / 255:  # of 16 bits a dark picture is one
        raise DataError(
            f"its integers of 32 bits go to {peak:g} of {top:g}, so it would be black; scale them, "
            "or store them as 16 bits"
        )
    clear = image.info.get("transparency")
    clear = clear if isinstance(clear, int) else None
    inverted = _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO
    grey = np.empty((*values.shape, 1 if clear is None else 2), np.uint8)
    for start in range(0, len(values), ROWS):
        rows = values[start : start + ROWS].astype(np.float64)
        low, high = rows.min(), rows.max()
        if not (low >= 0 and high <= top):  # or they are not numbers
            kind = "floats" if image.mode == "F" else "integers"
            raise DataError(
                f"its {kind} are {low:g} to {high:g}, expected 0 to {top:g}; scale them to that"
            )
        out = grey[start : start + ROWS]
        out[..., 0] = np.rint((top - rows if inverted else rows) * (255.0 / top))
        if clear is not None:
            out[..., 1] = np.where(rows == clear, 0, 255)
    if clear is None:
        return Image.fromarray(grey[..., 0])
    return Image.fromarray(grey, "LA").convert("RGBA")


def _values(image: Image.Image) -> tuple[np.ndarray, float]:
    """Numbers [H, W] and the largest that their type has: floats 1, integers by their bits."""
    values = np.asarray(image)
    if image.mode == "F":
        return values, 1.0
    bits = _tag(image, BITS_PER_SAMPLE)
    if bits is None:  # PNG: 16 bits, in whatever mode Pillow has put them
        return values, 65535.0
    if _tag(image, SAMPLE_FORMAT) == SIGNED:
        return values, 2.0 ** (bits - 1) - 1
    return values.view(np.uint32) if bits == 32 else values, 2.0**bits - 1


def _tag(image: Image.Image, tag: int) -> int | None:
    """A number of a TIFF file's header; of others None."""
    found = getattr(image, "tag_v2", {}).get(tag)
    return found[0] if isinstance(found, tuple) else found
