"""Noise on pictures of any shape: of the size that it was, repeatable, and it can be stored."""

import numpy as np
import pytest

from vlfoundry.infra.data.images.decode import decode_rgba
from vlfoundry.infra.data.synthetic.noise import lossless, low_resolution, overlay_text, reencode

SHAPES = [(192, 256), (256, 192), (64, 64), (13, 200), (3, 5), (1, 1), (4, 4), (2, 37)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 4), np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_every_noise_keeps_the_size(shape: tuple[int, int], seed: int) -> None:
    rgba = picture(*shape)
    printed = overlay_text(rgba, np.random.default_rng(seed))
    assert printed.shape == rgba.shape
    assert np.array_equal(printed, overlay_text(rgba, np.random.default_rng(seed)))
    assert np.array_equal(decode_rgba(lossless(printed)), printed)
    assert low_resolution(rgba, np.random.default_rng(seed))[0].shape == rgba.shape
    assert decode_rgba(reencode(rgba, np.random.default_rng(seed))).shape == rgba.shape


def test_text_runs_from_edge_to_edge_of_a_wide_picture() -> None:
    rgba = np.full((48, 300, 4), 255, np.uint8)
    changed = np.zeros((48, 300), bool)
    for seed in range(40):
        changed |= (overlay_text(rgba, np.random.default_rng(seed)) != rgba).any(-1)
    assert changed[:, 250:].any()
    assert changed[:, :50].any()
