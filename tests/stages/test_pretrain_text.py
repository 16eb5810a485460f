"""What text pre-training reads: captions, and conversations about scenes that nobody sees."""

import re

import pytest

from tests.support.tiny_project import PARAMS
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.data.shards.read import ShardSet
from vlfoundry.infra.data.shards.write import Sample, write_shards
from vlfoundry.infra.data.synthetic.scenes import conversation, imagine, parse_box
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.session import DataParallelSlice
from vlfoundry.stages.pretrain_text import Config, PretrainTextConfig, imagined, job, spoken_names

TRAIN = TrainConfig(steps=1, batch_samples=8, lr=1e-3)
NAMES = [("en", "sun"), ("zh", "太阳"), ("it", "sole")]


def conversations(count: int = 200, seed: int = 5, **options) -> list[tuple[str, str] | None]:
    config = PretrainTextConfig(train=TRAIN, **options)
    return [imagined(config, NAMES, i, size_px=64, box_grid=16, seed=seed) for i in range(count)]


def test_the_share_of_conversations_is_as_asked_for() -> None:
    assert not any(conversations())
    assert all(conversations(conversation_share=1.0))
    some = conversations(2000, conversation_share=0.3)
    assert sum(pair is not None for pair in some) / 2000 == pytest.approx(0.3, abs=0.03)


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    options = {"conversation_share": 0.5}
    assert conversations(**options) == conversations(**options)
    assert conversations(**options) != conversations(seed=6, **options)


def test_boxes_come_in_every_language_and_on_the_grid() -> None:
    pairs = conversations(conversation_share=1.0, conversation_mix={"box": 1.0})
    assert {name for _, name in NAMES} <= {re.split("[:：]", q)[1].strip(" ?？") for q, _ in pairs}
    edges = {edge for _, answer in pairs for edge in parse_box(answer)}
    assert edges <= {round(line * 1000 / 16) for line in range(17)}
    assert len({answer for _, answer in pairs}) > 100


def test_the_wording_is_that_of_stage_3() -> None:
    import numpy as np

    scene = imagine(np.random.default_rng(0), "sun")
    asked = {conversation(scene, "colour", lang, {"sun": name})[0] for lang, name in NAMES}
    pairs = conversations(conversation_share=1.0, conversation_mix={"colour": 1.0})
    assert {question for question, _ in pairs} == asked


def test_scenes_show_what_has_a_name(tmp_path) -> None:
    def written(folder, *captions: tuple[str, str, str | None]) -> ShardSet:
        metas = [
            {"lang": lang, "caption": text} | ({"kind": kind} if kind else {})
            for lang, text, kind in captions
        ]
        samples = [Sample(key=f"{i}", image_bytes=b"", meta=meta) for i, meta in enumerate(metas)]
        write_shards(folder, samples)
        return ShardSet(folder)

    both = written(
        tmp_path / "both",
        ("en", "sun", "name"), ("en", "ball, day, warm", "keywords"), ("it", "sole", None),
        ("en", "sun", "name"), ("de", "Sonne", "name"),
    )  # fmt: skip
    assert spoken_names(both, ("en", "it")) == [("en", "sun"), ("it", "sole")]
    nameless = written(
        tmp_path / "alt", ("en", "The sun above a hill", "alt"), ("de", "Tal", "alt")
    )
    assert spoken_names(nameless, ("en", "it")) == [("en", "The sun above a hill")]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_lines_are_as_long_as_asked_for(share: float) -> None:
    options = {
        "max_tokens": 11, "conversation_share": share,
        "train": {"steps": 1, "batch_samples": 5, "lr": 1e-3},
    }  # fmt: skip
    keys = ("seed", "languages", "box_grid", "model")
    config = build(Config, {key: PARAMS[key] for key in keys} | {"pretrain_text": options})
    lines = [" ".join(["warm day"] * count) for count in range(1, 30, 7)]
    batch = job(config, lines, NAMES, DataParallelSlice(rank=0, ranks=1)).batch_at(0)
    longest = int(batch["mask"].sum(1).max())
    assert longest == 11 if share == 0 else longest > 11  # a question keeps its answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"conversation_mix": {"colors": 1.0}},
            r"no question kind \['colors'\]; known: \['colour'",
        ),
        ({"conversation_share": 1.5}, "conversation_share is 1.5; expected a share, 0 to 1"),
    ],
)
def test_nonsense_is_refused(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainTextConfig(train=TRAIN, **options)
