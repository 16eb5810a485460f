"""Every suite on a model that knows, one that guesses, and one that gives constants."""

import dataclasses
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.fake_models import (
    LANGUAGES,
    Constant,
    Guesser,
    Oracle,
    drawing,
    encoded,
    looks,
    write_concept_set,
    write_pair_set,
)
from vlfoundry.eval.compare.scores import read_items
from vlfoundry.eval.context import EvalContext
from vlfoundry.eval.datasets.folders import read_concept_set, read_folder
from vlfoundry.eval.metrics import METRICS, compute
from vlfoundry.eval.questions import KINDS, ask
from vlfoundry.eval.reference import NearestPicture
from vlfoundry.eval.runner import choose_languages, score_model
from vlfoundry.eval.suites import abilities, score_keys, suites, why_not
from vlfoundry.infra.core.errors import DataError, ModelError
from vlfoundry.models.internvl.config import CAPABILITIES

pytestmark = pytest.mark.slow

SCENES = 40


@pytest.fixture(autouse=True)
def fewer_training_scenes(monkeypatch):
    """The reference answers of scenes cost most of the time here and need no large pool."""
    monkeypatch.setattr("vlfoundry.eval.questions.TRAINING_SCENES", 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_concept_set(tmp_path_factory.mktemp("set"), 30, ("test", "train"), twins=True)


@pytest.fixture
def data(folder):
    return read_concept_set(folder, sources=["test"])


@pytest.fixture
def setting(folder, data, tmp_path):
    train = read_concept_set(folder, sources=["train"])
    return EvalContext(
        languages=LANGUAGES,
        seed=0,
        items_dir=tmp_path / "items",
        train=train,
        nearest=NearestPicture(train, data),
        held_out=frozenset({"c02", "c03", "c04"}),
        scenes=SCENES,
    )


def by_key(scores):
    assert len({score.key for score in scores}) == len(scores), "keys are unique"
    return {score.key: score for score in scores}


def oracle(data, kind="internvl_g"):
    questions = [q for k in KINDS for q in ask(data, k, languages=LANGUAGES, count=SCENES, seed=0)]
    return Oracle(data, questions, kind)


@pytest.mark.parametrize("suite", ["zero_shot", "retrieval", "matching"])
def test_who_knows_gets_everything_and_who_guesses_gets_chance(suite, data, setting):
    for score in suites()[suite].run(oracle(data), data, setting):
        assert score.value == 1.0, score
        assert score.chance is not None
        assert score.chance < 0.6
    for score in suites()[suite].run(Guesser(), data, setting):
        low, high = score.interval
        assert score.chance is not None
        assert low - 0.02 <= score.chance <= high + 0.02, score


@pytest.mark.parametrize("suite", ["zero_shot", "retrieval"])
def test_constant_vectors_earn_nothing(suite, data, setting):
    for score in suites()[suite].run(Constant(), data, setting):
        assert score.value == 0.0, score


def test_zero_shot_reports_languages_ensemble_and_held_out_concepts(data, setting):
    scores = by_key(suites()["zero_shot"].run(oracle(data), data, setting))
    assert scores["zero_shot/top1/ensemble"].n == 30
    assert scores["zero_shot/top1_held_out/zh"].n == 3
    assert scores["zero_shot/top5_seen/en"].n == 27
    # 28 pictures with one right answer of 30, and two that look the same and so have two
    assert scores["zero_shot/top1/en"].chance == pytest.approx((28 + 2 * 2) / 30 / 30, abs=1e-6)
    assert scores["zero_shot/top1/en"].reference == 1.0  # the same blocks, moved by a pixel
    items = read_items(setting.items_dir.parent / scores["zero_shot/top1/en"].items)
    assert len(items) == 30
    assert items[0]["guesses"][0] in ("c00", "c01")


def test_pictures_that_look_the_same_accept_either_answer(data, setting):
    model = oracle(data)
    model._places["en thing 0"] = {30}  # only the twin's name finds the first two
    score = by_key(suites()["zero_shot"].run(model, data, setting))["zero_shot/top1/en"]
    assert score.value == 1.0


def test_equal_names_are_one_answer(tmp_path, data, setting):
    from vlfoundry.eval.suites.zero_shot import accepted_answers

    names = {concept: f"name {concept}" for concept in data.drawn}
    names["c09"] = names["c10"]
    right = accepted_answers(data, data.drawn, names)
    assert np.flatnonzero(right[9]).tolist() == [9, 10]
    assert np.flatnonzero(right[0]).tolist() == [0, 1]
    assert np.flatnonzero(right[5]).tolist() == [5]


def test_retrieval_uses_keywords_without_the_name(data, setting):
    scores = by_key(suites()["retrieval"].run(oracle(data), data, setting))
    score = scores["retrieval/text_to_image_r10/zh"]
    queries = [item["query"] for item in read_items(setting.items_dir.parent / score.items)]
    assert "zhword7, same" in queries
    assert len(scores) == 2 * 3 * 2 + 3


def choose_said(data, languages):
    """What is said where these languages are asked for."""
    said = []
    assert choose_languages(data, languages, log=said.append) == tuple(languages)
    return said


def test_retrieval_on_a_pair_set_with_several_captions(tmp_path):
    rows = [
        {
            "id": f"p{i}",
            "image": {"bytes": encoded(drawing(i)), "path": None},
            "captions": [
                {"lang": "en", "text": f"first {i}"},
                {"lang": "en", "text": f"second {i}"},
                *([{"lang": "it", "text": f"it {i}"}] if i < 6 else []),
            ],
        }
        for i in range(12)
    ]
    data = read_folder(write_pair_set(tmp_path, rows))
    said = []
    languages = choose_languages(data, None, log=said.append)
    assert languages == ("en", "it")
    assert said[1:] == choose_said(data, ["it"])
    assert "6 of 12 pictures have no caption in 'it'" in said[1]
    assert choose_said(data, ["en"]) == []
    setting = EvalContext(languages=languages, seed=0, items_dir=tmp_path / "items")
    scores = by_key(suites()["retrieval"].run(Oracle(data), data, setting))
    assert scores["retrieval/image_to_text_r1/en"].n == 12
    assert scores["retrieval/text_to_image_r1/en"].n == 24
    assert scores["retrieval/image_to_text_r1/it"].n == 6
    assert scores["retrieval/r1"].n == 12 + 24 + 6 + 6
    chances = [scores[f"retrieval/{d}_r1/en"].chance for d in ("image_to_text", "text_to_image")]
    chances += [scores[f"retrieval/{d}_r1/it"].chance for d in ("image_to_text", "text_to_image")]
    assert scores["retrieval/r1"].chance == pytest.approx(
        np.dot(chances, [12, 24, 6, 6]) / 48, abs=1e-6
    )
    assert all(score.value == 1.0 for score in scores.values())
    assert scores["retrieval/image_to_text_r1/en"].chance == pytest.approx(2 / 24, abs=1e-6)
    assert scores["retrieval/image_to_text_r1/en"].reference is None


class Believer(Guesser):
    """Finds that every text belongs to every picture."""

    def match(self, images, texts, task="retrieval"):
        return np.ones(len(texts), np.float32)


def test_matching_asks_of_each_picture_its_own_and_two_wrong_captions(data, setting):
    scores = by_key(suites()["matching"].run(Believer(), data, setting))
    assert {key: score.value for key, score in scores.items()} == dict.fromkeys(scores, 0.5)
    assert set(scores) == {
        f"matching/{name}{lang}"
        for name in ("accuracy", "hard_accuracy")
        for lang in ("", "/en", "/zh")
    }
    assert scores["matching/accuracy/zh"].n == 2 * len(data)
    items = read_items(setting.items_dir / "matching.jsonl")
    assert len(items) == 3 * len(data) * len(LANGUAGES)
    twins = ("test/0", "test/1")  # either's name is right
    concept = {picture.id: data.concepts[picture.concept] for picture in data.pictures}
    for item in items:
        right = item["text"] == concept[item["picture"]].names[item["lang"]]
        assert right == (item["caption"] == "own") or item["picture"] in twins
    drawn = {item["text"] for item in items if item["caption"] == "random"}
    assert len(drawn) > len(data) / 2


def test_the_hard_wrong_caption_is_the_most_similar_wrong_one(data, setting):
    model = Guesser()
    suites()["matching"].run(model, data, setting)
    shown = {picture.id: picture for picture in data.pictures}
    texts = [concept.names["en"] for concept in data.concepts.values()]
    vectors = model.embed_texts(texts)
    for item in read_items(setting.items_dir / "matching.jsonl"):
        if item["caption"] == "similar" and item["lang"] == "en":
            picture = shown[item["picture"]]
            twins = {"c00", "c01"} if picture.concept in ("c00", "c01") else {picture.concept}
            own = [concept in twins for concept in data.concepts]
            similarity = vectors @ model.embed_images([picture.data])[0]
            assert item["text"] == texts[int(np.where(own, -9, similarity).argmax())]


def test_matching_on_a_pair_set(tmp_path):
    def rows(captions):
        return [
            {
                "id": f"p{i}",
                "image": {"bytes": encoded(drawing(i)), "path": None},
                "captions": [{"lang": "en", "text": text} for text in captions(i)],
            }
            for i in range(7)
        ]

    data = read_folder(write_pair_set(tmp_path, rows(lambda i: [f"first {i}", f"second {i // 2}"])))
    setting = EvalContext(languages=("en",), seed=0, items_dir=tmp_path / "items")
    scores = by_key(suites()["matching"].run(Oracle(data), data, setting))
    assert scores["matching/accuracy"].value == scores["matching/hard_accuracy"].value == 1.0
    assert scores["matching/accuracy"].n == 14


def test_a_picture_to_which_every_caption_belongs_is_not_asked_about(tmp_path):
    def row(i, *captions):
        return {
            "id": f"p{i}",
            "image": {"bytes": encoded(drawing(i)), "path": None},
            "captions": [{"lang": "en", "text": text} for text in captions],
        }

    rows = [row(0, "a", "b"), row(1, "a"), row(2, "b")]
    data = read_folder(write_pair_set(tmp_path, rows))
    setting = EvalContext(languages=("en",), seed=0, items_dir=tmp_path / "items")
    scores = by_key(suites()["matching"].run(Guesser(), data, setting))
    assert scores["matching/accuracy"].n == 4
    asked = read_items(tmp_path / "items" / "matching.jsonl")
    assert {item["picture"] for item in asked} == {"p1", "p2"}


def test_zero_shot_on_a_pair_set_uses_its_labels(tmp_path):
    rows = [
        {
            "id": f"p{i}",
            "image": {"bytes": encoded(drawing(i)), "path": None},
            "captions": [],
            "label": f"label {i % 4}",
        }
        for i in range(12)
    ]
    data = read_folder(write_pair_set(tmp_path / "a", rows))
    setting = EvalContext(languages=(), seed=0, items_dir=tmp_path / "items")

    class Knows(Oracle):
        def __init__(self):
            super().__init__(data)
            for i, picture in enumerate(data.pictures):
                self._places[looks(picture.data)] = self._places[picture.label] = {i % 4}

    scores = by_key(suites()["zero_shot"].run(Knows(), data, setting))
    assert scores["zero_shot/top1"].value == 1.0
    assert scores["zero_shot/top1"].chance == 0.25
    assert scores["zero_shot/top5"].chance == 1.0
    for row in rows:
        del row["label"]
        row["captions"] = [{"lang": "en", "text": "x"}]
    unlabelled = read_folder(write_pair_set(tmp_path / "b", rows))
    with pytest.raises(DataError, match="has 0 labels"):
        suites()["zero_shot"].run(Guesser(), unlabelled, setting)


def test_the_linear_probe_learns_from_the_training_source_alone(data, setting):
    (score,) = suites()["linear_probe"].run(oracle(data), data, setting)
    assert score.value > 0.6
    assert score.reference is not None
    assert score.reference > 0.9
    assert score.chance == pytest.approx(1 / 3)
    (guess,) = suites()["linear_probe"].run(Guesser(), data, setting)
    assert guess.value < 0.7


@pytest.mark.parametrize("suite", ["colour", "box", "caption"])
def test_questions_on_scenes(suite, data, setting):
    known = by_key(suites()[suite].run(oracle(data, "chat_simple"), data, setting))
    guessed = by_key(suites()[suite].run(Guesser("chat_simple"), data, setting))
    main = {"colour": "accuracy", "box": "accuracy_iou50", "caption": "token_f1"}[suite]
    assert known[f"{suite}/{main}"].value == 1.0
    assert known[f"{suite}/{main}"].n == SCENES
    assert known[f"{suite}/{main}/zh"].n == SCENES // 2
    assert guessed[f"{suite}/{main}"].value == 0.0
    assert 0 < known[f"{suite}/{main}"].chance < 0.9
    assert known[f"{suite}/{main}"].reference is not None
    items = read_items(setting.items_dir / f"{suite}.jsonl")
    assert len(items) == SCENES
    assert all(item["said"] == "no idea" for item in items), "no reply is dropped"


def test_replies_that_cannot_be_parsed_are_counted(data, setting):
    scores = by_key(suites()["box"].run(Guesser("chat_full", reply="[1,2,3]"), data, setting))
    assert scores["box/has_box"].value == 0.0
    assert scores["box/accuracy_iou50"].n == SCENES
    inside = by_key(
        suites()["box"].run(Guesser("chat_full", reply="at [0,0,999,999]"), data, setting)
    )
    assert inside["box/has_box"].value == 1.0
    assert inside["box/mean_iou"].value > 0.05
    words = by_key(suites()["colour"].run(Guesser("chat_full", reply="Red"), data, setting))
    assert words["colour/in_words/"[:-1]].value == 0.5  # a colour word in English, not in Chinese


def test_single_drawings_are_captioned_by_a_model_that_does_not_chat(data, setting):
    scores = by_key(
        suites()["caption"].run(Guesser("internvl_g", reply="en thing 5"), data, setting)
    )
    assert scores["caption/token_f1/en"].value > scores["caption/token_f1/zh"].value
    items = read_items(setting.items_dir / "caption.jsonl")
    assert {item["prompt"] for item in items} == {"English caption:", "Chinese caption:"}


def test_the_language_of_captions_is_held_against_the_whole_set(data, setting):
    """Whichever languages are asked for: an answer is right or wrong by itself."""
    alone = dataclasses.replace(setting, languages=("en",))
    for reply, value in (("en thing 5", 1.0), ("zh thing 5", 0.0)):
        model = Guesser("chat_simple", reply=reply)
        scores = by_key(suites()["caption"].run(model, data, alone))
        assert scores["caption/in_language"].value == value


def test_a_set_of_one_language_does_not_tell_of_languages(tmp_path, setting):
    rows = [
        {"id": str(i), "image": {"bytes": encoded(drawing(i)), "path": None},
         "captions": [{"lang": "en", "text": f"thing {i}"}]}
        for i in range(3)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    alone = dataclasses.replace(setting, languages=("en",))
    scores = by_key(suites()["caption"].run(Guesser(), read_folder(tmp_path), alone))
    assert "caption/token_f1" in scores
    assert not any("in_language" in key for key in scores)


@pytest.mark.parametrize(
    ("kind", "reply", "en", "zh"),
    [
        ("internvl_g", "en thing 5", 1, 0),
        ("internvl_g", "a word of nobody's", 1, 1),
        ("internvl_g", "half \ufffd", 0, 0),
        ("internvl_g", "...", 0, 0),
        ("chat_simple", "红色背景", 0, 1),
        ("chat_simple", "ON A RED background", 1, 0),
        ("chat_simple", "on 色 background", 0, 0),
    ],
)
def test_captions_in_another_language_are_counted(data, setting, kind, reply, en, zh):
    scores = by_key(suites()["caption"].run(Guesser(kind, reply=reply), data, setting))
    found = [scores[f"caption/in_language/{lang}"].value for lang in ("en", "zh")]
    assert found == [en, zh]


def test_questions_are_the_same_for_every_model_and_differ_by_seed(data):
    first, again = (ask(data, "box", languages=LANGUAGES, count=8, seed=1) for _ in range(2))
    other = ask(data, "box", languages=LANGUAGES, count=8, seed=2)
    assert [q.answer for q in first] == [q.answer for q in again]
    assert [q.answer for q in first] != [q.answer for q in other]
    # the first questions do not depend on how many are asked
    more = ask(data, "box", languages=LANGUAGES, count=12, seed=1)
    assert [q.answer for q in more[:8]] == [q.answer for q in first]


def test_what_suites_score_is_known_before(data, setting):
    """A rule of the gate is held against these names before anything is trained."""
    models = [oracle(data, kind) for kind in ("internvl_g", "chat_simple")]
    scores = [s for model in models for s in score_model(model, data, setting, log=str)[0]]
    known = {key for suite in suites() for key in score_keys(suite, LANGUAGES)}
    assert {score.suite for score in scores} == set(suites())
    assert {score.key for score in scores} <= known
    held_out = {key for key in known if "held_out" in key or "seen" in key}
    assert known - {score.key for score in scores} <= held_out


def test_suites_compute_the_metrics_that_they_name(data, setting, monkeypatch):
    for name, suite in suites().items():
        module, used = sys.modules[suite.run.__module__], set()
        if hasattr(module, "compute"):
            monkeypatch.setattr(
                module,
                "compute",
                lambda metric, u=used, **kw: (u.add(metric), compute(metric, **kw))[1],
            )
        kind = "chat_full" if suite.needs in ("chat", "generate") else "internvl_g"
        suite.run(oracle(data, kind), data, setting)
        assert used == set(suite.metrics), name


def test_what_a_model_cannot_do_has_a_reason(data, setting):
    model = Guesser("internvl_c")
    scores, not_applicable = score_model(model, data, setting, log=lambda _: None)
    able = {name for name, suite in suites().items() if suite.needs == "embed"}
    assert {score.suite for score in scores} == able >= {"zero_shot", "retrieval", "linear_probe"}
    assert set(not_applicable) == set(suites()) - able >= {"matching", "caption", "colour", "box"}
    assert "needs a model that can chat" in not_applicable["box"]
    assert "one of kind internvl_c can embed" in not_applicable["caption"]
    assert why_not(Guesser("chat_full"), "colour") == ""
    with pytest.raises(ModelError, match="unknown suite 'nonsense'; choose from zero_shot,"):
        why_not(model, "nonsense")


def test_a_model_that_diverged_is_refused(data, setting):
    class Broken(Guesser):
        def _vector(self, data):
            return np.full(4, np.nan, np.float32)

    with pytest.raises(ModelError, match="30 of 30 embeddings of images that are not finite"):
        suites()["zero_shot"].run(Broken(), data, setting)


def test_languages_that_are_not_there(data):
    with pytest.raises(DataError, match=r"nothing in \['ja'\]; it has \['en', 'zh'\]"):
        choose_languages(data, ["en", "ja"])
    said = []
    assert choose_languages(data, None, log=said.append) == ("en", "zh")
    assert "nothing in ['ja', 'ar', 'it']" in said[0]


def test_every_suite_is_registered_with_what_it_needs():
    for name, suite in suites().items():
        assert suite.name == name
        assert callable(suite.run)
        assert {*suite.whole, *suite.each}
        assert suite.asks
        assert set(suite.metrics) <= set(METRICS)
        assert suite.run.__doc__
        for headline in suite.headlines:
            assert f"{name}/{headline.key}" in score_keys(name, LANGUAGES)
            assert suite.needs in abilities(headline.kind, CAPABILITIES[headline.kind])


def test_classes_of_one_name_cannot_be_told_apart(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_concept_set(tmp_path, count=4)
    table = pq.read_table(tmp_path / "concepts.parquet").to_pylist()
    for row in table:
        row["name"] = [{"lang": "en", "text": "same"}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "concepts.parquet")
    data = read_folder(tmp_path)
    setting = EvalContext(languages=("en",), seed=0, items_dir=tmp_path / "items")
    with pytest.raises(DataError, match=r"all 4 concepts are called 'same' in 'en'"):
        suites()["zero_shot"].run(Guesser(), data, setting)
