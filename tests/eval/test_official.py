"""Benchmark metrics where the recorded cases do not reach: corners, defaults and bad input."""

import math

import numpy as np
import pytest

from vlfoundry.eval.metrics.official.anls import anls_infographics, anls_stvqa, edit_distance
from vlfoundry.eval.metrics.official.boxes import box_in_pixels, box_iou, grounding_accuracy
from vlfoundry.eval.metrics.official.charts import exact_accuracy, relaxed_accuracy, relaxed_correct
from vlfoundry.eval.metrics.official.classification import (
    average_precision_per_class,
    class_embeddings,
    mean_per_class_recall,
    zero_shot_accuracy,
    zero_shot_logits,
)
from vlfoundry.eval.metrics.official.retrieval import retrieval_recall
from vlfoundry.eval.metrics.official.vqa import any_answer_accuracy, plain_answer, soft_accuracy
from vlfoundry.eval.metrics.official.yes_no import (
    mme_answer,
    mme_task,
    mme_tidy,
    pope_answer,
    pope_scores,
)
from vlfoundry.infra.core.errors import DataError


def test_a_model_that_gives_constants_gets_nothing_at_top_1():
    scores = zero_shot_accuracy(np.zeros((4, 6)), np.arange(4))
    assert (scores["acc1"], scores["acc5"]) == (0.0, 0.0)


def test_mean_per_class_recall_weighs_classes_not_pictures():
    assert mean_per_class_recall([0, 0, 0, 0], [0, 0, 0, 1]) == 0.5


def test_average_precision_of_a_textbook_case():
    scores, targets = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], [[1, 0], [0, 0], [1, 0]]
    assert average_precision_per_class(scores, targets) == pytest.approx([(1 + 2 / 3) / 2, 0])


def test_prompts_count_alike_whatever_their_length():
    prompts = np.array([[1.0, 0.0], [0.0, 1.0]])
    plain, stretched = class_embeddings([prompts]), class_embeddings([prompts * [[9.0], [1.0]]])
    assert stretched == pytest.approx(plain)
    assert plain[:, 0] == pytest.approx([math.sqrt(0.5)] * 2)
    assert zero_shot_logits([[3.0, 3.0]], plain) == pytest.approx(np.array([[100.0]]))


def test_any_caption_of_a_picture_is_a_hit():
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    recall = retrieval_recall(scores, [0, 0, 1], cuts=[1, 2])
    assert recall["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert recall["text_retrieval_recall@1"] == 0.5
    assert recall["text_retrieval_recall@2"] == 1.0


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("Six-pack", "6 pack"),
        ("well - known", "well known"),
        ("v1.5.", "v1.5"),
        ("wouldntve", "wouldntve"),
        ("wouldnt've", "wouldn't've"),
        ("Im", "im"),
        ("\tan\nanswer", "answer"),
        ("x." * 40, "x" * 32 + "x." * 8),
        ("The", ""),
    ],
)
def test_plain_answers(raw, plain):
    assert plain_answer(raw) == plain


def test_soft_accuracy_leaves_each_person_out_in_turn():
    assert soft_accuracy("Cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert soft_accuracy("cow", ["cat"] * 3 + ["dog"] * 7) == 0.0
    assert any_answer_accuracy("a cat", ["dog", "Cat."]) == 1.0


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3
    assert edit_distance("", "abc") == 3


def test_anls_of_empty_texts_and_at_the_threshold():
    assert anls_infographics("", [""]) == anls_stvqa(" ", [""]) == 1.0
    assert anls_infographics("ab", ["ax"]) == anls_stvqa("ab", ["ax"]) == 0.5
    assert anls_infographics("ab", ["ax"], threshold=0.6) == 0.0


def test_the_tolerance_is_relative_to_the_target_unless_asked():
    assert relaxed_correct("95", "100")
    assert not relaxed_correct("95", "100", compat=True)
    assert relaxed_accuracy(["95", "7"], [["100"], ["x", "7"]]) == 1.0
    assert relaxed_accuracy(["95", "7"], [["100"], ["x", "7"]], compat=True) == 0.5
    assert exact_accuracy([" Yes", "7.0"], [["yes "], ["7"]]) == 0.5


def test_yes_and_no():
    assert [pope_answer(text) for text in ("No\n", "it is not. yes", "a. no")] == [
        "yes",
        "no",
        "yes",
    ]
    assert [mme_answer(text) for text in ("Not", "  yes", "I now", "well no")] == [
        "no",
        "other",
        "no",
        "other",
    ]
    assert [mme_tidy(text) for text in ("不是的", "是\n", "True", "否定 x")] == [
        "no",
        "yes",
        "yes",
        "no x",
    ]


def test_a_ratio_of_nothing_is_zero():
    scores = pope_scores(["no", "no"], ["yes", "no"])
    assert (scores["precision"], scores["recall"], scores["f1"]) == (0.0, 0.0, 0.0)
    task = mme_task(["a", "a"], ["Yes", "No"], ["?", "?"])
    assert (task["score"], task["precision"], task["other_num"]) == (0.0, 0.0, 2)


def test_both_questions_on_a_picture_must_be_right_for_the_plus():
    task = mme_task(["a", "a", "b", "b"], ["Yes", "No"] * 2, ["yes", "no", "yes", "yes"])
    assert (task["acc"], task["acc_plus"], task["score"]) == (0.75, 0.5, 125.0)


def test_boxes():
    assert box_in_pixels("at [0.5, 0, 1, 1] or [1,2,3,4]", 10, 20).tolist() == [10, 0, 20, 10]
    assert box_in_pixels("[[1,2,3]]", 10, 20).tolist() == [0, 0, 0, 0]
    assert box_iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)
    assert box_iou([0, 0, 0, 0], [0, 0, 0, 0]) == box_iou([3, 3, 1, 1], [1, 1, 3, 3]) == 0.0
    answers, truth = ["[[0,0,500,1000]]", "none"], [0, 0, 20, 10]
    assert grounding_accuracy(answers, [truth, truth], [(10, 20)] * 2) == 0.5


PAIR = ["a", "a"]
BAD = {
    "different length: {'logits': 1": lambda: zero_shot_accuracy([[1.0, 2.0]], [0, 1]),
    "rows of different length": lambda: zero_shot_accuracy([[1.0, 2.0], [1.0]], [0, 1]),
    "has shape": lambda: zero_shot_accuracy([1.0, 2.0], [0, 1]),
    "not finite": lambda: zero_shot_accuracy([[math.nan, 2.0]], [0]),
    "whole numbers from 0 to 1": lambda: zero_shot_accuracy([[1.0, 2.0]], [2]),
    "no items to score": lambda: mean_per_class_recall([], []),
    "targets .* must be 0 or 1": lambda: average_precision_per_class([[0.1]], [[2]]),
    "no classes": lambda: class_embeddings([]),
    "all zeros": lambda: class_embeddings([np.zeros((1, 2))]),
    "do not fit": lambda: zero_shot_logits(np.ones((1, 3)), np.ones((2, 1))),
    "pictures .1. have no caption": lambda: retrieval_recall([[0.1, 0.2]], [0], [1]),
    "recall@2 needs": lambda: retrieval_recall([[0.1]], [0], [2]),
    "got 1 answers, expected the 10": lambda: soft_accuracy("a", ["a"]),
    "no answers": lambda: anls_stvqa("a", []),
    "'abc', expected a list": lambda: relaxed_accuracy(["a"], ["abc"]),
    "labels .'maybe'., expected": lambda: pope_scores(["yes"], ["maybe"]),
    "two questions on each picture": lambda: mme_task(["a", "b"], ["Yes", "No"], PAIR),
    "a box of shape": lambda: box_iou([0, 0, 1], [0, 0, 1, 1]),
    "expected both above 0": lambda: box_in_pixels("[1,2,3,4]", 0, 5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(DataError, match=message):
        BAD[message]()
