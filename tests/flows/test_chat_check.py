"""chat-check finds what stage 3 would stop at, and stage 3 stops at nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlfoundry.flows.chat_check import PicturesAlone, check, find_limits
from vlfoundry.infra.core.errors import DataError
from vlfoundry.models.chat.examples import Conversations, in_order_of_numbers
from vlfoundry.models.chat.jsonl import MAX_LINE_BYTES, ChatFile, problems
from vlfoundry.models.preprocess.tiling import Tiling

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "cases"
SIDE, TILE_TOKENS, MAX_TOKENS = 12, 5, 171
ANSWER = {"from": "gpt", "value": "A cat."}
ASKED = {"from": "human", "value": "<image>\nWhat is it?"}


def talks(path: Path, root: str | None = None, dialogue=None) -> Conversations:
    return Conversations(
        path,
        root,
        dialogue or PicturesAlone(),
        tiling=Tiling(tile_px=SIDE, max_tiles=7),
        tile_tokens=TILE_TOKENS,
        max_tokens=MAX_TOKENS,
    )


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def picture(path: Path, width: int = 30, height: int = 13) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 77, np.uint8)).save(path)
    return path.name


def command(*arguments: str | Path, cwd: Path | None = None, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "vlfoundry.flows.cli", "chat-check", *map(str, arguments)],
        cwd=cwd or ROOT, capture_output=True, text=True, errors="replace", timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        ("chat-check-pictures/pictures", {2: "image", 3: "image", 4: "image", 5: "width"}),
        (
            "chat-lone-surrogate/surrogate",
            {1: r"conversations[0].value", 2: r"conversations[1].value"},
        ),
        ("chat-special-tokens/special", {}),
    ],
)
def test_cases_of_chat_files(case, lines):
    file = talks(CASES / f"{case}.jsonl")
    found = [file.check(index) for index in range(len(file))]
    assert {p.line: p.field for p in found if p} == lines


HOSTILE = sorted(path.stem for path in (CASES / "chat_hostile_lines").glob("*.jsonl"))
BAD_LINE = {name: 1 if name in ("dev_zero", "width_1e400") else 2 for name in HOSTILE}


@pytest.mark.parametrize("name", HOSTILE)
def test_training_refuses_a_hostile_line_as_well(name):
    path = CASES / "chat_hostile_lines" / f"{name}.jsonl"
    (problem,) = problems(path)
    assert problem.line == BAD_LINE[name]
    with pytest.raises(DataError, match=f"{name}.jsonl:{BAD_LINE[name]}: .*: got .*, expected "):
        talks(path).example(BAD_LINE[name] - 1, np.random.default_rng(0))


def test_hostile_lines_are_named_in_a_terminal_that_has_few_letters(tmp_path):
    files = [shutil.copy(CASES / "chat_hostile_lines" / f"{n}.jsonl", tmp_path) for n in HOSTILE]
    picture(tmp_path / "a.png")  # of the good lines
    ended = command(*files, PYTHONIOENCODING="latin-1")
    assert ended.returncode == 1
    for name, line in BAD_LINE.items():
        assert re.search(rf"{name}.jsonl:{line}: .*: got .*, expected ", ended.stdout), name
        assert re.search(rf"{name}.jsonl: \d samples, 1 wrong", ended.stdout), name
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_line_longer_than_memory_is_not_read(tmp_path):
    path = write(tmp_path / "long.jsonl", {"conversations": [ASKED | {"value": "Hi"}, ANSWER]})
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.truncate(file.tell() + MAX_LINE_BYTES + 1)  # a sparse file of NULs
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + path.read_bytes().splitlines()[0] + b"\n")
    file = ChatFile(path)
    assert len(file) == 3
    (problem,) = problems(path)
    assert (
        str(problem)
        == f"{path}:2: (line): got a line of 16,777,218 bytes, expected at most 16,777,216"
    )
    assert file[2].messages[1].text == "A cat."


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a git-lfs pointer",
        ),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"\x1f\x8b\x08\x00rest", r"is compressed \(gzip\); unpack it"),
        ('{"id": 1}\n'.encode("utf-16"), "is UTF-16; store it as UTF-8"),
        (b"", "is empty"),
    ],
)
def test_a_file_that_is_something_else_is_said_to_be(tmp_path, content, what):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.jsonl {what}.*expected a chat file"):
        ChatFile(tmp_path / "x.jsonl")


def test_what_windows_puts_before_a_text_is_no_part_of_it(tmp_path):
    path = write(tmp_path / "bom.jsonl", {"conversations": [ASKED | {"value": "Hi"}, ANSWER]})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert problems(path) == []


def test_deep_values_and_surrogates_anywhere(tmp_path):
    path = tmp_path / "odd.jsonl"
    good = json.dumps({"conversations": [ASKED | {"value": "Hi"}, ANSWER]})
    lines = [
        good.replace('"human"', r'"hum\udc00an"'),
        good.replace('"value"', r'"val\ud800ue"', 1),
        good[:-1] + r', "id": "\ud83d"}',
        good[:-1] + ', "id": ' + "[" * 200_000 + "]" * 200_000 + "}",
        good[:-1] + ', "video": "\\ud83d"}',
        good[:-1] + ', "image": ["a", "\\ud83d"]}',
        good[:-1] + ', "\\ud83d": 1}',
    ]
    path.write_text("\n".join(lines) + "\n")
    found = {p.line: p.field for p in problems(path)}
    assert found == {
        1: "conversations[0].from", 2: "conversations[0].val\\ud800ue", 3: "id", 4: "(line)",
        5: "video", 6: "image[1]",
    }  # fmt: skip
    for problem in problems(path):
        str(problem).encode("ascii")


def test_a_pipe_and_a_folder_are_no_chat_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is a named pipe, expected a plain file"):
        ChatFile(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a directory"):
        ChatFile(tmp_path)


def test_absolute_paths_where_the_root_says_so(tmp_path):
    picture(tmp_path / "there" / "a.png")
    sample = {"image": f"{tmp_path}/there/a.png", "conversations": [ASKED, ANSWER]}
    path = write(tmp_path / "talk.jsonl", sample)
    problem = talks(path).check(0)
    assert "relative to the data set's root" in str(problem)
    assert "`root: /`" in str(problem)
    file = talks(path, root="/")
    assert file.check(0) is None
    assert file.example(0, np.random.default_rng(0)).pictures().shape[0] == 3
    assert command(path, "--root", "/").returncode == 0


def test_too_long_in_tiles_and_in_words(tmp_path):
    from vlfoundry.models.tokenizer import train

    names = [picture(tmp_path / f"{i}.png", 13 + i, 40) for i in range(3)]
    asked = {"from": "human", "value": "<image><image><image>\n" + "What? " * 30}
    path = write(tmp_path / "talk.jsonl", {"image": names, "conversations": [asked, ANSWER]})
    assert talks(path).check(0) is None
    problem = talks(path, dialogue=train(["What?"], 268).dialogue).check(0)
    assert problem.field == "conversations"
    assert "45 of them of 9 tiles of 3 pictures; expected at most 171" in problem.message

    many = [picture(tmp_path / f"many{i}.png", 5, 5) for i in range(MAX_TOKENS // TILE_TOKENS + 1)]
    asked = {"from": "human", "value": "<image>" * len(many)}
    path = write(tmp_path / "many.jsonl", {"image": many, "conversations": [asked, ANSWER]})
    assert "175 tokens, 175 of them of 35 tiles" in talks(path).check(0).message


def test_megabytes_of_text_are_not_encoded(tmp_path):
    class Refuses(PicturesAlone):
        def conversation(self, messages, visual_tokens):
            raise AssertionError("it was encoded")

    long = {"from": "human", "value": "word " * 100_000}
    path = write(tmp_path / "long.jsonl", {"conversations": [long, ANSWER]})
    problem = talks(path, dialogue=Refuses()).check(0)
    assert str(problem) == (
        f"{path}:1: conversations: 500,006 letters, which are more than 171 tokens "
        "(sft.max_tokens); shorten the conversation"
    )


def test_without_pictures_only_the_line_is_looked_at(tmp_path):
    sample = {"image": "gone.png", "conversations": [ASKED, ANSWER]}
    path = write(tmp_path / "talk.jsonl", sample, sample | {"width": 30, "height": 13})
    file = talks(path)
    assert [bool(file.check(i)) for i in range(2)] == [True, True]
    assert [bool(file.check(i, pictures=False)) for i in range(2)] == [False, False]


def test_every_frame_of_a_video_is_looked_at(tmp_path):
    for number in range(1, 41):
        picture(tmp_path / f"clip/f{number}.png", 9, 7)
    (tmp_path / "clip/f23.png").write_bytes(b"<html>")
    asked = {"from": "human", "value": "<video>\nWhat happens?"}
    path = write(tmp_path / "talk.jsonl", {"video": "clip", "conversations": [asked, ANSWER]})
    problem = talks(path).check(0)
    assert problem.field == "video"
    assert "clip/f23.png" in problem.message


@pytest.mark.parametrize(
    "names",
    [
        [f"clip_{i}.jpg" for i in range(1, 13)],
        [f"clip_{i:02}.jpg" for i in range(1, 13)],
        [f"{i}.png" for i in range(0, 120, 7)],
        [f"shot2-f{i}s.jpg" for i in range(8, 12)],
        ["a.png", "b.png", "c10.png"],
        ["x1_9.png", "x1_10.png", "x2_1.png"],
    ],
)
def test_frames_are_in_the_order_of_their_numbers(names):
    assert sorted(sorted(names, reverse=True), key=in_order_of_numbers) == names


def test_the_case_of_frame_order():
    path = next((CASES / "video-frame-order").glob("*.jsonl"))
    frames = talks(path).example(0, np.random.default_rng(0)).pictures()
    levels = frames.reshape(len(frames), -1).mean(1)
    assert (np.diff(levels) > 10).all()


def test_where_there_is_no_project(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "talk.jsonl", {"image": "a.png", "conversations": [ASKED, ANSWER]})
    ended = command(path, "--no-images", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == f"{path}: 1 samples, 0 wrong"


def test_a_source_whose_root_the_parameters_name(tmp_path):
    picture(tmp_path / "pictures" / "a.png")
    path = write(tmp_path / "mine.jsonl", {"image": "a.png", "conversations": [ASKED, ANSWER]})
    limits = find_limits(ROOT)
    said: list[str] = []
    assert not check([path], limits, say=said.append)
    limits.roots["mine"] = str(tmp_path / "pictures")
    assert check([path], limits, say=said.append)
    assert said[-1] == f"{path}: 1 samples, 0 wrong"
