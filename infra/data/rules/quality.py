"""What the pixels of a small picture say about its quality. uint8 RGBA [N, S, S, 4] throughout."""

import numpy as np

from vlfoundry.infra.data.images.bulk import GREY, composite

INK_CONTRAST = 70.0
"""Grey levels between neighbouring pixels that count as the edge of a printed stroke."""
NEUTRAL = 36
"""Largest spread of a pixel's channels at which it still counts as black, grey or white."""
TEXT_ROWS = 5
"""Rows of small print that must show strokes one below the other."""


def effective_side(images: np.ndarray) -> np.ndarray:
    """The side in pixels of the smallest picture that could have been enlarged to this. [N].

    Two traces of enlargement by a factor S/k: interpolation spreads every edge over S/k pixels, so
    that no step exceeds k/S of the full contrast; repetition leaves only k distinct rows and
    columns. What is smaller of the two estimates counts.
    """
    side = images.shape[1]
    alpha = images[..., 3:].astype(np.float32) / 255.0
    planes = np.concatenate([images[..., :3] * alpha, 255.0 * alpha], axis=-1)
    return side * np.minimum(_sharpest_step(planes), _distinct_lines(planes))


def _sharpest_step(planes: np.ndarray) -> np.ndarray:
    """Largest step between neighbours against the contrast around it, 0..1. [N]."""
    result = np.zeros(len(planes), np.float32)
    for axis in (1, 2):
        steps = np.abs(np.diff(planes, axis=axis)).max(axis=-1).reshape(len(planes), -1)
        rank = int(0.999 * steps.shape[1])  # not the very largest: one pixel is no edge
        result = np.maximum(result, np.partition(steps, rank, axis=1)[:, rank])
    contrast = planes.max(axis=(1, 2)) - planes.min(axis=(1, 2))
    return result / np.maximum(contrast.max(axis=-1), 1.0)


def _distinct_lines(planes: np.ndarray) -> np.ndarray:
    """Share of rows and columns, inside the drawing, that differ from the one before. [N].

    Pixels enlarged by repetition never change in two lines running; a plain drawing with few
    edges does, where its edges are anti-aliased, and is not mistaken for it.
    """
    shares = []
    for axis in (1, 2):
        change = np.abs(np.diff(planes, axis=axis)).max(axis=(3 - axis, 3)) > 3.0
        first = change.argmax(axis=1)
        last = change.shape[1] - change[:, ::-1].argmax(axis=1)
        count = change.sum(axis=1)
        running = (change[:, 1:] & change[:, :-1]).sum(axis=1)
        shares.append(np.where(running > 0.1 * count, 1.0, count / np.maximum(last - first, 1)))
    return np.maximum(*shares)


def text_strokes(images: np.ndarray) -> np.ndarray:
    """How many edges of black-and-white strokes stand side by side in a line of print. [N].

    Counted in each row: strong steps between neutral (black, grey, white) pixels, on white and on
    black ground, whichever shows fewer; the answer is the best run of `TEXT_ROWS` rows, by the
    poorest row of the run.
    """
    counts = np.minimum(_stroke_edges(images, 255), _stroke_edges(images, 0))
    runs = np.lib.stride_tricks.sliding_window_view(counts, TEXT_ROWS, axis=1)
    return runs.mean(axis=2).max(axis=1)


def _stroke_edges(images: np.ndarray, ground: int) -> np.ndarray:
    """Edges between neutral pixels in each row. [N, S]."""
    rgb = composite(images, (ground,) * 3).astype(np.float32)
    neutral = rgb.max(axis=-1) - rgb.min(axis=-1) <= NEUTRAL
    step = np.abs(np.diff(rgb @ GREY, axis=2)) > INK_CONTRAST
    return (step & neutral[:, :, 1:] & neutral[:, :, :-1]).sum(axis=2)
