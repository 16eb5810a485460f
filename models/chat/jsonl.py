"""The official chat jsonl format: one conversation a line, with pictures, a video or neither.

    {"id": 7, "image": "a.png", "width": 640, "height": 480, "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

`image` is a path, or a list of paths (with lists of widths and heights); `video` is a path. A
conversation may open with {"from": "system", ...}. Other fields are carried by many data sets and
are left alone, unless they look like one of these misspelt.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from infra.errors import DataError
from models.chat.templates import IMAGE, Message, Role
from models.chat.visual import VIDEO, frame_lines

ROLES: tuple[Role, ...] = ("system", "human", "gpt")
FIELDS = ("id", "image", "video", "width", "height", "conversations")
TURN_FIELDS = ("from", "value")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of a chat file. Every picture has its placeholder in a question."""

    id: str | int | None
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    """paths, relative to the data set's root"""
    video: str | None = None
    sizes_px: tuple[tuple[int, int], ...] = ()
    """width and height of each picture, or nothing where the line does not say"""

    def with_frames(self, frames: int) -> tuple[Message, ...]:
        """The messages of a video, its placeholder as one numbered line a frame."""
        lines = frame_lines(frames)
        return tuple(Message(role, text.replace(VIDEO, lines)) for role, text in self.messages)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one line of a chat file."""

    file: Path
    line: int
    """from 1"""
    field: str
    """such as `conversations[2].from`; the line as a whole is `(line)`"""
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.message}"


class _Wrong(Exception):
    """A field that is not as documented."""

    def __init__(self, field: str, got: object, expected: str):
        shown = got if isinstance(got, _Words) else json.dumps(got, ensure_ascii=False)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"got {shown}, expected {expected}")
        self.field = field


class _Words(str):
    """What was got, told in words."""


def read(path: str | Path) -> Iterator[Sample]:
    """The samples of a chat file, in order.

    Raises:
        DataError: at the first line that is not in the format; names file, line and field.
    """
    for found in _lines(Path(path)):
        if isinstance(found, Problem):
            raise DataError(str(found))
        yield found


class ChatFile:
    """Random access to the samples of a chat file: memory is eight bytes a line.

    Raises:
        DataError: the file does not exist or is empty; later, a line that is asked for is not in
            the format (names file, line and field).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        starts = [0]
        with _opened(self.path) as file:
            starts += [file.tell() for _ in iter(file.readline, b"")]
        if len(starts) == 1:
            raise DataError(f"{self.path} is empty; expected a chat file, one JSON object a line")
        self._starts = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Sample:
        start, end = self._starts[index : index + 2]
        with _opened(self.path) as file:
            file.seek(start)
            found = _read(self.path, index + 1, file.read(end - start))
        if isinstance(found, Problem):
            raise DataError(str(found))
        return found


def problems(path: str | Path) -> list[Problem]:
    """What is wrong with a chat file: the first problem of each line that has one."""
    return [found for found in _lines(Path(path)) if isinstance(found, Problem)]


def _lines(path: Path) -> Iterator[Sample | Problem]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            yield _read(path, number, line)


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a chat file, one JSON object a line")
    return path.open("rb")


def _read(path: Path, number: int, line: bytes) -> Sample | Problem:
    try:
        return _sample(_parsed(line))
    except _Wrong as error:
        return Problem(file=path, line=number, field=error.field, message=str(error))


def _parsed(line: bytes) -> dict[str, object]:
    if not line.strip():
        raise _Wrong("(line)", _Words("a blank line"), "a JSON object")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Wrong("(line)", _Words(f"bytes {error}"), "UTF-8") from None
    except json.JSONDecodeError as error:
        raise _Wrong(
            "(line)", _Words(f"{error.msg} at column {error.colno}"), "a JSON object"
        ) from None
    if not isinstance(record, dict):
        raise _Wrong("(line)", record, "a JSON object")
    return record


def _sample(record: dict[str, object]) -> Sample:
    """One parsed line. Raises an error that names the field."""
    _no_misspelling(record, FIELDS)
    if isinstance(record.get("id"), bool | float | list | dict):
        raise _Wrong("id", record["id"], "a string or a whole number")
    messages = _messages(record.get("conversations"))
    images, video = _images(record), _video(record)
    if images and video:
        raise _Wrong("video", video, "no video beside image: a sample has one or the other")
    return Sample(
        id=record.get("id"),
        messages=_with_placeholders(messages, images, video),
        images=images,
        video=video,
        sizes_px=_sizes(record, images),
    )


def _no_misspelling(record: dict[str, object], known: tuple[str, ...], within: str = "") -> None:
    for name in record:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
        if name not in known and near and near[0] not in record:
            raise _Wrong(within + name, _Words("an unknown field"), f"`{near[0]}`")


def _messages(turns: object) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise _Wrong("conversations", turns, "a list of turns {from, value}")
    messages = [_message(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    for i, message in enumerate(messages):
        expected = _expected_roles(messages[i - 1].role if i else None)
        if message.role not in expected:
            raise _Wrong(f"conversations[{i}].from", message.role, " or ".join(expected))
    if messages[-1].role != "gpt":
        raise _Wrong(
            f"conversations[{len(messages) - 1}].from",
            messages[-1].role,
            "gpt: a conversation ends in an answer",
        )
    return messages


def _expected_roles(before: Role | None) -> tuple[Role, ...]:
    if before is None:
        return ROLES
    return ("human", "gpt") if before == "system" else ("gpt",) if before == "human" else ("human",)


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _Wrong(where, turn, "an object {from, value}")
    _no_misspelling(turn, TURN_FIELDS, f"{where}.")
    role, text = turn.get("from"), turn.get("value")
    if role not in ROLES:
        raise _Wrong(f"{where}.from", role, " or ".join(ROLES))
    if not isinstance(text, str):
        raise _Wrong(f"{where}.value", text, "a string")
    if role == "gpt" and not text.strip():
        raise _Wrong(
            f"{where}.value", text, "an answer: there is nothing to learn from a blank one"
        )
    return Message(role, text)


def _images(record: dict[str, object]) -> tuple[str, ...]:
    """Paths of the pictures; an empty `image` is the official way to say that there is none."""
    image = record.get("image")
    if image is None or image == "":
        return ()
    if isinstance(image, str):
        return (image,)
    if not isinstance(image, list):
        raise _Wrong("image", image, "a path or a list of paths")
    for i, path in enumerate(image):
        if not isinstance(path, str) or not path:
            raise _Wrong(f"image[{i}]", path, "a path")
    return tuple(image)


def _video(record: dict[str, object]) -> str | None:
    video = record.get("video")
    if video is not None and not isinstance(video, str):
        raise _Wrong("video", video, "a path")
    return video or None


def _with_placeholders(
    messages: list[Message], images: tuple[str, ...], video: str | None
) -> tuple[Message, ...]:
    """The messages, a placeholder put before the first question if the only picture has none."""
    wanted = {IMAGE: len(images), VIDEO: 1 if video else 0}
    first = next((i for i, m in enumerate(messages) if m.role == "human"), None)
    for mark, count in wanted.items():
        seen = 0
        for i, (role, text) in enumerate(messages):
            seen += text.count(mark)
            if mark in text and (role != "human" or seen > count):
                raise _Wrong(f"conversations[{i}].value", text, _placeholders_wanted(mark, count))
        if seen == count:
            continue
        if first is None:
            raise _Wrong("conversations", _Words("no question"), "one that shows the picture")
        if count > 1:
            raise _Wrong(
                "conversations", _Words(f"{seen} {mark}"), _placeholders_wanted(mark, count)
            )
        messages[first] = Message("human", f"{mark}\n{messages[first].text}")
    return tuple(messages)


def _placeholders_wanted(mark: str, count: int) -> str:
    field = mark.strip("<>")
    if not count:
        return f"no {mark}: the sample has no `{field}`"
    return f"{count} {mark} in the human turns, as many as `{field}` names, and none elsewhere"


def _sizes(record: dict[str, object], images: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Width and height of each picture in pixels, where the line gives them."""
    if not images:
        return ()
    widths, heights = (_side(record, name, len(images)) for name in ("width", "height"))
    if not widths and not heights:
        return ()
    for name, own, other in (("width", widths, heights), ("height", heights, widths)):
        if not own and other:
            raise _Wrong(name, record.get(name), "both width and height, or neither")
    return tuple(zip(widths, heights, strict=True))


def _side(record: dict[str, object], name: str, images: int) -> tuple[int, ...]:
    side = record.get(name)
    if side is None:
        return ()
    listed = isinstance(side, list)
    if (images > 1 and not listed) or (listed and len(side) != images):
        wanted = f"a list of {images} numbers, one an image" if images > 1 else "a number of pixels"
        raise _Wrong(name, side, wanted)
    sizes = list(side) if isinstance(side, list) else [side]
    for i, pixels in enumerate(sizes):
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels <= 0:
            raise _Wrong(f"{name}[{i}]" if listed else name, pixels, "a whole number of pixels > 0")
    return tuple(sizes)
