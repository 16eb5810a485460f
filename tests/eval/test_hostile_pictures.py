"""Pictures from outside that start programs or take gigabytes: refused by the row that has them."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_models import TEXTS
from vlfoundry.eval.context import embed_pictures
from vlfoundry.eval.datasets.folders import read_folder
from vlfoundry.eval.reference import picture_features
from vlfoundry.infra.core.errors import DataError, UserError
from vlfoundry.models.chat.examples import Conversations
from vlfoundry.models.preprocess.geometry import PictureConfig, Sight
from vlfoundry.models.tokenizer import train

CASES = Path(__file__).parents[1] / "cases"
SETS = ("picture_starts_ghostscript/eps_endless", "picture_starts_ghostscript/eps_plain",
        "picture_13000/rgb")  # fmt: skip


class Looks:
    """A model that only looks."""

    kind, capabilities = "internvl_c", frozenset({"embed"})

    def embed_images(self, images, task="retrieval"):
        sight = Sight(chats=False, side_px=21, pictures=PictureConfig())
        return np.stack([sight.squares(image, task).mean((0, 1, 2)) for image in images])


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*command, **_):
        raise AssertionError(f"{command} was started")

    for name in ("Popen", "check_call", "run", "call"):
        monkeypatch.setattr(subprocess, name, refuse)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("task", ["retrieval", "zero_shot"])
def test_a_set_with_such_a_picture_names_the_row(name: str, task: str) -> None:
    data = read_folder(CASES / name)
    ids = "|".join(picture.id for picture in data.pictures)
    wanted = "13000 x 13000 px; decoding it" if "13000" in name else "none of the formats"
    for look in (
        lambda: embed_pictures(Looks(), data, task),
        lambda: picture_features(data),
        lambda: data.look,
        lambda: data.squares(16),
    ):
        with pytest.raises(DataError, match=rf"^a\.parquet, row \d+, ({ids}): .*{wanted}"):
            look()


def test_a_chat_file_with_such_a_picture_names_the_line(tmp_path: Path) -> None:
    shutil.copytree(CASES / "picture_starts_ghostscript/chat_eps_endless", tmp_path / "chat")
    file = next((tmp_path / "chat").glob("*.jsonl"))
    talk = Conversations(
        file, None, train(TEXTS, 300).dialogue,
        tiling=PictureConfig().tiling(28), tile_tokens=4, max_tokens=900,
    )  # fmt: skip
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    eps = next(i for i, line in enumerate(lines) if line.get("image") == "p.png")
    with pytest.raises(UserError, match=rf"x\.jsonl:{eps + 1}: image: p\.png: .*none of the"):
        talk.example(eps, np.random.default_rng(0)).pictures()
