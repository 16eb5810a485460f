"""The chat jsonl format: what is read, and what is said of a line that is not in it."""

import json
import re

import pytest

from vlfoundry.infra.core.errors import DataError
from vlfoundry.models.chat.jsonl import problems, read

ANSWER = {"from": "gpt", "value": "A cat."}


def asks(text: str) -> dict:
    return {"from": "human", "value": text}


def said(*turns: dict, **fields) -> dict:
    return {"conversations": [*turns], **fields}


def write(path, *records) -> None:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")


GOOD = said(asks("Who?"), ANSWER)
WRONG = {
    "not json": (b"{bad", r"\(line\): got Expecting property name .* expected a JSON object"),
    "not utf-8": (b"\xff", r"\(line\): got bytes .* expected UTF-8"),
    "blank": (b" ", r"\(line\): got a blank line, expected a JSON object"),
    "a list": ([1], r"\(line\): got \[1\], expected a JSON object"),
    "id": (GOOD | {"id": 1.5}, r"id: got 1.5, expected a string or a whole number"),
    "no turns": ({"id": 1}, r"conversations: got null, expected a list of turns"),
    "misspelt": (GOOD | {"images": "a.png"}, r"images: got an unknown field, expected `image`"),
    "misspelt in a turn": (
        said(asks("Who?"), {"from": "gpt", "valu": "x"}),
        r"conversations\[1\]\.valu: got an unknown field, expected `value`",
    ),
    "a turn": (said(asks("Who?"), "me"), r'conversations\[1\]: got "me", expected an object'),
    "role": (
        said(asks("Who?"), {"from": "assistant", "value": "x"}),
        r'conversations\[1\]\.from: got "assistant", expected system or human or gpt',
    ),
    "order": (
        said(asks("Who?"), asks("Who?"), ANSWER),
        r'conversations\[1\]\.from: got "human", expected gpt',
    ),
    "late system": (
        said(asks("Who?"), ANSWER, {"from": "system", "value": "x"}),
        r'conversations\[2\]\.from: got "system", expected human',
    ),
    "no answer": (
        said(asks("Who?"), ANSWER, asks("Who?")),
        r'conversations\[2\]\.from: got "human", expected gpt: a conversation ends in an answer',
    ),
    "value": (
        said(asks("Who?"), {"from": "gpt", "value": 3}),
        r"conversations\[1\]\.value: got 3, expected a string",
    ),
    "blank answer": (
        said(asks("Who?"), {"from": "gpt", "value": " "}),
        r'conversations\[1\]\.value: got " ", expected an answer',
    ),
    "image": (said(asks("Who?"), ANSWER, image=7), r"image: got 7, expected a path or a list"),
    "an image": (said(asks("?"), ANSWER, image=["a", ""]), r'image\[1\]: got "", expected a path'),
    "video": (said(asks("Who?"), ANSWER, video=["v"]), r'video: got \["v"\], expected a path'),
    "image and video": (
        said(asks("Who?"), ANSWER, image="a", video="v"),
        r'video: got "v", expected no video beside image',
    ),
    "placeholder without image": (
        said(asks("<image>\nWho?"), ANSWER),
        r"conversations\[0\]\.value: got .* expected no <image>: the sample has no `image`",
    ),
    "placeholder in an answer": (
        said(asks("Who?"), {"from": "gpt", "value": "<image>"}, image="a"),
        r"conversations\[1\]\.value: got .* expected 1 <image> in the human turns",
    ),
    "too few placeholders": (
        said(asks("<image>\nWho?"), ANSWER, image=["a", "b"]),
        r"conversations: got 1 <image>, expected 2 <image> in the human turns",
    ),
    "too many placeholders": (
        said(asks("<image>\nWho?"), ANSWER, asks("<image>"), ANSWER, image="a"),
        r"conversations\[2\]\.value: got .* expected 1 <image> in the human turns",
    ),
    "no question": (
        said(ANSWER, image="a"),
        r"conversations: got no question, expected one that shows the picture",
    ),
    "width alone": (
        said(asks("Who?"), ANSWER, image="a", width=3),
        r"height: got null, expected both width and height, or neither",
    ),
    "height alone": (
        said(asks("Who?"), ANSWER, image="a", height=3),
        r"width: got null, expected both width and height, or neither",
    ),
    "size": (
        said(asks("Who?"), ANSWER, image="a", width=0, height=2),
        r"width: got 0, expected a whole number of pixels > 0",
    ),
    "size of one": (
        said(asks("Who?"), ANSWER, image=["a"], width=[4], height=[True]),
        r"height\[0\]: got true, expected a whole number of pixels > 0",
    ),
    "sizes": (
        said(asks("<image><image>"), ANSWER, image=["a", "b"], width=3, height=4),
        r"width: got 3, expected a list of 2 numbers, one an image",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_names_file_line_and_field(tmp_path, case):
    path = tmp_path / "chat.jsonl"
    record, message = WRONG[case]
    write(path, GOOD, record, GOOD)

    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:2: {message}"):
        list(read(path))
    (problem,) = problems(path)
    assert (problem.file, problem.line) == (path, 2)
    assert str(problem).startswith(f"{path}:2: {problem.field}: got ")


def test_every_bad_line_is_reported(tmp_path):
    path = tmp_path / "chat.jsonl"
    write(path, *(record for record, _ in WRONG.values()))

    assert [problem.line for problem in problems(path)] == list(range(1, len(WRONG) + 1))


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist; expected a chat file"):
        list(read(tmp_path / "none.jsonl"))


def test_the_four_kinds_of_sample(tmp_path):
    path = tmp_path / "chat.jsonl"
    two = said(asks("Image-1: <image>\nImage-2: <image>\nWhich?"), ANSWER)
    write(
        path,
        GOOD | {"id": "a", "task": "other fields are left alone"},
        said(asks("Who?"), ANSWER, image="a.png", width=640, height=480),
        two | {"image": ["a.png", "b.png"], "width": [640, 32], "height": [480, 16]},
        said({"from": "system", "value": "Look."}, asks("<video>\nWho?"), ANSWER, video="v.mp4"),
        said(asks("Who?"), ANSWER, image=""),
    )

    text, one, several, video, empty = read(path)

    assert (text.id, text.images, text.video) == ("a", (), None)
    assert one.messages[0].text == "<image>\nWho?"
    assert one.sizes_px == ((640, 480),)
    assert several.images == ("a.png", "b.png")
    assert several.sizes_px == ((640, 480), (32, 16))
    assert video.video == "v.mp4"
    assert video.with_frames(2)[1].text == "Frame-1: <image>\nFrame-2: <image>\nWho?"
    assert video.with_frames(2)[0] == ("system", "Look.")
    assert empty.images == ()
    assert empty.messages == text.messages


def test_a_placeholder_is_put_before_the_first_question(tmp_path):
    path = tmp_path / "chat.jsonl"
    write(path, said({"from": "system", "value": "Look."}, asks("Who?"), ANSWER, video="v.mp4"))

    (sample,) = read(path)

    assert sample.messages[1].text == "<video>\nWho?"
