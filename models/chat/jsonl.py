"""The official chat jsonl format: one conversation a line, with pictures, a video or neither.

    {"id": 7, "image": "a.png", "width": 640, "height": 480, "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

`image` is a path, or a list of paths (with lists of widths and heights); `video` is a path. A
conversation may open with {"from": "system", ...}. Other fields are carried by many data sets and
are left alone, unless they look like one of these misspelt.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.givenfiles import disguise
from vlfoundry.infra.core.roots import is_text, open_plain, what_is_wrong
from vlfoundry.models.chat.control import written_out
from vlfoundry.models.chat.templates import IMAGE, Message, Role
from vlfoundry.models.chat.visual import VIDEO, frame_lines

ROLES: tuple[Role, ...] = ("system", "human", "gpt")
FIELDS = ("id", "image", "video", "width", "height", "conversations")
TURN_FIELDS = ("from", "value")
MAX_LINE_BYTES = 16 << 20
"""longest line: a conversation is some kilobytes"""
MAX_SIDE_PX = 1_000_000
"""no picture has a longer side"""
WHOLE_LETTERS = "text without halves of surrogate pairs: it was cut in the middle of a letter"
SHOWN = 80
"""letters of a wrong value that a message quotes"""
A_CHAT_FILE = "expected a chat file, one JSON object a line"
BLOCK = 1 << 20
GZIP = b"\x1f\x8b"


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

    def control_tokens(self) -> list[tuple[str, str]]:
        """Field and control token of each that is written out in a text: it is read as text."""
        return [
            (f"conversations[{i}].value", token)
            for i, message in enumerate(self.messages)
            for token in written_out(message.text)
        ]

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
        super().__init__(f"got {_shown(got)}, expected {expected}")
        self.field = printable(field)


def _shown(got: object) -> str:
    if isinstance(got, _Words):
        return printable(got)
    shown = printable(json.dumps(got, ensure_ascii=False))
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."


def printable(text: str) -> str:
    """Text that any terminal takes: halves of surrogate pairs and control characters as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


class _Words(str):
    """What was got, told in words."""


def read(path: str | Path, *, absolute_paths: bool = False) -> Iterator[Sample]:
    """The samples of a chat file, in order.

    absolute_paths: whether pictures are named by absolute paths, because their root is `/`.

    Raises:
        DataError: at the first line that is not in the format; names file, line and field.
    """
    file = ChatFile(path, absolute_paths=absolute_paths)
    return (file[index] for index in range(len(file)))


class ChatFile:
    """Random access to the samples of a chat file: memory is eight bytes a line.

    Args:
        path: of the file.
        absolute_paths: whether pictures are named by absolute paths, because their root is `/`.

    Raises:
        DataError: the file does not exist or is empty; later, a line that is asked for is not in
            the format (names file, line and field).
    """

    def __init__(self, path: str | Path, *, absolute_paths: bool = False) -> None:
        self.path, self._absolute = Path(path), absolute_paths
        with self._opened() as file:
            self._starts = _line_starts(file)
            file.seek(0)
            self._refuse_disguise(file.read(4))
        if len(self._starts) == 1:
            raise DataError(f"{self.path} is empty; {A_CHAT_FILE}")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Sample:
        found = self.look(index)
        if isinstance(found, Problem):
            raise DataError(str(found))
        return found

    def look(self, index: int) -> Sample | Problem:
        """Sample `index`, or what is wrong with its line."""
        start, end = self._starts[index : index + 2]
        try:
            if end - start > MAX_LINE_BYTES:
                size = _Words(f"a line of {end - start:,} bytes")
                raise _Wrong("(line)", size, f"at most {MAX_LINE_BYTES:,}")
            with self._opened() as file:
                file.seek(start)
                line = file.read(end - start)
            if index == 0:  # as programs on Windows write it
                line = line.removeprefix(codecs.BOM_UTF8)
            return _sample(_parsed(line), absolute=self._absolute)
        except _Wrong as error:
            return self.problem(index, error.field, str(error))

    def problem(self, index: int, field: str, message: str) -> Problem:
        """What is wrong with a field of line `index`, counted from 0."""
        return Problem(file=self.path, line=index + 1, field=field, message=message)

    def _refuse_disguise(self, begins: bytes) -> None:
        """Raises DataError for a file that is another one, packed, or in another encoding."""
        what = disguise(self.path) if begins else None
        if begins.startswith(GZIP):
            what = "is compressed (gzip); unpack it"
        if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            what = "is UTF-16; store it as UTF-8"
        if what is not None:
            raise DataError(f"{self.path} {what}; {A_CHAT_FILE}")

    def _opened(self) -> BinaryIO:
        try:
            return open_plain(self.path)
        except FileNotFoundError:
            raise DataError(f"{self.path} does not exist; {A_CHAT_FILE}") from None
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error
        except DataError as error:
            raise DataError(f"{self.path} {error}; {A_CHAT_FILE}") from None


def _line_starts(file: BinaryIO) -> np.ndarray:
    """Where each line begins, and where the last ends: int64 [lines + 1]. A block at a time: a
    line may be longer than memory."""
    starts, offset = [np.zeros(1, np.int64)], 0
    while block := file.read(BLOCK):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")).astype(np.int64)
        starts.append(ends + 1 + offset)
        offset += len(block)
    found = np.concatenate(starts)
    return found if found[-1] == offset else np.append(found, offset)


def problems(path: str | Path, *, absolute_paths: bool = False) -> list[Problem]:
    """What is wrong with a chat file: the first problem of each line that has one."""
    file = ChatFile(path, absolute_paths=absolute_paths)
    looks = (file.look(index) for index in range(len(file)))
    return [found for found in looks if isinstance(found, Problem)]


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
    except RecursionError:
        raise _Wrong("(line)", _Words("values nested too deep"), "a JSON object") from None
    except ValueError:  # Python's limit on the digits of a number
        raise _Wrong("(line)", _Words("a number of thousands of digits"), "a JSON object") from None
    if not isinstance(record, dict):
        raise _Wrong("(line)", record, "a JSON object")
    return record


def _sample(record: dict[str, object], *, absolute: bool) -> Sample:
    """One parsed line. Raises an error that names the field."""
    _no_misspelling(record, FIELDS)
    name: Any = record.get("id")
    if isinstance(name, bool | float | list | dict) or (
        isinstance(name, str) and not is_text(name)
    ):
        raise _Wrong("id", name, "a string or a whole number")
    messages = _messages(record.get("conversations"))
    images, video = _images(record, absolute), _video(record, absolute)
    if images and video:
        raise _Wrong("video", video, "no video beside image: a sample has one or the other")
    return Sample(
        id=name,
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
    if not is_text(text):
        raise _Wrong(f"{where}.value", text, WHOLE_LETTERS)
    if role == "gpt" and not text.strip():
        raise _Wrong(
            f"{where}.value", text, "an answer: there is nothing to learn from a blank one"
        )
    return Message(role, text)


def _images(record: dict[str, object], absolute: bool) -> tuple[str, ...]:
    """Paths of the pictures; an empty `image` is the official way to say that there is none."""
    image = record.get("image")
    if image is None or image == "":
        return ()
    if isinstance(image, str):
        return (_path("image", image, absolute),)
    if not isinstance(image, list):
        raise _Wrong("image", image, "a path or a list of paths")
    return tuple(_path(f"image[{i}]", path, absolute) for i, path in enumerate(image))


def _video(record: dict[str, object], absolute: bool) -> str | None:
    video = record.get("video")
    return None if video is None or video == "" else _path("video", video, absolute)


def _path(field: str, path: object, absolute: bool) -> str:
    expected = what_is_wrong(path, absolute=absolute)
    if expected is not None:
        raise _Wrong(field, path, expected)
    assert isinstance(path, str)
    return path


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
        is_number = isinstance(pixels, int) and not isinstance(pixels, bool)
        if not is_number or not 0 < pixels <= MAX_SIDE_PX:
            raise _Wrong(
                f"{name}[{i}]" if listed else name,
                pixels,
                f"a whole number of pixels > 0 and at most {MAX_SIDE_PX:,}",
            )
    return tuple(sizes)
