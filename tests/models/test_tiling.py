"""Dynamic resolution: grids, tiles, and what Pillow makes of them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.models.preprocess.tiling import (
    Tiling,
    candidate_grids,
    picture_size,
    pillow13_vertical_first,
    pillow_resize,
    plan,
    share_tiles,
    single,
    tile,
    tokens_per_tile,
)

GOLDEN = Path(__file__).parent / "golden" / "tiling"
MOST_LEVELS = 2
RECORDED = np.load(GOLDEN / "pillow11.npz")
CASES = range(len(RECORDED.files) // 2)

# width, height; columns, rows, tiles and tokens for at most 12, then for at most 6.
WORKED = [
    (448, 448, (1, 1), 1, 256, (1, 1), 1, 256),
    (300, 300, (1, 1), 1, 256, (1, 1), 1, 256),
    (640, 640, (2, 2), 5, 1280, (2, 2), 5, 1280),
    (896, 896, (2, 2), 5, 1280, (2, 2), 5, 1280),
    (1000, 1000, (3, 3), 10, 2560, (2, 2), 5, 1280),
    (448, 896, (1, 2), 3, 768, (1, 2), 3, 768),
    (1344, 448, (3, 1), 4, 1024, (3, 1), 4, 1024),
    (3000, 1000, (6, 2), 13, 3328, (3, 1), 4, 1024),
    (640, 480, (4, 3), 13, 3328, (3, 2), 7, 1792),
    (800, 1000, (3, 4), 13, 3328, (2, 3), 7, 1792),
    (1920, 1080, (4, 2), 9, 2304, (2, 1), 3, 768),
    (1080, 2400, (2, 5), 11, 2816, (1, 2), 3, 768),
    (1240, 1754, (2, 3), 7, 1792, (2, 3), 7, 1792),
    (4032, 3024, (4, 3), 13, 3328, (3, 2), 7, 1792),
    (100, 2000, (1, 12), 13, 3328, (1, 6), 7, 1792),
]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("case", WORKED, ids=lambda case: f"{case[0]}x{case[1]}")
def test_the_worked_examples(case: tuple) -> None:
    width, height, *expected = case
    got = []
    for most in (12, 6):
        layout = plan(width, height, Tiling(max_tiles=most))
        assert layout.resized_px == (layout.grid[0] * 448, layout.grid[1] * 448)
        assert layout.has_thumbnail == (layout.tiles > 1)
        got += [layout.grid, layout.tiles, layout.tokens()]
    assert got == expected


def test_the_recorded_grids() -> None:
    wrong = []
    for width, height, most, columns, rows, tiles in json.loads(
        (GOLDEN / "grids.json").read_text()
    ):
        layout = plan(width, height, Tiling(max_tiles=most))
        if (layout.grid, layout.tiles) != ((columns, rows), tiles):
            wrong.append((width, height, most, layout))
    assert wrong == []


def test_squares_change_grid_at_the_published_sides() -> None:
    grids = {side: plan(side, side).grid for side in (633, 634, 950, 951)}
    assert grids == {633: (1, 1), 634: (2, 2), 950: (2, 2), 951: (3, 3)}


def test_candidates_have_the_fewest_tiles_asked_for() -> None:
    assert min(columns * rows for columns, rows in candidate_grids(4, 12)) == 4


def test_boxes_run_row_by_row() -> None:
    layout = plan(200, 300, Tiling(tile_px=100, max_tiles=6))
    assert layout.boxes[:3] == [(0, 0, 100, 100), (100, 0, 200, 100), (0, 100, 100, 200)]
    assert layout.boxes[-1] == (100, 200, 200, 300)


@pytest.mark.parametrize(
    ("side", "patch", "merge", "tokens"),
    [(448, 14, 2, 256), (224, 14, 2, 64), (448, 14, 1, 1024), (64, 16, 2, 4)],
)
def test_tokens_of_a_tile(side: int, patch: int, merge: int, tokens: int) -> None:
    assert tokens_per_tile(side, patch, merge) == tokens


def test_several_pictures_share_the_tiles() -> None:
    assert [share_tiles(12, pictures) for pictures in (1, 2, 5, 12, 13)] == [12, 6, 2, 1, 1]


@pytest.mark.parametrize("case", CASES)
def test_tiles_are_within_two_levels_of_pillow_11(case: int) -> None:
    picture, expected = RECORDED[f"picture{case}"], RECORDED[f"tiles{case}"]
    got = tile(picture, Tiling(tile_px=expected.shape[1], max_tiles=6))
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= MOST_LEVELS


@pytest.mark.parametrize("case", CASES)
def test_the_horizontal_pass_first_is_pillow_11_exactly(case: int) -> None:
    picture, expected = RECORDED[f"picture{case}"], RECORDED[f"tiles{case}"]
    side = expected.shape[1]
    layout = plan(picture.shape[1], picture.shape[0], Tiling(tile_px=side, max_tiles=6))
    image = Image.fromarray(picture)
    whole = pillow_resize(image, layout.resized_px, vertical_first=False)
    got = [whole.crop(box) for box in layout.boxes]
    got.append(pillow_resize(image, (side, side), vertical_first=False))
    assert np.array_equal(np.stack([np.asarray(one) for one in got]), expected)


def test_pillow_13_differs_from_pillow_11_where_it_turns_the_passes() -> None:
    case = 6  # 17 x 200 to 28 x 168
    picture, expected = RECORDED[f"picture{case}"], RECORDED[f"tiles{case}"]
    got = tile(picture, Tiling(tile_px=28, max_tiles=6, compat=True))
    assert pillow13_vertical_first((17, 200), (28, 168))
    assert np.abs(got.astype(int) - expected).max() > MOST_LEVELS


@pytest.mark.skipif(Image.__version__.split(".")[0] != "13", reason="of Pillow 13 alone")
@pytest.mark.parametrize("to", [(28, 28), (28, 140), (140, 28), (60, 41), (61, 40), (17, 10)])
@pytest.mark.parametrize("size", [(17, 200), (200, 17), (60, 90), (61, 81)])
def test_the_order_of_passes_is_pillow_13s(size: tuple[int, int], to: tuple[int, int]) -> None:
    image = Image.fromarray(noise(size[1], size[0]))
    ours = pillow_resize(image, to, vertical_first=pillow13_vertical_first(size, to))
    assert ours.tobytes() == image.resize(to, Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (500, 3), (333, 217), (448, 448)])
def test_any_size_is_within_two_levels_at_full_tiles(size: tuple[int, int]) -> None:
    picture = np.where(noise(size[1], size[0]) > 128, 255, 0).astype(np.uint8)
    layout = plan(*size, Tiling(max_tiles=2))
    whole = pillow_resize(Image.fromarray(picture), layout.resized_px, vertical_first=False)
    got = tile(picture, Tiling(max_tiles=2))
    expected = np.stack([np.asarray(whole.crop(box)) for box in layout.boxes])
    assert np.abs(got[: len(expected)].astype(int) - expected).max() <= MOST_LEVELS


@pytest.mark.parametrize("compat", [False, True])
def test_bytes_arrays_and_images_give_the_same_tiles(compat: bool) -> None:
    config = Tiling(tile_px=28, compat=compat)
    picture = noise(50, 80)
    image = Image.fromarray(picture)
    expected = tile(picture, config)
    assert np.array_equal(tile(image, config), expected)
    assert np.array_equal(tile(encoded(image), config), expected)
    assert np.array_equal(tile(picture[:, ::-1][:, ::-1], config), expected)


def test_a_picture_of_the_grids_size_is_cut_unchanged() -> None:
    picture = noise(56, 84)
    tiles = tile(picture, Tiling(tile_px=28, max_tiles=6))
    assert np.array_equal(tiles[4], picture[28:, 28:56])
    assert len(tiles) == 7


def test_the_callers_picture_is_left_alone() -> None:
    picture = noise(28, 28)
    tiles = tile(picture, Tiling(tile_px=28, max_tiles=1))
    before = picture.copy()
    tiles[:] = 0
    single(picture, 28)[:] = 0
    assert np.array_equal(picture, before)


def test_transparency_is_laid_on_white_and_dropped_by_compat() -> None:
    clear = np.zeros((28, 28, 4), np.uint8)
    sheer = encoded(Image.fromarray(clear))
    grey = encoded(Image.new("LA", (28, 28), (0, 0)))
    indexed = encoded(Image.new("P", (28, 28), 0), transparency=0)
    for picture in (clear, sheer, grey, indexed):
        assert tile(picture, Tiling(tile_px=28)).min() == 255
        assert tile(picture, Tiling(tile_px=28, compat=True)).max() == 0


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(noise(30, 40)).convert(mode)
    expected = tile(image.convert("RGB"), Tiling(tile_px=28, max_tiles=2))
    assert np.array_equal(tile(image, Tiling(tile_px=28, max_tiles=2)), expected)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # Orientation
JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "RGB inside": {"keep_rgb": True},
    "poor": {"quality": 5},
    "turned by EXIF": {"exif": TURNED},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("size", [(1, 1), (37, 90), (128, 65)])
def test_a_jpeg_has_the_pixels_that_pillow_gives(size: tuple, options: dict, mode: str) -> None:
    if mode != "RGB":
        options = {name: value for name, value in options.items() if name != "keep_rgb"}
    picture = Image.fromarray(noise(size[1], size[0])).convert(mode)
    data = encoded(picture, "JPEG", **({"quality": 90} | options))
    config = Tiling(tile_px=28, max_tiles=2)
    expected = tile(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"), config)
    assert np.array_equal(tile(data, config), expected)


def test_a_sound_jpeg_is_not_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(noise(120, 90)), "JPEG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert tile(data, Tiling(tile_px=28, max_tiles=2)).shape == (3, 28, 28, 3)


def test_a_damaged_jpeg_that_pillow_reads_has_its_pixels() -> None:
    sound = encoded(Image.fromarray(noise(120, 90)), "JPEG")
    middle = len(sound) // 2
    data = sound[:middle] + b"\xff\xd9" + sound[middle:]
    config = Tiling(tile_px=28, max_tiles=2)
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        simplejpeg.decode_jpeg(data)
    assert np.array_equal(tile(data, config), tile(Image.open(io.BytesIO(data)), config))


def test_padding_centres_the_picture_on_the_mean_colour() -> None:
    tiles = single(np.zeros((10, 15, 3), np.uint8), 15, pad=True)
    assert tiles.shape == (1, 15, 15, 3)
    rows = [2, 12]  # 2 rows above, 3 below
    assert tiles[0, rows[0] : rows[1]].max() == 0
    assert tiles[0, 1, 0].tolist() == tiles[0, 12, 14].tolist() == [123, 116, 103]


def test_the_size_is_read_without_decoding() -> None:
    data = encoded(Image.fromarray(noise(120, 90)), "JPEG")
    assert picture_size(data[:700]) == (90, 120)


def test_torch_is_not_needed_to_plan_or_for_compat() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from vlfoundry.models.preprocess.tiling import Tiling, plan, tile\n"
        "assert plan(640, 480).tiles == 13\n"
        "tile(np.zeros((9, 5, 3), np.uint8), Tiling(tile_px=28, compat=True))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"no picture", "10 bytes cannot be read as a picture"),
        (b"", "0 bytes cannot be read as a picture"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\], expected uint8 \[H, W, 3 or 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "a picture of 4 x 0 px"),
    ],
)
def test_what_is_no_picture_says_so(picture: bytes | np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tile(picture)


def test_a_cut_file_says_so() -> None:
    data = encoded(Image.fromarray(noise(120, 90)), "JPEG")
    with pytest.raises(DataError, match=r"\d+ bytes cannot be read as a picture \(.*truncated"):
        tile(data[: len(data) // 2])


def test_a_picture_that_takes_too_much_memory_is_refused() -> None:
    data = encoded(Image.new("L", (13_001, 12_999)))
    with pytest.raises(DataError, match=r"13001 x 12999 px; decoding it would take about \d+ MB"):
        tile(data)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tiling(min_tiles=0), "min_tiles is 0"),
        (lambda: Tiling(min_tiles=7, max_tiles=6), "min_tiles is 7 and max_tiles 6"),
        (lambda: Tiling(tile_px=0), "tile_px is 0"),
        (lambda: share_tiles(12, 0), "12 tiles for 0 pictures"),
        (lambda: tokens_per_tile(450), "tile_px is 450, expected a multiple of 28"),
    ],
)
def test_what_cannot_be_asked_says_so(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
