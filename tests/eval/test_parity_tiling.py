"""The check of dynamic resolution passes on a recorded folder, and fails where it must."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlfoundry.eval.parity.tiling import check_tiling, is_tiling
from vlfoundry.infra.core.errors import DataError
from vlfoundry.models.preprocess import tiling

OFFICIAL = Path(__file__).parents[1] / "models" / "golden" / "tiling" / "official"


def failed(folder: Path) -> list[str]:
    return [check.name for check in check_tiling(folder) if not check.passed]


@pytest.fixture
def pictures_alone(tmp_path: Path) -> Path:
    """A folder with the recorded picture and no grids."""
    for name in ("image_tiles.json", "image4_123x457.png"):
        shutil.copy(OFFICIAL / name, tmp_path)
    return tmp_path


@pytest.fixture
def grids_alone(tmp_path: Path) -> Path:
    """A folder with the recorded grids and no pictures."""
    shutil.copy(OFFICIAL / "dynamic_preprocess.json", tmp_path)
    return tmp_path


def test_the_official_grids_and_tiles_are_reproduced() -> None:
    assert is_tiling(OFFICIAL)
    checks = check_tiling(OFFICIAL)
    assert [check for check in checks if not check.passed] == []
    assert len({check.name for check in checks}) == len(checks) == 48 + 4 * 8 + 4


@pytest.mark.parametrize("share", [0.0, 1.0, float("inf")])
def test_a_wrong_tie_rule_fails(
    grids_alone: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(tiling, "_fills_half", lambda picture, grid: picture > share * grid)
    assert failed(grids_alone)


def test_the_other_order_of_passes_fails(
    pictures_alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tiling.pillow13_vertical_first
    monkeypatch.setattr(tiling, "pillow13_vertical_first", lambda *sizes: not order(*sizes))
    assert any("tile_sha256" in name for name in failed(pictures_alone))


def test_another_padding_fails(pictures_alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MEAN", (0.5, 0.5, 0.5))
    assert [name.split(", ")[1] for name in failed(pictures_alone)] == ["padded", "padded"]


def test_other_sizes_and_fewest_tiles_are_taken_from_the_rows(tmp_path: Path) -> None:
    row = {"width": 100, "height": 100, "image_size": 28, "min_num": 4, "max_num": 9}
    row |= {"use_thumbnail": True, "n_tiles": 10, "grid": [3, 3]}
    (tmp_path / "dynamic_preprocess.json").write_text(json.dumps([row, row | {"n_tiles": 9}]))
    assert [name.split(":")[0] for name in failed(tmp_path)] == ["grid 1"]


def test_a_row_that_records_nothing_fails(tmp_path: Path) -> None:
    row = {"width": 100, "height": 100, "max_num": 9}
    (tmp_path / "dynamic_preprocess.json").write_text(json.dumps([row]))
    (check,) = check_tiling(tmp_path)
    assert not check.passed
    assert "records none" in check.note


def test_what_is_not_there_says_so(pictures_alone: Path, tmp_path_factory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    assert not is_tiling(empty)
    with pytest.raises(DataError, match=r"neither dynamic_preprocess\.json nor image_tiles\.json"):
        check_tiling(empty)
    (pictures_alone / "image4_123x457.png").unlink()
    with pytest.raises(DataError, match="which is not there"):
        check_tiling(pictures_alone)


def test_one_pixel_off_fails(pictures_alone: Path) -> None:
    rows = json.loads((pictures_alone / "image_tiles.json").read_text())
    corners = np.asarray(rows[0]["tile_corner_pixels"])
    corners[0, 0, 0] += 1
    rows[0]["tile_corner_pixels"] = corners.tolist()
    (pictures_alone / "image_tiles.json").write_text(json.dumps(rows))
    assert [name.rsplit(", ")[-1] for name in failed(pictures_alone)] == ["tile_corner_pixels"]
