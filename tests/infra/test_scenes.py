"""Scenes: the same generator gives the same scene, and every answer is true of the pixels."""

import numpy as np
import pytest

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.synthetic import scenes
from vlfoundry.infra.data.synthetic.scenes import (
    Drawing,
    Scene,
    box_iou,
    compose,
    conversation,
    parse_box,
)

LANGUAGES = ("en", "zh", "ja", "ar", "it")


def square(concept: str, colour: tuple[int, int, int], margin: int = 8) -> Drawing:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[margin : 64 - margin, margin : 64 - margin] = (*colour, 255)
    return Drawing(concept=concept, rgba=rgba, names=dict.fromkeys(LANGUAGES, concept))


DRAWINGS = [square("a", (0, 255, 255)), square("b", (0, 0, 0), 2), square("c", (255, 0, 255), 20)]


def test_the_same_generator_gives_the_same_scene():
    first, again, other = (compose(np.random.default_rng(s), DRAWINGS) for s in (7, 7, 8))
    assert np.array_equal(first.image, again.image)
    assert (first.objects, first.background) == (again.objects, again.background)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size_px", [64, 96])
def test_boxes_enclose_exactly_what_was_drawn(size_px):
    for seed in range(40):
        scene = compose(np.random.default_rng(seed), DRAWINGS[:1], size_px)
        assert scene.image.shape == (size_px, size_px, 3)
        drawn = np.abs(scene.image.astype(int) - (0, 255, 255)).max(axis=-1) < 90
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        truth = [edge * 1000 / size_px for edge in edges]
        assert (
            np.abs(np.subtract(scene.objects[0][1], truth)).max() <= 1000 / size_px + 1
        )  # a half-covered pixel


def test_objects_do_not_overlap():
    for seed in range(60):
        boxes = [box for _, box in compose(np.random.default_rng(seed), DRAWINGS).objects]
        assert len(boxes) == 3
        for i, a in enumerate(boxes):
            assert all(box_iou(a, b) == 0.0 for b in boxes[i + 1 :])


def test_the_background_is_the_colour_that_the_answer_names():
    words = scenes._words()
    seen = set()
    for seed in range(100):
        scene = compose(np.random.default_rng(seed), [square("a", (0, 0, 0), 28)])
        corner = np.median(scene.image.reshape(-1, 3), axis=0)
        distance = {n: np.abs(corner - c).sum() for n, c in words["backgrounds"].items()}
        assert min(distance, key=distance.get) == scene.background
        _, answer = conversation(scene, "colour", "it", {"a": "x"})
        assert answer == words["languages"]["it"]["colours"][scene.background]
        seen.add(scene.background)
    assert seen == set(scenes.background_names())


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("kind", scenes.KINDS)
def test_every_question_has_a_true_answer_in_every_language(kind, lang):
    objects = (("a", (100, 100, 300, 300)), ("b", (600, 650, 900, 990)))
    scene = Scene(image=np.zeros((64, 64, 3), np.uint8), background="blue", objects=objects)
    question, answer = conversation(scene, kind, lang, {"a": "NAME-A", "b": "NAME-B"}, target=1)
    words = scenes._words()["languages"][lang]
    assert question
    assert "{" not in question + answer
    if kind in ("box", "position"):
        assert "NAME-B" in question
        assert "NAME-A" not in question
    if kind in ("colour", "count", "position"):
        assert answer in scenes.answer_words(kind, lang)
    expected = {
        "colour": words["colours"]["blue"],
        "count": words["numbers"][2],
        "position": words["positions"]["bottom right"],
        "box": "[600,650,900,990]",
    }
    if kind == "caption":
        assert "NAME-A" in answer
        assert "NAME-B" in answer
        assert words["colours"]["blue"] in answer
    else:
        assert answer == expected[kind]


def test_a_box_is_told_on_the_nearest_lines_of_a_grid():
    assert scenes.format_box((0, 290, 510, 1000)) == "[0,290,510,1000]"
    assert scenes.format_box((0, 290, 510, 1000), grid=16) == "[0,312,500,1000]"
    assert scenes.format_box((0, 240, 510, 1000), grid=2) == "[0,0,500,1000]"


def test_an_imagined_scene_is_like_a_composed_one():
    rng = np.random.default_rng(3)
    imagined = [scenes.imagine(rng, "a") for _ in range(300)]
    composed = [compose(rng, [DRAWINGS[0]]) for _ in range(300)]
    assert {s.background for s in imagined} == set(scenes.background_names())
    sides = [
        [(s.objects[0][1][2] - s.objects[0][1][0]) / 1000 for s in group]
        for group in (imagined, composed)
    ]
    assert min(sides[0]) >= 0.29
    assert max(sides[0]) <= 0.71
    assert np.mean(sides[0]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(sides[0]) >= np.mean(sides[1])  # a drawing does not fill all of its square
    question, answer = conversation(imagined[0], "box", "en", {"a": "apple"})
    assert "apple" in question
    assert parse_box(answer) == imagined[0].objects[0][1]


def test_values_are_picked_by_weight():
    draws = (np.arange(1000) + 0.5) / 1000
    picked = [scenes.pick({"a": 1.0, "b": 0.0, "c": 3.0}, draw) for draw in draws]
    assert picked.count("a") == 250
    assert picked.count("c") == 750


def test_word_tables_are_complete_and_unambiguous():
    words = scenes._words()
    assert set(words["languages"]) == set(LANGUAGES)
    for lang in LANGUAGES:
        for kind in ("colour", "count", "position"):
            answers = scenes.answer_words(kind, lang)
            assert len(set(answers)) == len(answers)
        assert set(words["languages"][lang]["colours"]) == set(words["backgrounds"])


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1,2,30,40]", (1, 2, 30, 40)),
        ("it is at [ 1, 2, 30 , 40 ].", (1, 2, 30, 40)),
        ("[30,2,1,40]", None),
        ("[1,2,30,4000]", None),
        ("1,2,30,40", None),
        ("", None),
    ],
)
def test_boxes_in_replies(text, box):
    assert parse_box(text) == box


def test_intersection_over_union():
    assert box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0.0


def test_mistakes_are_named():
    scene = compose(np.random.default_rng(0), [DRAWINGS[0], DRAWINGS[0]])
    with pytest.raises(DataError, match="shows 'a' twice"):
        conversation(scene, "box", "en", {"a": "x"})
    with pytest.raises(DataError, match="known: colour, box, caption, count, position"):
        conversation(scene, "colur", "en", {"a": "x"})
    with pytest.raises(DataError, match="no words in 'xx'"):
        conversation(scene, "colour", "xx", {"a": "x"})
    with pytest.raises(DataError, match="takes 1 to 3 drawings, got 0"):
        compose(np.random.default_rng(0), [])
    empty = Drawing(concept="e", rgba=np.zeros((64, 64, 4), np.uint8), names={})
    with pytest.raises(DataError, match="no solid pixel"):
        compose(np.random.default_rng(0), [empty])
