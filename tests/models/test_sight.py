"""What a model is given of a picture: the same in training and evaluation, as is official."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.data.images.geometry import crop, squeeze
from vlfoundry.models.chat.examples import Conversations
from vlfoundry.models.internvl.config import FLAVOURS, InternVLConfig
from vlfoundry.models.internvl.folder import read_config, write_config
from vlfoundry.models.internvl.hf_pictures import (
    pictures_from_llava,
    pictures_from_official,
    pictures_to_llava,
    pictures_to_official,
)
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import Model
from vlfoundry.models.preprocess.geometry import TASKS, PictureConfig, Sight
from vlfoundry.models.preprocess.tiling import Tiling, picture_size, tile
from vlfoundry.models.tokenizer import train

CASES = Path(__file__).parents[1] / "cases"
SIDE = 28
WAYS = {
    "tiles": PictureConfig(max_tiles=5),
    "tiles without thumbnail": PictureConfig(max_tiles=7, min_tiles=2, thumbnail=False),
    "squeeze": PictureConfig(geometry="squeeze"),
    "pad": PictureConfig(geometry="pad"),
    "crop": PictureConfig(geometry="crop"),
}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    picture = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    if channels == 3:
        return picture
    alpha = rng.integers(0, 2, (height, width, 1), np.uint8) * 255
    return np.concatenate([picture, alpha], -1)


def encoded(array: np.ndarray, kind: str = "PNG", orientation: int = 1) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(array).save(out, kind, exif=exif, quality=95)
    return out.getvalue()


PICTURES = {
    "wide": encoded(noise(40, 111)),
    "turned photo": encoded(noise(40, 111), "JPEG", 6),
    "transparent": encoded(noise(51, 37, 4)),
    "16 bits": (CASES / "chat-16bit/pics/ramp16.png").read_bytes(),
    "phone": (CASES / "chat-exif/pics/phone6.jpg").read_bytes(),
    "small": encoded(noise(9, 5)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 300)


@pytest.fixture
def asked(tokenizer, monkeypatch):
    """A chat model of a way of seeing; with what its tower was given, and its prompts, in turn."""

    def make(pictures: PictureConfig, kind: str = "chat_simple"):
        config = tiny_config(pictures=pictures)
        vision = dict(vars(config.vision)) | {"image_px": SIDE, "patch_px": 7}
        config = InternVLConfig(
            **{**vars(config), "vision": type(config.vision)(**vision)}
            | {"text": type(config.text)(**vars(config.text) | {"vocab_size": 300})}
        )
        model = Model(build(kind, config, seed=1), config, tokenizer)
        seen: list[tuple[np.ndarray, list]] = []

        def generate(ids, mask, pixels, **_):
            seen.append((pixels.numpy(), ids.tolist()))
            import torch

            return torch.zeros(len(ids), 1, dtype=torch.long)

        monkeypatch.setattr(model.module, "generate", generate)
        return model, seen

    return make


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("pictures", WAYS.values(), ids=WAYS)
def test_a_chat_model_is_asked_on_what_it_is_trained_on(
    pictures: PictureConfig, data: bytes, asked, tokenizer, tmp_path: Path
) -> None:
    from vlfoundry.models.preprocess.normalize import normalize_uint8

    (tmp_path / "it.png").write_bytes(data)
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"image": "it.png", "conversations": talk}))
    model, seen = asked(pictures)
    tokens = model.config.visual_tokens(model.kind)
    file = Conversations(
        tmp_path / "talk.jsonl", None, tokenizer.dialogue,
        tiling=pictures.tiling(SIDE), tile_tokens=tokens, max_tokens=900,
    )  # fmt: skip
    example = file.example(0, np.random.default_rng(0))
    model.generate([data], ["What?"], 3)
    ((given, (prompt,)),) = seen
    assert np.array_equal(given, normalize_uint8(example.pictures()).numpy())
    context = tokenizer.context_id
    assert prompt.count(context) == example.ids.count(context) == example.tiles * tokens
    assert example.ids[: len(prompt)] == prompt


def test_pictures_of_many_tiles_go_through_a_few_at_a_time(asked) -> None:
    model, seen = asked(PictureConfig(max_tiles=5))
    pictures = [noise(40, 41 + 17 * i) for i in range(60)]
    model.generate(pictures, [f"{i}?" for i in range(60)], 1)
    assert len(seen) > 2
    assert all(len(given) <= 64 for given, _ in seen)
    counts = [len(tile(p, Tiling(tile_px=SIDE, max_tiles=5))) for p in pictures]
    assert sum(len(given) for given, _ in seen) == sum(counts)
    assert sum(len(ids) for _, ids in seen) == 60


@pytest.mark.parametrize("size", [(100, 41), (41, 100), (37, 37), (500, 3), (29, 28)])
def test_a_crop_is_the_middle_of_the_resized_picture(size: tuple[int, int]) -> None:
    picture = noise(*size)
    height, width = size
    short = min(size)
    resized = (int(SIDE * width / short), int(SIDE * height / short))
    left, top = round((resized[0] - SIDE) / 2), round((resized[1] - SIDE) / 2)
    whole = Image.fromarray(picture).resize(resized, Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + SIDE, top + SIDE))).astype(int)
    assert np.abs(crop(picture, SIDE).astype(int) - expected).max() <= 2


def test_a_strip_is_cropped_without_being_made_whole() -> None:
    assert crop(np.zeros((1, 60_000, 3), np.uint8), 224).shape == (224, 224, 3)


@pytest.mark.parametrize("task", TASKS)
def test_what_cannot_be_seen_does_not_bleed(task: str) -> None:
    """Red, and green that is clear: whatever is done, no green on the white page."""
    picture = np.zeros((90, 62, 4), np.uint8)
    picture[..., 0], picture[..., 3] = 255, 255
    picture[30:60, 20:40] = (0, 255, 0, 0)
    sight = Sight(chats=False, side_px=SIDE, pictures=PictureConfig())
    (square,) = sight.squares(picture, task).astype(int)
    assert (square[..., 1] - square[..., 2]).max() <= 2  # white and red have as much blue
    assert square[..., 0].min() >= 250


def test_each_task_has_the_official_geometry() -> None:
    sight = Sight(chats=False, side_px=SIDE, pictures=PictureConfig())
    picture = noise(60, 150)
    for task in ("zero_shot", "linear_probe"):
        assert np.array_equal(sight.squares(picture, task)[0], crop(picture, SIDE))
    for task in ("retrieval", "caption", "train"):
        assert np.array_equal(sight.squares(picture, task)[0], squeeze(picture, SIDE))
    with pytest.raises(ConfigError, match="task 'chat' is none of a model that does not chat"):
        sight.squares(picture, "chat")


def test_compat_alone_ignores_what_turns_a_picture() -> None:
    data = PICTURES["phone"]
    raw = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    config = Tiling(tile_px=SIDE, max_tiles=2, compat=True)
    assert np.array_equal(tile(data, config), tile(raw, config))
    assert picture_size(data, compat=True) == (80, 40)
    assert picture_size(data) == (40, 80)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    plain = Tiling(tile_px=SIDE, max_tiles=2)
    assert np.array_equal(tile(data, plain), tile(upright, plain))


@pytest.mark.parametrize("pictures", WAYS.values(), ids=WAYS)
def test_official_folders_say_it_in_their_words(pictures: PictureConfig) -> None:
    assert pictures_from_llava(pictures_to_llava(pictures)) == pictures
    if pictures.geometry != "crop":
        found = pictures_from_official(pictures_to_official(pictures))
        assert found.tiling(SIDE) == pictures.tiling(SIDE)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, PictureConfig(geometry="squeeze")),
        ({"pad2square": True, "max_dynamic_patch": 9}, PictureConfig(geometry="pad")),
        (
            {"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 12,
             "pad2square": True},
            PictureConfig(max_tiles=12),
        ),
        ({"dynamic_image_size": True}, PictureConfig(max_tiles=6, thumbnail=False)),
    ],
)  # fmt: skip
def test_what_official_folders_leave_out_is_as_in_the_official_class(config, expected) -> None:
    assert pictures_from_official(config) == expected


def test_llava_pads_only_where_it_says_so() -> None:
    assert pictures_from_llava({"image_aspect_ratio": "pad"}).geometry == "pad"
    assert pictures_from_llava({}).geometry == "crop"


def test_a_chat_models_folder_keeps_how_it_sees(tmp_path: Path) -> None:
    config = tiny_config(pictures=PictureConfig(max_tiles=9, thumbnail=False))
    for kind in ("chat_simple", "internvl_c"):
        write_config(tmp_path / kind, kind, config)
    assert read_config(tmp_path / "chat_simple")[1].pictures == config.pictures
    assert "pictures" not in (tmp_path / "internvl_c/config.json").read_text()


def test_the_flavours_see_as_they_were_published() -> None:
    ways = {name: make().pictures for name, make in FLAVOURS.items()}
    assert ways["paper"].geometry == "pad"
    assert ways["chat-v1.1"].geometry == ways["chat-v1.2"].geometry == "squeeze"
    assert {ways[n].max_tiles for n in ("chat-v1.5-26b", "internvl2-8b", "internvl2-1b")} == {12}
