"""The one decoder: every mode, every orientation, every damaged file, in bounded memory."""

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.images.decode import (
    FORMATS,
    Encoded,
    decode,
    decode_rgba,
    picture_size,
    pixels,
)

pytestmark = pytest.mark.slow

CASES = Path(__file__).parents[1] / "cases"
WIDTH, HEIGHT = 41, 23
RAMP = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))
"""from black to white, left to right"""
GREY = np.rint(RAMP * 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def deep(values: np.ndarray, kind: str = "TIFF", **options) -> bytes:
    return encoded(Image.fromarray(values), kind, **options)


def tiff(values: np.ndarray, *, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A TIFF of one strip, written field by field: what Pillow's own writer cannot say."""
    body = values.tobytes()
    tags = {
        256: (4, values.shape[1] if bits != 12 else WIDTH + 1), 257: (4, len(values)),
        258: (3, bits), 259: (3, 1), 262: (3, photometric), 273: (4, 8), 277: (3, 1),
        278: (4, len(values)), 279: (4, len(body)), 339: (3, sample_format),
    }  # fmt: skip
    out = struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(tags))
    for tag, (kind, value) in tags.items():
        out += struct.pack("<HHII", tag, kind, 1, value)
    return out + struct.pack("<I", 0)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(
        ">I", zlib.crc32(name + content)
    )  # fmt: skip


def with_chunk(name: bytes, content: bytes, *, at_end: bool = False) -> bytes:
    """A PNG with one more chunk, behind its header or before its end."""
    data = encoded(Image.fromarray(GREY))
    place = len(data) - 12 if at_end else 33
    return data[:place] + png_chunk(name, content) + data[place:]


def clear_16_bit() -> bytes:
    """A 16-bit grey PNG one of whose levels is transparent."""
    data = deep(np.array([[300, 40_000]], np.uint16), "PNG")
    return data[:33] + png_chunk(b"tRNS", struct.pack(">H", 300)) + data[33:]


@pytest.mark.parametrize(
    "data",
    [
        deep(np.rint(RAMP * 65535).astype(np.uint16), "PNG"),
        deep(np.rint(RAMP * 65535).astype(np.uint16)),
        deep(np.rint(RAMP * 65535).astype(np.uint16), compression="tiff_lzw"),
        deep(RAMP.astype(np.float32)),
        tiff(np.rint(RAMP * (2**31 - 1)).astype(np.int32), bits=32, sample_format=2),
        tiff(np.rint(RAMP * (2**32 - 1)).astype(np.uint32), bits=32),
        tiff(np.rint(RAMP * 32767).astype(np.int16), bits=16, sample_format=2),
        tiff(np.rint((1 - RAMP) * 65535).astype(np.uint16), bits=16, photometric=0),
        deep(GREY, "PNG"),
        deep(np.dstack([GREY] * 3), "BMP"),
        deep(np.dstack([GREY] * 3), "WEBP", lossless=True),
        deep(np.dstack([GREY] * 3), "TIFF"),
        encoded(Image.fromarray(GREY).convert("P"), "GIF"),
        encoded(Image.fromarray(np.dstack([255 - GREY] * 3 + [0 * GREY]), "CMYK"), "TIFF"),
        encoded(Image.fromarray(np.dstack([GREY, 255 + 0 * GREY]), "LA")),
    ],
)  # fmt: skip
def test_a_ramp_is_the_ramp_however_it_is_stored(data: bytes) -> None:
    found = decode_rgba(data)
    assert found.shape == (HEIGHT, WIDTH, 4)
    assert (found[..., 3] == 255).all()
    assert np.abs(found[..., :3].astype(int) - GREY[..., None]).max() <= 1


def test_big_endian_tiffs_are_read_alike() -> None:
    values = np.rint(RAMP * 65535).astype(np.uint16)
    little = tiff(values, bits=16)
    order = {"I": ">I", "H": ">H"}
    body = values.astype(">u2").tobytes()
    out = struct.pack(">2sHI", b"MM", 42, 8 + len(body)) + body
    count = struct.unpack_from("<H", little, 8 + len(body))[0]
    out += struct.pack(order["H"], count)
    for i in range(count):
        tag, kind, n, value = struct.unpack_from("<HHII", little, 10 + len(body) + 12 * i)
        packed = struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        out += struct.pack(">HHI", tag, kind, n) + packed
    assert np.abs(decode(out + b"\0" * 4)[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_dark_pictures_of_16_bits_stay_dark(kind: str) -> None:
    dark = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) % 251
    assert decode(deep(dark, kind)).max() <= 1
    bright = np.full((3, 5), 65535, np.uint16)
    assert decode(deep(bright, kind)).min() == 255


def test_12_bits_are_scaled_by_their_type() -> None:
    row = bytes([0xFF, 0xF8, 0x00]) * ((WIDTH + 1) // 2)  # 4095, 2048, 4095, 2048 ...
    values = np.frombuffer(row * HEIGHT, np.uint8).reshape(HEIGHT, -1)
    found = decode(tiff(values, bits=12))
    assert found.shape == (HEIGHT, WIDTH + 1, 3)
    assert found[0, :2, 0].tolist() == [255, 128]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            tiff(np.int32([[0, 255_000]]), bits=32, sample_format=2),
            "integers of 32 bits go to 255000 of 2.14748e\\+09, so it would be black",
        ),
        (deep(np.float32([[0.5, 37.0]])), "floats are 0.5 to 37, expected 0 to 1"),
        (deep(np.float32([[-0.5, 0.3]])), "floats are -0.5 to 0.3, expected 0 to 1"),
        (deep(np.float32([[0.2, np.nan]])), "floats are nan to nan, expected 0 to 1"),
        (
            tiff(np.int16([[-7, 5]]), bits=16, sample_format=2),
            "integers are -7 to 5, expected 0 to 32767",
        ),
    ],
)
def test_numbers_without_a_range_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"row 7: its {message}"):
        decode(data, "row 7")


def test_a_transparent_level_of_16_bits_is_transparent() -> None:
    assert decode(clear_16_bit()).tolist() == [[[1, 1, 1, 0], [156, 156, 156, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_viewers_turn_them(kind: str, orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    picture = Image.fromarray(rng.integers(0, 256, (3, 5, 3), np.uint8)).resize((40, 24), 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture, kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert picture_size(data) == expected.size == ((24, 40) if orientation > 4 else (40, 24))
    assert np.array_equal(decode(data), np.asarray(expected))
    if kind != "TIFF":
        assert picture_size(data, upright=False) == (40, 24)
        unturned = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode(data, upright=False), unturned)


def test_an_orientation_at_the_end_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    data = with_chunk(b"eXIf", exif.tobytes()[6:], at_end=True)
    assert picture_size(data) == (HEIGHT, WIDTH)
    assert decode(data).shape == (WIDTH, HEIGHT, 3)


def test_the_case_of_a_turned_photo() -> None:
    folder = CASES / "chat-exif/pics"
    turned, upright = ((folder / name).read_bytes() for name in ("phone6.jpg", "upright.png"))
    assert picture_size(turned) == picture_size(upright) == (40, 80)
    apart = np.abs(decode(turned).astype(int) - decode(upright)).max((1, 2))
    assert np.delete(apart, [38, 39, 40, 41]).max() < 12  # JPEG mixes the colours where they meet


def test_the_case_of_16_bits() -> None:
    deep, flat = (decode((CASES / f"chat-16bit/pics/ramp{n}.png").read_bytes()) for n in (16, 8))
    assert np.abs(deep.astype(int) - flat).max() <= 2
    assert abs(deep.mean() - 127) < 2


# --- what is not opened ------------------------------------------------------------------------


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"


OTHERS = {
    kind: encoded(Image.fromarray(np.dstack([GREY] * 3)), kind)
    for kind in ("PPM", "TGA", "PCX", "ICO", "PDF", "JPEG2000", "SGI", "DDS")
} | {"EPS": eps(), "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "empty": b""}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_only_the_named_formats_are_opened(data: bytes, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing else is started either
    for call in (decode, decode_rgba, picture_size):
        with pytest.raises(DataError, match=r"row 3: \d+ bytes .*none of the formats") as caught:
            call(data, "row 3")
        assert all(name in str(caught.value) for name in FORMATS)


def truncated_webp() -> bytes:
    return encoded(Image.fromarray(np.dstack([GREY] * 3)), "WEBP")[:-30]


def jpeg_with_broken_exif() -> bytes:
    return encoded(Image.fromarray(GREY), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")


def tiff_with(tag: int, kind: int, value: int) -> bytes:
    data = bytearray(tiff(GREY, bits=8))
    at = 10 + GREY.size
    while struct.unpack_from("<H", data, at)[0] != tag:
        at += 12
    struct.pack_into("<HII", data, at + 2, kind, 1, value)
    return bytes(data)


DAMAGED = {
    "cut PNG": encoded(Image.fromarray(GREY))[:55],
    "header of a PNG": encoded(Image.fromarray(GREY))[:20],
    "cut JPEG": encoded(Image.fromarray(GREY), "JPEG")[:-200],
    "head of a JPEG": b"\xff\xd8\xff\xe0",
    "cut WebP": truncated_webp(),
    "cut GIF": encoded(Image.fromarray(GREY).convert("P"), "GIF")[:40],
    "head of a GIF": b"GIF89a",
    "head of a BMP": b"BM" + b"\xff" * 12,
    "cut BMP": deep(np.dstack([GREY] * 3), "BMP")[:500],
    "head of a TIFF": b"II*\0\x08\0\0\0",
    "TIFF whose pixels are elsewhere": tiff_with(273, 4, 1 << 30),
    "TIFF with a compression of another world": tiff_with(259, 3, 60_000),
    "TIFF that is a text": tiff_with(256, 2, 0),
    "PNG with a bomb of a comment": with_chunk(
        b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (80 << 20))
    ),
    "PNG with a broken checksum": encoded(Image.fromarray(GREY))[:40] + b"\0" * 60,
    "PNG without rows": with_chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 0, 0, 0, 0)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_named(data: bytes) -> None:
    with pytest.raises(DataError, match=r"talk\.jsonl:3: "):
        decode(data, "talk.jsonl:3")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_no_cut_or_flipped_byte_escapes(kind: str) -> None:
    """Whatever is wrong is a DataError, or the picture can still be read."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text that is long enough to lie elsewhere"
    options = {} if kind in ("GIF", "BMP") else {"exif": exif}
    rgb = Image.fromarray(np.dstack([GREY, GREY // 2, 255 - GREY]))
    whole = encoded(rgb.convert("P") if kind == "GIF" else rgb, kind, **options)
    rng = np.random.default_rng(3)
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: int(rng.integers(len(data)))]
        for _ in range(number % 3 * 2):
            data[int(rng.integers(min(len(data), 400)))] = int(rng.integers(256))
        for call in (decode, picture_size):
            with contextlib.suppress(DataError):
                call(bytes(data), "here")


@pytest.mark.filterwarnings("error")
def test_broken_exif_is_a_data_error_or_no_exif() -> None:
    with contextlib.suppress(DataError):
        assert decode(jpeg_with_broken_exif(), "here").shape == (HEIGHT, WIDTH, 3)


# --- memory ------------------------------------------------------------------------------------

MEASURE = """
import pathlib, resource, sys
from vlfoundry.infra.data.images import decode
from vlfoundry.infra.core.errors import DataError
decode.decode(pathlib.Path(sys.argv[1]).read_bytes())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = pathlib.Path(sys.argv[2]).read_bytes()
try:
    print(*decode.decode(data, "row 5").shape, end=" ")
except DataError as error:
    print(error)
    raise SystemExit
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def measured(data: bytes, tmp_path: Path) -> str:
    """What the decoder says of a picture in a process of its own: height, width, channels, MiB."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(encoded(Image.fromarray(GREY), "JPEG"))
    large.write_bytes(data)
    command = [sys.executable, "-W", "error", "-c", MEASURE, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.strip()


def test_the_case_of_169_megapixels_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(CASES / "picture_13000/rgb/a.parquet").to_pylist()
    data = max((row["image"]["bytes"] for row in table), key=len)
    assert "row 5: the picture is 13000 x 13000 px; decoding it" in measured(data, tmp_path)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: encoded(Image.new("L", (13_000, 13_000), 9), "JPEG"), "3250 3250 3"),
        (lambda: encoded(Image.new("RGB", (7_200, 7_100), (9, 0, 3))), "3550 3600 3"),
        (lambda: encoded(Image.new("RGBA", (6_000, 5_900), (9, 0, 3, 7))), "2950 3000 4"),
        (lambda: deep(np.zeros((6_900, 7_000), np.uint16), "PNG"), "3450 3500 3"),
    ],
)
def test_large_pictures_are_decoded_smaller_and_within_300_mb(make, shape: str, tmp_path) -> None:
    *size, mib = measured(make(), tmp_path).split()
    assert " ".join(size) == shape
    assert int(mib) < 320


def test_a_reduced_picture_looks_like_itself() -> None:
    """Of a transparent one, without the colour that cannot be seen."""
    picture = np.zeros((5_700, 5_800, 4), np.uint8)
    picture[:, :2_900] = (200, 100, 50, 255)
    picture[:, 2_900:, 1] = 255  # green, but clear
    found = decode(encoded(Image.fromarray(picture), compress_level=1))
    assert found.shape == (2_850, 2_900, 4)
    assert found[7, 1_449].tolist() == [200, 100, 50, 255]
    assert found[7, 1_450].tolist()[3] == 0


def test_sizes_are_of_the_picture_and_not_of_what_is_decoded() -> None:
    data = encoded(Image.new("L", (8_000, 8_500), 9), "JPEG")
    assert picture_size(data) == (8_000, 8_500)


# --- pictures in hand --------------------------------------------------------------------------


def test_pictures_in_every_form_are_the_same() -> None:
    data = encoded(Image.fromarray(GREY))
    expected = decode(data)
    assert np.array_equal(pixels(data), expected)
    assert np.array_equal(pixels(Encoded(data=data, where="a")), expected)
    assert pixels(expected) is expected
    with pytest.raises(DataError, match=r"^a row: 3 bytes"):
        pixels(Encoded(data=b"abc", where="a row"))
    with pytest.raises(DataError, match=r"float32 \[2, 2, 3\], expected uint8"):
        pixels(np.zeros((2, 2, 3), np.float32))


def test_nobody_else_opens_pictures() -> None:
    """One decoder: what Pillow would open, and start for it, is decided in one place."""
    root = Path(__file__).parents[2]
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for room in ("infra", "models", "eval", "stages", "flows", "benchmarks")
        for path in sorted((root / room).rglob("*.py"))
        for line in path.read_text("utf-8").splitlines()
        if "Image.open(" in line and "formats=" not in line
    ]
    assert not found


def test_kinds_of_tiff_that_pillow_reads_wrong_are_refused() -> None:
    bytes_with_sign = tiff(np.int8([[-128, 127]]), bits=8, sample_format=2)
    with pytest.raises(DataError, match="a TIFF of signed bytes"):
        decode(bytes_with_sign)
