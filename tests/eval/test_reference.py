"""The reference without learning: small cases, and the published number over all classes."""

import numpy as np
import pytest

from tests.support.fake_models import write_concept_set
from tests.support.report_tree import REPOSITORY
from vlfoundry.eval.datasets.folders import read_concept_set
from vlfoundry.eval.metrics.ranking import best_rank
from vlfoundry.eval.reference import NearestPicture, squared_distances
from vlfoundry.eval.suites.zero_shot import accepted_answers

TRAIN = ("noto", "noto_v1", "fluent", "fluent_flat", "emojitwo", "fxemoji")


def test_distances_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(5, 7)), rng.normal(size=(4, 7))
    expected = [[((a - b) ** 2).sum() for b in right] for a in left]
    assert squared_distances(left, right) == pytest.approx(np.array(expected))


def test_concepts_without_a_training_picture_come_last(tmp_path):
    write_concept_set(tmp_path, 6, ("test", "train"))
    data = read_concept_set(tmp_path, sources=["test"])
    train = read_concept_set(tmp_path, sources=["train"]).only(["c00", "c01", "c02", "c03"])
    scores = NearestPicture(train, data).scores(data.drawn)
    assert np.isneginf(scores[:, 4:]).all()
    assert scores[:4, :4].argmax(axis=1).tolist() == [0, 1, 2, 3]


@pytest.mark.accept
def test_nearest_picture_over_all_classes_agrees_with_the_design_measurement():
    """HOG 8x8x8 and a colour grid reached 58.6 % top-1 and 75.2 % top-5 on twemoji."""
    data = read_concept_set(REPOSITORY / "data", sources=["twemoji"])
    train = read_concept_set(REPOSITORY / "data", sources=TRAIN)
    classes = sorted(set(data.drawn) & set(train.drawn))
    assert len(classes) == 1632
    data = data.only(classes)
    right = accepted_answers(data, classes, {})
    ranks = best_rank(NearestPicture(train.only(classes), data).scores(classes), right)
    assert (ranks <= 1).mean() == pytest.approx(0.586, abs=0.03)
    assert (ranks <= 5).mean() == pytest.approx(0.752, abs=0.03)
