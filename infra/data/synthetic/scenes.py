"""Scenes with known truth: one to three drawings on a coloured background, and questions on them.

The answer to every question follows from how the scene was made, so it can be checked exactly.
Words and templates stand in `scenes.json` beside this file, one table a language. Questions put
the name of an object after a colon, so that no grammar (gender, article, case) depends on it.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vlfoundry.infra.core.errors import ConfigError, DataError

WORDS_FILE = Path(__file__).with_name("scenes.json")
BOX_UNITS = 1000
MAX_OBJECTS = 3
ALPHA_SOLID = 128

Kind = Literal["colour", "box", "caption", "count", "position"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One drawing that can be placed in a scene."""

    concept: str
    """What it shows; equal concepts are the same thing drawn twice."""
    rgba: np.ndarray
    """uint8 [H, W, 4], straight alpha; the alpha channel is the shape."""
    names: Mapping[str, str]
    """What it is called, by language."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and everything that is true of it."""

    image: np.ndarray
    """uint8 [S, S, 3]."""
    background: str
    """Key of the background colour in `scenes.json`."""
    objects: tuple[tuple[str, tuple[int, int, int, int]], ...]
    """(concept, box) in the order of the drawings; a box is x1, y1, x2, y2 in 0..1000."""


def background_names() -> tuple[str, ...]:
    """Keys of the background colours."""
    return tuple(_words()["backgrounds"])


def scene_languages() -> tuple[str, ...]:
    """Languages that questions can be asked in."""
    return tuple(_words()["languages"])


def compose(rng: np.random.Generator, drawings: Sequence[Drawing], size_px: int = 64) -> Scene:
    """Place 1-3 drawings without overlap of their boxes on a random background.

    All randomness comes from `rng`: the same generator state gives the same scene. Half of the
    backgrounds are plain, half get lighter or darker towards one side.
    Raises DataError for no or too many drawings, or one that is fully transparent.
    """
    if not 1 <= len(drawings) <= MAX_OBJECTS:
        raise DataError(f"a scene takes 1 to {MAX_OBJECTS} drawings, got {len(drawings)}")
    background = background_names()[int(rng.integers(len(background_names())))]
    canvas = _ground(rng, _words()["backgrounds"][background], size_px)
    objects = []
    for drawing, (left, top, side) in zip(
        drawings, _places(rng, len(drawings), size_px), strict=True
    ):
        box = _paste(canvas, drawing, left, top, side)
        objects.append((drawing.concept, box))
    image = np.rint(canvas).astype(np.uint8)
    return Scene(image=image, background=background, objects=tuple(objects))


def pick[T](weights: Mapping[T, float], draw: float) -> T:
    """The value at `draw`, uniform in [0, 1), where each has its share of the weights."""
    edges = np.cumsum(list(weights.values())) / sum(weights.values())
    return list(weights)[min(int(np.searchsorted(edges, draw, side="right")), len(weights) - 1)]


def imagine(rng: np.random.Generator, concept: str, size_px: int = 64) -> Scene:
    """A scene of one object of which only the facts exist; its picture is a black pixel.

    For training on text alone. The box is that of a drawing which fills its square.
    """
    background = background_names()[int(rng.integers(len(background_names())))]
    left, top, side = _places(rng, 1, size_px)[0]
    edges = (left, top, left + side, top + side)
    x1, y1, x2, y2 = (round(edge * BOX_UNITS / size_px) for edge in edges)
    blank = np.zeros((1, 1, 3), np.uint8)
    return Scene(image=blank, background=background, objects=((concept, (x1, y1, x2, y2)),))


def conversation(
    scene: Scene,
    kind: str,
    lang: str,
    names: Mapping[str, str],
    target: int = 0,
    box_grid: int = BOX_UNITS,
) -> tuple[str, str]:
    """One question on the scene and its true answer in `lang`.

    `names` gives the name of each concept in that language. `box` and `position` ask for object
    `target`; its concept must occur once in the scene, or the question would have two answers.
    A box is told to the nearest of `box_grid` lines a side.
    """
    words = _language(lang)
    if kind not in KINDS:
        raise DataError(f"question kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    concept, box = scene.objects[target]
    if kind in ("box", "position") and [c for c, _ in scene.objects].count(concept) > 1:
        raise DataError(f"the scene shows {concept!r} twice: a {kind} question is ambiguous")
    values = {
        "name": names[concept],
        "names": words["and"].join(names[c] for c, _ in scene.objects),
        "colour": words["colours"][scene.background],
        "number": words["numbers"][len(scene.objects)],
        "position": words["positions"][corner(box)],
        "box": format_box(box, box_grid),
    }
    question, answer = words[kind]
    return question.format(**values), answer.format(**values)


def answer_words(kind: str, lang: str) -> tuple[str, ...]:
    """All answers that a closed question (`colour`, `count`, `position`) can have in `lang`."""
    words = _language(lang)
    if kind == "colour":
        return tuple(words["colours"].values())
    if kind == "count":
        return tuple(words["numbers"][1 : MAX_OBJECTS + 1])
    if kind == "position":
        return tuple(words["positions"].values())
    raise DataError(f"{kind!r} questions have no closed list of answers")


def caption_question(lang: str) -> str:
    """How a description of a whole picture is asked for in `lang`; it depends on no scene."""
    return _language(lang)["caption"][0]


def corner(box: Sequence[int]) -> str:
    """The quarter of the picture in which the middle of the box lies."""
    x1, y1, x2, y2 = box
    vertical = "top" if y1 + y2 < BOX_UNITS else "bottom"
    horizontal = "left" if x1 + x2 < BOX_UNITS else "right"
    return f"{vertical} {horizontal}"


def format_box(box: Sequence[int], grid: int = BOX_UNITS) -> str:
    """The text of a box, `[x1,y1,x2,y2]` in 0..1000, each edge on the nearest of `grid` lines."""
    lines = (round(value * grid / BOX_UNITS) for value in box)
    return "[" + ",".join(str(round(line * BOX_UNITS / grid)) for line in lines) + "]"


def check_box_grid(lines: int) -> None:
    """Raises ConfigError if boxes cannot be told on so many lines a side."""
    if not 1 <= lines <= BOX_UNITS:
        raise ConfigError(f"box_grid is {lines}; expected 1 to {BOX_UNITS} lines a side")


def parse_box(text: str) -> tuple[int, int, int, int] | None:
    """The first box in a reply, or None if there is none that encloses an area."""
    match = re.search(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]", text)
    if match is None:
        return None
    x1, y1, x2, y2 = (int(group) for group in match.groups())
    return (x1, y1, x2, y2) if x1 < x2 <= BOX_UNITS and y1 < y2 <= BOX_UNITS else None


def box_iou(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union else 0.0


@functools.cache
def _words() -> dict[str, Any]:
    return json.loads(WORDS_FILE.read_text(encoding="utf-8"))


def _language(lang: str) -> dict[str, Any]:
    languages = _words()["languages"]
    if lang not in languages:
        raise DataError(
            f"scenes have no words in {lang!r}; known: {', '.join(languages)}; "
            f"add a table to {WORDS_FILE.name}"
        )
    return languages[lang]


def _ground(rng: np.random.Generator, colour: Sequence[int], size_px: int) -> np.ndarray:
    """Background, float32 [S, S, 3]."""
    canvas = np.broadcast_to(np.asarray(colour, np.float32), (size_px, size_px, 3)).copy()
    is_plain, angle = rng.random() < 0.5, rng.random() * 2 * np.pi
    if is_plain:
        return canvas
    axis = np.linspace(-1.0, 1.0, size_px, dtype=np.float32)
    slope = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    return canvas * (0.93 + 0.05 * slope[..., None]).astype(np.float32)


def _places(rng: np.random.Generator, count: int, size_px: int) -> list[tuple[int, int, int]]:
    """(left, top, side) in pixels of squares that do not overlap."""
    largest = {1: 0.7, 2: 0.48, 3: 0.45}[count]
    smallest = {1: 0.3, 2: 0.34, 3: 0.3}[count]  # a constant box must not do
    while True:  # ends: squares this small always fit somewhere
        places: list[tuple[int, int, int]] = []
        for _ in range(40 * count):
            side = round(size_px * float(rng.uniform(smallest, largest)))
            left, top = (int(value) for value in rng.integers(0, size_px - side + 1, 2))
            if all(_apart((left, top, side), other) for other in places):
                places.append((left, top, side))
            if len(places) == count:
                return places


def _apart(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[2] <= b[1] or b[1] + b[2] <= a[1]


def _paste(
    canvas: np.ndarray, drawing: Drawing, left: int, top: int, side: int
) -> tuple[int, int, int, int]:
    """Draw onto the canvas in place; return the box of the solid part in 0..1000."""
    from PIL import Image

    image = Image.fromarray(drawing.rgba).convert("RGBa")  # premultiplied: no dark fringes
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    alpha = pixels[..., 3:] / 255.0
    region = canvas[top : top + side, left : left + side]
    region[:] = np.minimum(region * (1.0 - alpha) + pixels[..., :3], 255.0)
    solid = pixels[..., 3] >= ALPHA_SOLID
    columns, rows = np.flatnonzero(solid.any(axis=0)), np.flatnonzero(solid.any(axis=1))
    if not len(columns):
        raise DataError(f"the drawing of {drawing.concept!r} has no solid pixel at {side} px")
    unit = BOX_UNITS / len(canvas)
    edges = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    x1, y1, x2, y2 = (round(float(edge) * unit) for edge in edges)
    return x1, y1, x2, y2
