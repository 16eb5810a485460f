"""JPEG bytes to tiles of 448 px (at most 6 and a thumbnail), beside the official way restated.

Official: decode, Pillow's bicubic resize, one crop a tile, then float32 pixel values (ToTensor and
Normalize). Its line without those is "tiles alone". Ours says how far its tiles are from those of
Pillow 11.3, in 8-bit levels.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import Case, benchmark

if TYPE_CHECKING:
    from torch import Tensor

    from vlfoundry.models.preprocess.tiling import Tiling

SEED = 448
# Width and height (px) of usual web pictures (0.2 to 1.2 MP) and of photographs (2 to 6 MP).
SIZES_PX = {
    "web": (
        (640, 480), (500, 375), (480, 640), (800, 600), (1024, 768), (1280, 720), (600, 900),
        (1080, 1080),
    ),
    "photo": ((1920, 1080), (2000, 1500), (3000, 2000)),
}  # fmt: skip
QUALITY = 87
PACKAGES = ("pillow", "simplejpeg", "torch", "numpy")


@benchmark("tiling")
def tiling() -> Iterator[tuple[Case, ...]]:
    """Pictures a CPU-second on one thread."""
    import torch

    from vlfoundry.models.preprocess.tiling import Tiling

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw = np.random.default_rng(SEED)
    for name, sizes in SIZES_PX.items():
        files = [_jpeg(width, height, draw) for width, height in sizes]
        yield from _cases(name, files, Tiling(max_tiles=6))
    torch.set_num_threads(threads)


def _cases(name: str, files: Sequence[bytes], config: "Tiling") -> Iterator[tuple[Case, ...]]:
    from vlfoundry.models.preprocess.normalize import normalize_uint8
    from vlfoundry.models.preprocess.tiling import tile

    def case(label: str, work: Callable[[bytes], object], **more: Any) -> Case:
        return Case(
            name=f"{label}, {name}",
            call=lambda: [work(data) for data in files],
            items=len(files),
            unit="images",
            packages=PACKAGES,
            **more,
        )

    pixels = case("official", lambda data: _official(data, config))
    cut = case("official, tiles alone", lambda data: _official_tiles(data, config))
    facts = {"levels_from_pillow_11": max(_levels(data, config) for data in files)}
    yield (
        pixels,
        cut,
        case("ours", lambda data: tile(data, config), against=pixels.name, facts=facts),
        case(
            "ours, pixel values",
            lambda data: normalize_uint8(tile(data, config)),
            against=pixels.name,
        ),
        case("ours, tiles alone", lambda data: tile(data, config), against=cut.name, facts=facts),
    )


def _jpeg(width: int, height: int, draw: np.random.Generator) -> bytes:
    """Soft patches of colour with fine grain: about as many bytes a pixel as a photograph."""
    from PIL import Image

    coarse = draw.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    patches = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = draw.integers(-8, 9, (height, width, 1), dtype=np.int16)
    pixels = (np.asarray(patches) + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _official_tiles(data: bytes, config: "Tiling") -> Sequence:
    """Pillow images, cut one by one with the resize of the Pillow that is installed."""
    from PIL import Image

    from vlfoundry.models.preprocess.tiling import plan

    image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
    layout = plan(*image.size, config)
    whole = image.resize(layout.resized_px)
    tiles = [whole.crop(box) for box in layout.boxes]
    if layout.has_thumbnail:
        tiles.append(image.resize((config.tile_px, config.tile_px)))
    return tiles


def _official(data: bytes, config: "Tiling") -> "Tensor":
    """float32 [N, 3, S, S]"""
    import torch

    from vlfoundry.models.preprocess.normalize import normalize_float

    planes = []
    for one in _official_tiles(data, config):
        pixels = torch.from_numpy(np.array(one)).permute(2, 0, 1).contiguous()
        planes.append(normalize_float(pixels.float().div(255)[None])[0])
    return torch.stack(planes)


def _levels(data: bytes, config: "Tiling") -> int:
    """Largest difference between our tiles and Pillow 11.3's, in 8-bit levels."""
    from PIL import Image

    from vlfoundry.models.preprocess.tiling import pillow_resize, plan, tile

    image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
    layout = plan(*image.size, config)
    whole = pillow_resize(image, layout.resized_px, vertical_first=False)
    tiles = [whole.crop(box) for box in layout.boxes]
    if layout.has_thumbnail:
        side = (config.tile_px, config.tile_px)
        tiles.append(pillow_resize(image, side, vertical_first=False))
    wanted = np.stack([np.asarray(one) for one in tiles]).astype(np.int16)
    return int(np.abs(tile(data, config) - wanted).max())
