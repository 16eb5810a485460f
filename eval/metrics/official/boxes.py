"""Boxes told in words (RefCOCO, RefCOCO+, RefCOCOg). Boxes are x1, y1, x2, y2.

Source: internvl_chat/eval/refcoco/evaluate_grounding.py. It computes in single precision, and so
do these functions, so that a box on the threshold falls on the same side.
"""

import re
from collections.abc import Sequence

import numpy as np

from vlfoundry.eval.metrics.official.inputs import same_length
from vlfoundry.infra.core.errors import DataError

BOX = re.compile(r"\[+([^,\n]*),([^,\n]*),([^,\n]*),([^\]\n]*)\]")
UNITS = 1000
FRACTIONS_SUM_BELOW = 4
"""Coordinates with a smaller sum are fractions of the picture, others count to 1000."""
IOU_THRESHOLD = 0.5


def box_in_pixels(answer: str, height_px: int, width_px: int) -> np.ndarray:
    """The first box in a reply, float32 [4] in pixels; zeros if there is none or it has no numbers.

    Raises DataError if the picture has no area.
    """
    if height_px <= 0 or width_px <= 0:
        raise DataError(f"a picture of {height_px} x {width_px} px, expected both above 0")
    box = _told(answer)
    if box.sum() >= FRACTIONS_SUM_BELOW:
        box = box / np.float32(UNITS)
    return box * np.array([width_px, height_px, width_px, height_px], np.float32)


def box_iou(guess: Sequence[float] | np.ndarray, truth: Sequence[float] | np.ndarray) -> float:
    """Intersection over union of two boxes, in single precision; 0 if neither has an area."""
    a, b = _box(guess), _box(truth)
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    inside = sides[0] * sides[1]
    union = _area(a) + _area(b) - inside
    return float(inside / union) if union else 0.0


def grounding_accuracy(
    answers: Sequence[str],
    truths_px: Sequence[Sequence[float]],
    sizes_px: Sequence[tuple[int, int]],
) -> float:
    """Share of replies whose box has an IoU of 0.5 or more; sizes are (height, width)."""
    count = same_length(answers=answers, truths_px=truths_px, sizes_px=sizes_px)
    items = zip(answers, truths_px, sizes_px, strict=True)
    return (
        sum(is_right(box_iou(box_in_pixels(text, *size), box)) for text, box, size in items) / count
    )


def is_right(iou: float) -> bool:
    """Whether a box with this IoU counts as found."""
    return iou >= IOU_THRESHOLD


def _told(answer: str) -> np.ndarray:
    match = BOX.search(answer)
    try:
        return np.array([float(x) for x in match.groups()] if match else np.zeros(4), np.float32)
    except ValueError:
        return np.zeros(4, np.float32)


def _box(values: Sequence[float] | np.ndarray) -> np.ndarray:
    box = np.asarray(values, np.float32)
    if box.shape != (4,):
        raise DataError(f"a box of shape {box.shape}, expected the four numbers x1, y1, x2, y2")
    return box


def _area(box: np.ndarray) -> np.float32:
    return (box[2] - box[0]) * (box[3] - box[1])
