"""Pictures and videos in a prompt: which frames are seen, and the lines that name them.

`templates.with_image_tokens` then puts visual tokens where each `<image>` is.

Source: the chat data format of OpenGVLab/InternVL (`<image>`, `<video>`, "Frame-1: ", "Image-1: ").
"""

import numpy as np

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.models.chat.templates import IMAGE

VIDEO = "<video>"
"""stands for the frames of the video in a question"""


def frame_indices(
    length: int, most: int = 32, least: int = 8, draw: np.random.Generator | None = None
) -> np.ndarray:
    """Which frames of a video of `length` are seen: int64, ascending.

    The video is cut into equal intervals. Without `draw`: `most` of them and the middle frame of
    each. With it (training): least to most intervals and any frame of each. A shorter video gives
    every frame once.
    """
    if length < 1:
        raise DataError(f"a video of {length} frames, expected 1 or more")
    if not 1 <= least <= most:
        raise ConfigError(f"{least} to {most} frames, expected 1 <= least <= most")
    wanted = most if draw is None else int(draw.integers(least, most + 1))
    count = min(wanted, length)
    ends = np.arange(count + 1, dtype=np.int64) * length // count
    first, last = ends[:-1], ends[1:] - 1
    return (first + last) // 2 if draw is None else draw.integers(first, last + 1)


def frame_lines(frames: int) -> str:
    """What `<video>` stands for: one line with a picture for each frame."""
    return "\n".join(f"Frame-{number}: {IMAGE}" for number in range(1, frames + 1))


def image_lines(images: int) -> str:
    """How a prompt names several pictures: one line for each."""
    return "\n".join(f"Image-{number}: {IMAGE}" for number in range(1, images + 1))
