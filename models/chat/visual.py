"""Pictures and videos in a prompt: which frames are seen, and the text that stands for them.

Source: the chat data format of OpenGVLab/InternVL (`<image>`, `<video>`, "Frame-1: ", "Image-1: ").
"""

from collections.abc import Sequence

import numpy as np

from infra.errors import ConfigError, DataError
from models.chat.templates import IMAGE
from models.tokenizer import END_IMG, IMG, IMG_CONTEXT

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


def place_video(text: str, frames: int) -> str:
    """Put the lines of the frames where `<video>` is, or first where there is none."""
    if text.count(VIDEO) > 1:
        raise DataError(f"{text.count(VIDEO)} times {VIDEO} in a prompt, expected one at most")
    text = text if VIDEO in text else f"{VIDEO}\n{text}"
    return text.replace(VIDEO, frame_lines(frames))


def place_images(text: str, tiles: Sequence[int], tokens_per_tile: int = 256) -> str:
    """Put each picture's visual tokens where its `<image>` is; a lone picture may have none: first.

    `tiles` holds the tiles of each picture, thumbnails among them.
    """
    if len(tiles) == 1 and IMAGE not in text:
        text = f"{IMAGE}\n{text}"
    pieces = text.split(IMAGE)
    if len(pieces) != len(tiles) + 1:
        raise DataError(
            f"{len(pieces) - 1} times {IMAGE} in a prompt with {len(tiles)} pictures; "
            f"write {IMAGE} once for each"
        )
    marks = [IMG + IMG_CONTEXT * (n * tokens_per_tile) + END_IMG for n in tiles]
    return pieces[0] + "".join(mark + piece for mark, piece in zip(marks, pieces[1:], strict=True))
