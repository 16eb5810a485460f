"""Conversations of chat files: ids, labels and tiles, and several sources as one stream."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlfoundry.infra.core.errors import DataError
from vlfoundry.models.chat.examples import Conversations, Example, packed, padded
from vlfoundry.models.chat.stream import ConversationStream
from vlfoundry.models.internvl.prompts import IGNORE
from vlfoundry.models.preprocess.tiling import Tiling, plan
from vlfoundry.models.tokenizer import EOS_ID, IMG_CONTEXT_ID, PAD_ID, Tokenizer, train

SIDE, TILE_TOKENS = 8, 3
TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]
PLAIN = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["What is it? A cat. Sure? Yes. Hello Good day."], 300)


@pytest.fixture
def folder(tmp_path):
    """Pictures of three sizes, and a video of five frames."""
    for name, size in {"wide.png": (32, 8), "tall.jpg": (8, 24), "small.png": (5, 5)}.items():
        Image.fromarray(np.full((*size[::-1], 3), 90, np.uint8)).save(tmp_path / name)
    (tmp_path / "film").mkdir()
    for number in range(5):
        level = np.full((8, 8, 3), 40 * number, np.uint8)
        Image.fromarray(level).save(tmp_path / f"film/{number}.png")
    return tmp_path


def conversations(folder, tokenizer, *samples, **options) -> Conversations:
    path = folder / "talk.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    options = {"max_tokens": 512, "root": None} | options
    root = options.pop("root")
    tiling = Tiling(tile_px=SIDE, max_tiles=6)
    return Conversations(
        path, root, tokenizer.dialogue, tiling=tiling, tile_tokens=TILE_TOKENS, **options
    )


def draw(number: int = 0) -> np.random.Generator:
    return np.random.default_rng(number)


def places(example: Example) -> int:
    return example.ids.count(IMG_CONTEXT_ID)


def test_one_question_is_written_as_everywhere(folder, tokenizer):
    data = conversations(folder, tokenizer, {"image": "small.png", "conversations": TALK[:2]})
    example = data.example(0, draw())
    prompt, answer = tokenizer.dialogue.exchange("What is it?", "A cat.", TILE_TOKENS)
    assert example.ids == prompt + answer
    assert example.labels == [IGNORE] * len(prompt) + answer
    assert example.pictures().shape == (1, SIDE, SIDE, 3)


def test_every_answer_is_learnt_and_nothing_else(folder, tokenizer):
    data = conversations(folder, tokenizer, {"image": "wide.png", "conversations": TALK})
    example = data.example(0, draw())
    learnt = [i for i, label in zip(example.ids, example.labels, strict=True) if label != IGNORE]
    answers = [*tokenizer.encode(" A cat."), EOS_ID, *tokenizer.encode(" Yes."), EOS_ID]
    assert learnt == answers
    assert example.tiles == plan(32, 8, Tiling(tile_px=SIDE, max_tiles=6)).tiles == 5
    assert places(example) == 5 * TILE_TOKENS


def test_tiles_and_places_agree_for_every_kind_of_sample(folder, tokenizer):
    several = [{"from": "human", "value": "<image> and <image>?"}, TALK[1]]
    video = [{"from": "human", "value": "<video>\nWhat happens?"}, TALK[1]]
    data = conversations(
        folder,
        tokenizer,
        {"image": ["wide.png", "tall.jpg"], "conversations": several},
        {"image": "tall.jpg", "width": 8, "height": 24, "conversations": TALK},
        {"video": "film", "conversations": video},
        {"conversations": PLAIN},
    )
    examples = [data.example(i, draw()) for i in range(len(data))]
    assert [example.tiles for example in examples[1:]] == [4, 5, 0]
    assert examples[0].tiles <= 2 * 4  # three tiles and a thumbnail each
    for example in examples:
        assert example.pictures().shape == (example.tiles, SIDE, SIDE, 3)
        assert places(example) == example.tiles * TILE_TOKENS
    frames = examples[2].pictures().mean((1, 2, 3))
    assert (np.diff(frames) > 0).all()


def test_padded_and_packed_hold_the_same(folder, tokenizer):
    data = conversations(
        folder, tokenizer, {"image": "wide.png", "conversations": TALK}, {"conversations": PLAIN}
    )
    examples = [data.example(i, draw()) for i in range(2)]
    rows, row = padded(examples, PAD_ID), packed(examples)
    assert row["tiles"].tolist() == [5, 0]
    assert np.array_equal(rows["pictures"], row["pictures"])
    for name in ("ids", "labels"):
        ends = row["cu_seqlens"]
        for i, example in enumerate(examples):
            assert row[name][0, ends[i] : ends[i + 1]].tolist() == getattr(example, name)
            assert rows[name][i, : len(example.ids)].tolist() == getattr(example, name)
    assert (rows["labels"][1, len(examples[1].ids) :] == IGNORE).all()


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        ({"image": "none.png", "conversations": TALK}, {}, r"talk.jsonl:2: image: none.png"),
        ({"image": "broken.png", "conversations": TALK}, {}, r"talk.jsonl:2: image: broken.png"),
        (
            {"image": "wide.png", "width": 8, "height": 8, "conversations": TALK},
            {},
            r"talk.jsonl:2: image: wide.png: its width and height say 1 tiles, but it has 5",
        ),
        (
            {"video": "nothing", "conversations": PLAIN},
            {},
            r"talk.jsonl:2: video: nothing below .* is not a folder of frames",
        ),
        (
            {"image": "wide.png", "conversations": TALK},
            {"max_tokens": 20},
            r"talk.jsonl:2: conversations: \d+ tokens, 15 of them of 5 tiles of 1 pictures; "
            r"expected at most 20",
        ),
        ({"image": "wide.png"}, {}, r"talk.jsonl:2: conversations: got null"),
    ],
    ids=["missing", "broken", "size", "video", "long", "format"],
)
def test_what_is_wrong_names_file_and_line(folder, tokenizer, sample, options, message):
    (folder / "broken.png").write_bytes(b"no picture")
    good = {"conversations": PLAIN[:1] + TALK[1:2]}
    data = conversations(folder, tokenizer, good, sample, **options)
    with pytest.raises(DataError, match=message):
        data.example(1, draw()).pictures()


def test_pictures_may_lie_elsewhere(folder, tokenizer):
    """Anything that fsspec opens; here a file system in memory."""
    import fsspec

    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(buffer, "png")
    with fsspec.open("memory://pictures/a/b.png", "wb") as stream:
        stream.write(buffer.getvalue())
    sample = {"image": "a/b.png", "conversations": TALK}
    data = conversations(folder, tokenizer, sample, root="memory://pictures")
    assert (data.example(0, draw()).pictures() == 7).all()


def test_sources_come_in_proportion_and_every_conversation_once_an_epoch(folder, tokenizer):
    texts = [{"conversations": [PLAIN[0], {"from": "gpt", "value": f"{i}"}]} for i in range(10)]
    file = conversations(folder, tokenizer, *texts)
    asked: list[int] = []

    def scene(number: int) -> Example:
        asked.append(number)
        return file.example(0, draw())

    stream = ConversationStream(
        {"scenes": scene, "talk": file}, {"scenes": 3.0, "talk": 1.0}, seed=4
    )
    examples = stream.take(0, 400)
    assert 0.7 < len(asked) / 400 < 0.8
    of_file = [e.ids for i, e in enumerate(examples) if i not in set(asked)]
    first_epoch = of_file[:10]
    assert sorted(first_epoch) == sorted(file.example(i, draw()).ids for i in range(10))
    assert [e.ids for e in stream.take(100, 50)] == [e.ids for e in examples[100:150]]
