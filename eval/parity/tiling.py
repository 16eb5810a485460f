"""Dynamic resolution against the official grids and pixels (folders of group D)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlfoundry.eval.parity.check import Check, close, same
from vlfoundry.infra.core.errors import DataError
from vlfoundry.models.preprocess.normalize import normalize_float, normalize_uint8
from vlfoundry.models.preprocess.tiling import Tiling, plan, single, tile

GRIDS = "dynamic_preprocess.json"
PICTURES = "image_tiles.json"
# `normalize_uint8` rounds float32 in another order than the official transform.
STATISTICS_ATOL = 1e-5


def is_tiling(folder: Path) -> bool:
    """Whether a folder holds recorded grids or tiles."""
    return (folder / GRIDS).is_file() or (folder / PICTURES).is_file()


def check_tiling(folder: Path) -> list[Check]:
    """One check a recorded grid, several a recorded picture.

    Raises DataError if the folder is not of this group, or a file of it is missing.
    """
    if not is_tiling(folder):
        raise DataError(f"{folder} holds neither {GRIDS} nor {PICTURES}")
    checks = [_grid(number, row) for number, row in enumerate(_rows(folder / GRIDS))]
    for number, row in enumerate(_rows(folder / PICTURES)):
        checks += _picture(number, row, folder)
    return checks


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def _config(row: dict[str, Any]) -> Tiling:
    """The official function's own defaults hold for what a row does not say."""
    return Tiling(
        tile_px=row.get("image_size", 448),
        min_tiles=row.get("min_num", 1),
        max_tiles=row.get("max_num", 6),
        thumbnail=row.get("use_thumbnail", False),
        compat=True,
    )


def _label(config: Tiling) -> str:
    thumbnail = " + thumbnail" if config.thumbnail else ""
    return f"{config.min_tiles}-{config.max_tiles} tiles of {config.tile_px}{thumbnail}"


def _recorded(name: str, got: dict[str, Any], row: dict[str, Any]) -> Check:
    """Compare the fields that the row has."""
    wanted = {key: row[key] for key in got if key in row}
    if not wanted:
        return Check(name=name, passed=False, note=f"the row records none of {sorted(got)}")
    return same(name, {key: got[key] for key in wanted}, wanted)


def _grid(number: int, row: dict[str, Any]) -> Check:
    config = _config(row)
    layout = plan(row["width"], row["height"], config)
    got = {
        "grid": list(layout.grid),
        "resize_to": list(layout.resized_px),
        "boxes": [list(box) for box in layout.boxes],
        "n_tiles": layout.tiles,
        "has_thumbnail": layout.has_thumbnail,
    }
    name = f"grid {number}: {row['width']} x {row['height']}, {_label(config)}"
    return _recorded(name, got, row)


def _picture(number: int, row: dict[str, Any], folder: Path) -> list[Check]:
    path = folder / row["file"]
    if not path.is_file():
        raise DataError(f"{folder / PICTURES} names {row['file']}, which is not there")
    config = _config(row)
    picture = path.read_bytes()
    name = f"picture {number}: {row['file']}"
    if row.get("no_tiling"):
        side = config.tile_px
        stretched = single(picture, side, compat=True)
        padded = single(picture, side, pad=True, compat=True)
        return [
            *_whole(f"{name}, stretched", stretched, row, "resize"),
            *_whole(f"{name}, padded", padded, row, "pad2square"),
        ]
    return _tiles(f"{name}, {_label(config)}", tile(picture, config), row)


def _whole(name: str, tiles: np.ndarray, row: dict[str, Any], key: str) -> list[Check]:
    digest = {f"{key}_sha256": _sha256(_official_pixels(tiles))}
    checks = [_recorded(f"{name}, pixel values", digest, row)]
    if f"{key}_mean" in row:
        mean = normalize_uint8(tiles).double().mean((0, 2, 3)).numpy()
        wanted = np.asarray(row[f"{key}_mean"])
        checks.append(close(f"{name}, mean", mean, wanted, atol=STATISTICS_ATOL))
    return checks


def _tiles(name: str, tiles: np.ndarray, row: dict[str, Any]) -> list[Check]:
    side = tiles.shape[1]
    got = {
        "n_tiles": len(tiles),
        "tile_sizes": [[side, side]] * len(tiles),
        "tile_sha256": [_sha256(one) for one in tiles],
        "pixel_values_sha256": _sha256(_official_pixels(tiles)),
    }
    checks = [_recorded(f"{name}, {key}", {key: value}, row) for key, value in got.items()]
    pixels = normalize_uint8(tiles).double()
    corners = [(0, 0), (side - 1, 0), (0, side - 1), (side - 1, side - 1), (side // 2, side // 3)]
    numbers = {
        "tile_corner_pixels": (tiles[:, [y for _, y in corners], [x for x, _ in corners]], 0.0),
        "tile_mean_rgb": (tiles.mean((1, 2)), 1e-9),
        "pixel_values_mean_per_tile_channel": (pixels.mean((2, 3)), STATISTICS_ATOL),
        "pixel_values_std_per_tile_channel": (pixels.std((2, 3)), STATISTICS_ATOL),
    }
    for key, (values, atol) in numbers.items():
        if key in row:
            checks.append(close(f"{name}, {key}", np.asarray(values), row[key], atol=atol))
    return checks


def _official_pixels(tiles: np.ndarray) -> np.ndarray:
    """float32 [N, 3, S, S] with the official order of roundings: / 255, - mean, / deviation."""
    import torch

    planes = torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2)))
    return normalize_float(planes.float().div(255)).numpy()


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values)).hexdigest()
