"""`vlfoundry pixels`: what a model is given of a picture, as it trains and as it is evaluated."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.tiny_models import tiny_config
from vlfoundry.flows.cli import app
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.data.images.decode import decode
from vlfoundry.models.internvl.folder import write_config
from vlfoundry.models.preprocess.geometry import PictureConfig

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests/cases"
PICTURES = {
    "phone": CASES / "chat-exif/pics/phone6.jpg",
    "upright": CASES / "chat-exif/pics/upright.png",
    "16 bits": CASES / "chat-16bit/pics/ramp16.png",
    "8 bits": CASES / "chat-16bit/pics/ramp8.png",
}


@pytest.fixture
def pixels(tmp_path: Path):
    """`pixels(image, *options)` -> what it prints, and the squares that it writes."""
    numbers = iter(range(100))

    def run(image: Path, *options: str) -> tuple[str, np.ndarray]:
        out = tmp_path / f"out-{next(numbers)}"
        done = CliRunner().invoke(app, ["pixels", str(image), "--out", str(out), *options])
        if done.exception:
            raise done.exception
        files = sorted(out.glob("*.png"))
        assert [f.name for f in files] == [f"{i:02d}.png" for i in range(len(files))]
        return done.output, np.stack([np.asarray(Image.open(f)) for f in files])

    return run


@pytest.fixture
def chat(tmp_path: Path) -> str:
    write_config(tmp_path / "chat", "chat_simple", tiny_config(pictures=PictureConfig(max_tiles=3)))
    return str(tmp_path / "chat")


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("with_model", [False, True])
def test_chat_is_trained_and_asked_on_the_same(name: str, with_model: bool, pixels, chat) -> None:
    options = ("--model", chat) if with_model else ()
    _, trained = pixels(PICTURES[name], "--for", "train", *options)
    _, asked = pixels(PICTURES[name], "--for", "evaluate", "--task", "chat", *options)
    assert np.array_equal(trained, asked)


@pytest.mark.parametrize("options", [("--for", "train"), ("--task", "zero_shot"), ()])
def test_a_turned_photo_and_one_of_16_bits_look_like_their_plain_twins(options, pixels) -> None:
    said, turned = pixels(PICTURES["phone"], *options)
    assert "phone6.jpg: 40 x 80 px, upright" in said
    upright = pixels(PICTURES["upright"], *options)[1]
    assert np.median(np.abs(turned.astype(int) - upright), axis=(1, 2)).max() <= 3
    deep, flat = (pixels(PICTURES[n], *options)[1].astype(int) for n in ("16 bits", "8 bits"))
    assert np.abs(deep - flat).max() <= 2


def test_it_says_the_geometry_and_counts(pixels, chat, tmp_path: Path) -> None:
    picture = tmp_path / "wide.png"
    Image.fromarray(np.full((20, 61, 3), 7, np.uint8)).save(picture)
    said, squares = pixels(picture, "--model", chat)
    assert squares.shape == (4, 16, 16, 3)
    for part in ("wide.png: 61 x 20 px", "tiles: ", "4 squares of 16 x 16 px"):
        assert part in said
    write_config(tmp_path / "c", "internvl_c", tiny_config())
    said, squares = pixels(picture, "--model", str(tmp_path / "c"), "--task", "zero_shot")
    assert "crop: " in said
    assert squares.shape == (1, 16, 16, 3)
    assert "squeeze: " in pixels(picture, "--model", str(tmp_path / "c"))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--for", "use"), "--for is 'use', expected one of train, evaluate"),
        (("--task", "train"), "--task is 'train', expected one of zero_shot"),
    ],
)
def test_what_there_is_not_is_named(options, message: str, pixels) -> None:
    with pytest.raises(UserError, match=message):
        pixels(PICTURES["phone"], *options)


def test_what_is_no_picture_is_named(pixels, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(UserError, match=r"a\.png: \d+ bytes .*none of the formats"):
        pixels(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png is not a file"):
        pixels(tmp_path / "b.png")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(PICTURES["upright"], tmp_path / "out/00.png")
    command = ["pixels", str(PICTURES["phone"]), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    kept = (tmp_path / "out/00.png").read_bytes()
    assert np.array_equal(decode(kept), decode(PICTURES["upright"].read_bytes()))
    assert io.BytesIO(kept).read() == PICTURES["upright"].read_bytes()
