"""Evaluation over ranks and devices: whatever there is of both, the numbers are the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.fake_models import drawing, encoded, write_concept_set, write_pair_set
from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.eval.context import EvalContext, embed_pictures, embed_texts
from vlfoundry.eval.datasets.folders import read_folder
from vlfoundry.eval.questions import replies
from vlfoundry.eval.ranks import run_team
from vlfoundry.eval.runner import evaluate_folder
from vlfoundry.infra.core.errors import DataError, ModelError
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import Model, load_model, save_model
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.slow

PICTURES = 67
"""more than a batch, and no multiple of any number of ranks"""


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 300)


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> Path:
    """Folders of tiny models: internvl_c, internvl_g, chat_simple."""
    root = tmp_path_factory.mktemp("models")
    text = type(tiny_config().text)(**vars(tiny_config().text) | {"vocab_size": 300})
    config: InternVLConfig = tiny_config(text=text)
    for kind in ("internvl_c", "internvl_g", "chat_simple"):
        save_model(root / kind, kind, config, build(kind, config, seed=2), tokenizer)
    return root


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets the launcher profile."""

    def be(text: str) -> None:
        (tmp_path / "place.yaml").write_text(text)
        monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(tmp_path / "place.yaml"))

    return be


def pair_set(folder: Path, pictures: int = PICTURES) -> Path:
    rows = [
        {
            "id": f"p{i}",
            "image": {"bytes": encoded(drawing(i % 50).resize((40 + i, 30))), "path": None},
            "captions": [{"lang": "en", "text": f"{TEXTS[i % 5]} {i}"}],
            "label": f"label {i % 4}",
        }
        for i in range(pictures)
    ]
    return write_pair_set(folder, rows)


@pytest.mark.parametrize(
    ("kind", "suite"),
    [("internvl_c", "retrieval"), ("chat_simple", "caption")],
)
def test_every_number_of_ranks_gives_the_same_bytes(
    kind: str, suite: str, models: Path, place, tmp_path: Path, run_ranks, monkeypatch
) -> None:
    monkeypatch.setattr("vlfoundry.eval.context.IMAGE_BATCH", 16)
    monkeypatch.setattr("vlfoundry.eval.context.TEXT_BATCH", 7)
    monkeypatch.setattr("vlfoundry.eval.questions.BATCH", 5)
    data = pair_set(tmp_path / "data")
    made = []
    for profile in ("ranks: 1", "ranks: 3\ntensor: 3", "ranks: 4\npipeline: 2"):
        place(profile)
        out = tmp_path / f"{len(made)}" / "scores.json"
        out.parent.mkdir()
        evaluate_folder(models / kind, data, suite, out, scenes=23, log=lambda _: None)
        items = {f.name: f.read_bytes() for f in sorted((out.parent / "scores.items").iterdir())}
        made.append((json.loads(out.read_text())["scores"], items))
    assert made[0][1]
    assert all(found == made[0] for found in made[1:])


def test_the_ranks_share_the_batches(models: Path, place, tmp_path: Path, run_ranks) -> None:
    """Each file is shown once, on one rank; every rank has some."""
    data = read_folder(pair_set(tmp_path / "data"))
    place("ranks: 3")

    def work(team):
        model = team.load(models / "internvl_c")
        counted = model.in_batches("count", [(i,) for i in range(25)])
        return counted, embed_pictures(model, data, "retrieval")

    def count(self, number):
        from vlfoundry.infra.backend.world import this_rank

        return number, this_rank().index

    Model.count = count
    try:
        counted, vectors = run_team(work)
    finally:
        del Model.count
    assert counted == [(i, i % 12 % 3) for i in range(25)]
    alone = load_model(models / "internvl_c")
    assert np.allclose(vectors, embed_pictures(alone, data, "retrieval"), atol=1e-6)


def test_what_a_rank_cannot_do_is_told_as_by_one(
    models: Path, place, tmp_path: Path, run_ranks
) -> None:
    data = pair_set(tmp_path / "data", 40)
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "pairs.parquet").to_pylist()
    rows[33]["image"]["bytes"] = b"%!PS-Adobe-3.0 EPSF-3.0\n"
    pq.write_table(pa.Table.from_pylist(rows), data / "pairs.parquet")
    for profile in ("ranks: 1", "ranks: 2"):
        place(profile)
        with pytest.raises(
            DataError, match=r"^pairs\.parquet, row 33, p33: \d+ bytes .*none of the formats"
        ):
            evaluate_folder(models / "internvl_c", data, "retrieval", tmp_path / "o.json")
        with pytest.raises(ModelError, match="needs a model that can embed"):
            evaluate_folder(models / "chat_simple", data, "retrieval", tmp_path / "o.json")


def test_one_picture_in_every_row_is_shown_once(models: Path, tmp_path: Path, monkeypatch) -> None:
    data = encoded(drawing(3).resize((300, 200)))
    rows = [
        {"id": f"p{i}", "image": {"bytes": data, "path": None},
         "captions": [{"lang": "en", "text": f"caption {i}"}]}
        for i in range(3000)
    ]  # fmt: skip
    found = read_folder(write_pair_set(tmp_path / "data", rows))
    assert len({id(picture.data) for picture in found.pictures}) == 1
    model, shown = load_model(models / "internvl_c"), []
    squares = model.sight.squares
    monkeypatch.setattr(type(model.sight), "squares", lambda self, picture, task: (
        shown.append(task), squares(picture, task))[1])  # fmt: skip
    vectors = embed_pictures(model, found, "retrieval")
    assert len(shown) == 1
    assert vectors.shape == (3000, 8)
    assert (found.look == 0).all()


# --- devices -----------------------------------------------------------------------------------


@pytest.fixture
def in_bf16(models: Path):
    """`in_bf16(kind)`: a model in the precision of a GPU."""

    def load(kind: str) -> Model:
        model = load_model(models / kind)
        model.module.to(torch.bfloat16)
        return model

    return load


def test_bf16_gives_float32_numbers(in_bf16, models: Path) -> None:
    pictures = [np.asarray(drawing(i)) for i in range(3)]
    for kind in ("internvl_c", "internvl_g"):
        model, exact = in_bf16(kind), load_model(models / kind)
        for found, expected in (
            (model.embed_texts(TEXTS), exact.embed_texts(TEXTS)),
            (model.embed_images(pictures), exact.embed_images(pictures)),
        ):
            assert found.dtype == np.float32
            assert np.isfinite(found).all()
            assert (found * expected).sum(1).min() > 0.98
        assert model.image_features(pictures).dtype == np.float32
    assert len(in_bf16("chat_simple").generate(pictures, ["a", "b", "c"], 2)) == 3


class Elsewhere(torch.Tensor):
    """A tensor as on a GPU: NumPy cannot have it before it is brought here."""

    def numpy(self, *_args, **_kwargs):
        raise TypeError("can't convert a tensor of another device; use Tensor.cpu() first")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def there(value):
    return value.as_subclass(Elsewhere) if isinstance(value, torch.Tensor) else value


def test_what_a_gpu_gives_is_brought_back(models: Path, monkeypatch) -> None:
    pictures = [np.asarray(drawing(i)) for i in range(3)]
    for kind, methods in (
        ("internvl_g", ("embed_images", "embed_texts", "vision", "generate")),
        ("chat_simple", ("generate",)),
    ):
        model = load_model(models / kind)
        for name in methods:
            own = model.module.vision.forward if name == "vision" else getattr(model.module, name)
            where, attribute = (
                (model.module.vision, "forward") if name == "vision" else (model.module, name)
            )
            monkeypatch.setattr(where, attribute, lambda *a, _own=own, **k: there(_own(*a, **k)))
        if "embed_texts" in methods:
            assert model.embed_texts(TEXTS).shape == (5, 8)
            assert model.embed_images(pictures).shape == (3, 8)
            assert model.image_features(pictures).shape == (3, 20)
        assert len(model.generate(pictures, ["a", "b", "c"], 2)) == 3
        if "match" in model.capabilities:
            run = model.module.run
            monkeypatch.setattr(
                model.module, "run", lambda *a, _run=run: {n: there(v) for n, v in _run(*a).items()}
            )
            assert model.match(pictures, ["a", "b", "c"]).shape == (3,)


def test_a_model_and_what_it_reads_go_where_training_computes(models: Path, monkeypatch) -> None:
    """A device called elsewhere, which computes here: all that a model is given went there."""
    moved: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "vlfoundry.models.internvl.predict.to_device",
        lambda value: moved.append(("model", "")) or value,
    )
    model = load_model(models / "internvl_g")
    assert moved == [("model", "")]
    to = torch.Tensor.to

    def watched(self, *args, **kwargs):
        if args and args[0] == model.device:
            moved.append(("tensor", str(self.dtype)))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    model.embed_texts(TEXTS)
    model.embed_images([np.asarray(drawing(1))])
    assert {kind for _, kind in moved[1:]} == {"torch.int64", "torch.float32"}


def test_a_set_of_drawings_is_scored_over_ranks(models: Path, place, tmp_path, run_ranks) -> None:
    folder = write_concept_set(tmp_path / "data", 7, ("test", "train"))
    place("ranks: 2")
    scores = evaluate_folder(
        models / "chat_simple", folder, "colour", tmp_path / "o.json",
        sources=["test"], train_sources=["train"], scenes=6, log=lambda _: None,
    )  # fmt: skip
    assert scores[0].n == 6
    data = read_folder(folder)
    setting = EvalContext(languages=("en",), seed=0, items_dir=tmp_path)
    assert setting.nearest is None
    assert len(replies(load_model(models / "chat_simple"), [np.asarray(drawing(1))], ["a"], 2)) == 1
    assert embed_texts(load_model(models / "internvl_c"), ["a", "b", "a"]).shape == (3, 8)
    assert len(data) == 14
