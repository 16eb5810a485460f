"""Frames of a video, and the lines that name pictures."""

import numpy as np
import pytest

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.models.chat.visual import frame_indices, frame_lines, image_lines


def test_the_middle_of_equal_intervals() -> None:
    assert frame_indices(80, most=8).tolist() == [4, 14, 24, 34, 44, 54, 64, 74]
    assert frame_indices(1, most=8).tolist() == [0]
    assert frame_indices(5, most=8).tolist() == [0, 1, 2, 3, 4]
    assert frame_indices(9, most=1, least=1).tolist() == [4]


@pytest.mark.parametrize("length", [1, 7, 8, 31, 100, 12345])
def test_training_draws_one_frame_of_each_interval(length: int) -> None:
    draw = np.random.default_rng(0)
    counts = set()
    for _ in range(200):
        frames = frame_indices(length, draw=draw)
        assert frames.dtype == np.int64
        assert (np.diff(frames) > 0).all()
        assert frames[0] >= 0
        assert frames[-1] < length
        counts.add(len(frames))
    assert counts == {min(length, count) for count in range(8, 33)}


def test_every_frame_of_an_interval_can_be_drawn() -> None:
    draw = np.random.default_rng(0)
    seen = {tuple(frame_indices(4, most=2, least=2, draw=draw).tolist()) for _ in range(100)}
    assert seen == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_lines() -> None:
    assert frame_lines(2) == "Frame-1: <image>\nFrame-2: <image>"
    assert image_lines(2) == "Image-1: <image>\nImage-2: <image>"


def test_what_cannot_be_sampled_says_so() -> None:
    with pytest.raises(DataError, match="a video of 0 frames"):
        frame_indices(0)
    with pytest.raises(ConfigError, match="9 to 8 frames"):
        frame_indices(10, most=8, least=9)
