"""Stage 3's samples: scenes with questions, each a function of its number alone."""

from collections import Counter

import numpy as np
import pytest

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.data.images.bulk import encode_webp
from vlfoundry.infra.data.shards.read import ShardSet
from vlfoundry.infra.data.shards.write import Sample, write_shards
from vlfoundry.infra.data.synthetic.scenes import (
    background_names,
    caption_question,
    conversation,
    parse_box,
)
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.models.layers.config import LoraConfig
from vlfoundry.stages.sft import SceneQuestions, SftStageConfig

LANGUAGES = ("en", "zh", "ar")
NAMES = {
    "sun": {"en": "sun", "zh": "太阳", "ar": "شمس"},
    "cat": {"en": "cat", "zh": "猫"},
    "tree": {"en": "tree", "ar": "شجرة"},
    "hat": {"it": "cappello"},
}
TRAIN = dict.fromkeys(("simple", "full"), TrainConfig(steps=1, batch_samples=8, lr=1e-3))
SIDE = 32


def shard_set(folder, names=NAMES, alpha: int = 255) -> ShardSet:
    samples = [
        Sample(
            key=f"{concept}-{source}-{lang}",
            image_bytes=encode_webp(np.full((16, 16, 4), (200, 30, 40 * i, alpha), np.uint8)),
            meta={"caption": name, "lang": lang, "concept": concept, "source": source},
        )
        for i, (concept, by_lang) in enumerate(names.items())
        for source in ("noto", "fluent")
        for lang, name in by_lang.items()
    ]
    write_shards(folder, samples)
    return ShardSet(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return shard_set(tmp_path_factory.mktemp("scenes"))


def questions(
    shards: ShardSet, seed: int = 1, variant: str = "simple", box_grid: int = 1000, **options
) -> SceneQuestions:
    config = SftStageConfig(**{"train": TRAIN, **options})
    return SceneQuestions(shards, config, variant, LANGUAGES, box_grid=box_grid, seed=seed)


def test_a_sample_depends_on_seed_and_number_alone(shards: ShardSet) -> None:
    supply = questions(shards)
    forward = [supply.sample(i, SIDE) for i in range(12)]
    backward = [questions(shards).sample(i, SIDE) for i in reversed(range(12))][::-1]
    for (scene, *texts), (other, *other_texts) in zip(forward, backward, strict=True):
        assert texts == other_texts
        assert scene.objects == other.objects
        assert np.array_equal(scene.image, other.image)
    assert len({scene.image.tobytes() for scene, _, _ in forward}) == 12
    others = [questions(shards, seed=2).sample(i, SIDE) for i in range(12)]
    assert [texts for _, *texts in others] != [texts for _, *texts in forward]


def test_box_questions_are_about_the_only_object(shards: ShardSet) -> None:
    supply = questions(shards, mix={"box": 1.0}, objects=(0.0, 1.0, 1.0))
    boxes = 0
    for i in range(60):
        scene, _, answer = supply.sample(i, SIDE)
        assert len(scene.objects) == 1
        if (box := parse_box(answer)) is not None:  # what has no name is asked for its colour
            boxes += 1
            assert box == scene.objects[0][1]
    assert boxes > 30


def test_boxes_are_told_on_the_grid(shards: ShardSet) -> None:
    supply = questions(shards, mix={"box": 1.0}, box_grid=8)
    told = [
        (scene, parse_box(answer)) for scene, _, answer in map(supply.sample, range(30), [64] * 30)
    ]
    told = [(scene.objects[0][1], box) for scene, box in told if box is not None]
    assert told
    for truth, box in told:
        assert all(edge in range(0, 1001, 125) for edge in box)
        assert max(abs(a - b) for a, b in zip(truth, box, strict=True)) <= 1000 / 8 / 2


def test_a_kind_joins_the_mix_when_its_share_of_the_run_is_over(shards: ShardSet) -> None:
    train = dict.fromkeys(TRAIN, TrainConfig(steps=10, batch_samples=20, lr=1e-3))
    options = {"mix": {"box": 1.0, "caption": 1.0}, "begins": {"simple": {"caption": 0.6}}}
    wanted = {caption_question(lang) for lang in LANGUAGES}

    def captions(variant: str, numbers: range) -> int:
        supply = questions(shards, variant=variant, train=train, **options)
        return sum(supply.sample(i, 16)[1] in wanted for i in numbers)

    assert captions("simple", range(120)) == 0
    assert captions("simple", range(120, 200)) > 15
    assert captions("full", range(120)) > 25


def test_other_questions_are_about_as_many_objects_as_asked_for(shards: ShardSet) -> None:
    supply = questions(shards, mix={"colour": 1.0}, objects=(1.0, 0.0, 1.0))
    counts = Counter(len(supply.sample(i, 64)[0].objects) for i in range(80))
    assert set(counts) == {1, 3}
    assert min(counts.values()) > 20


def test_questions_come_in_the_languages_that_name_the_objects(shards: ShardSet) -> None:
    supply = questions(shards, mix={"caption": 1.0})
    asked: dict[str, set[str]] = {concept: set() for concept in NAMES}
    by_question = {caption_question(lang): lang for lang in LANGUAGES}
    for i in range(150):
        scene, question, answer = supply.sample(i, SIDE)
        concept = scene.objects[0][0]
        if lang := by_question.get(question):
            asked[concept].add(lang)
            names = {concept: NAMES[concept][lang]}
            assert (question, answer) == conversation(scene, "caption", lang, names)
    spoken = {concept: set(names) & set(LANGUAGES) for concept, names in NAMES.items()}
    assert asked == spoken


def test_what_no_language_names_is_asked_for_its_background(tmp_path) -> None:
    supply = questions(shard_set(tmp_path, {"hat": NAMES["hat"]}), mix={"box": 1.0})
    for i in range(10):
        scene, *texts = supply.sample(i, SIDE)
        possible = [conversation(scene, "colour", lang, {"hat": ""}) for lang in LANGUAGES]
        assert tuple(texts) in possible


def test_the_mix_decides_how_often_a_kind_comes(shards: ShardSet) -> None:
    supply = questions(shards, mix={"colour": 3.0, "caption": 1.0, "box": 0.0})
    kinds = Counter()
    for i in range(400):
        scene, *texts = supply.sample(i, 16)
        colours = [
            conversation(scene, "colour", lang, {c: "" for c, _ in scene.objects})
            for lang in LANGUAGES
        ]
        kinds["colour" if tuple(texts) in colours else "other"] += 1
    # A quarter of the drawings have no name here, and are asked for their colour.
    assert kinds["colour"] / 400 == pytest.approx(0.75 + 0.25 * 0.25, abs=0.06)


def test_every_background_comes(shards: ShardSet) -> None:
    supply = questions(shards)
    seen = {supply.sample(i, 16)[0].background for i in range(200)}
    assert seen == set(background_names())


def test_pictures_without_a_visible_pixel_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="has no picture to compose scenes from"):
        questions(shard_set(tmp_path, alpha=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"colors": 1.0}}, r"sft.mix: no question kind \['colors'\]; known: \['colour'"),
        ({"mix": {}}, "at least one positive weight"),
        ({"objects": (0.0,)}, "at least one positive weight"),
        ({"begins": {"simple": {"caption": 0.5, "box": 0.1, "colour": 1}}}, "nothing to ask"),
        ({"begins": {"simpel": {"caption": 0.5}}}, "under one of .'full', 'simple'."),
        ({"begins": {"full": {"captions": 0.5}}}, "expected kinds of questions .colour, box"),
        ({"lora": {"visoin": LoraConfig()}}, r"names \['visoin'\]; expected some of .*'vision'"),
        ({"lora": {"vision": LoraConfig()}}, r"\['sft', 'vision'\]: the adapters would stay"),
    ],
)
def test_nonsense_is_refused(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SftStageConfig(train=TRAIN, **options)


def test_things_are_called_by_their_names_and_not_by_keywords(tmp_path) -> None:
    samples = [
        Sample(
            key=f"sun-{kind}", image_bytes=encode_webp(np.full((16, 16, 4), 255, np.uint8)),
            meta={"caption": text, "lang": "en", "concept": "sun", "source": "noto", "kind": kind},
        )
        for kind, text in (("keywords", "bright, ray"), ("name", "sun"))
    ]  # fmt: skip
    write_shards(tmp_path, samples)
    supply = questions(ShardSet(tmp_path), mix={"caption": 1.0})
    assert supply.sample(0, SIDE)[2].startswith("sun on a ")
