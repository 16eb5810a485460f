"""The suite knn: neighbours that say it, vote by how near they are, and chance without them."""

import dataclasses

import numpy as np
import pytest

from tests.support.fake_models import Guesser, Oracle, write_concept_set
from vlfoundry.eval.compare.scores import read_items
from vlfoundry.eval.context import EvalContext
from vlfoundry.eval.datasets.folders import read_concept_set
from vlfoundry.eval.reference import NearestPicture
from vlfoundry.eval.suites import suites
from vlfoundry.eval.suites.knn import _elected
from vlfoundry.infra.core.errors import DataError


@pytest.fixture
def setting(tmp_path):
    folder = write_concept_set(tmp_path / "data", 23, ("test", "train"))
    data, train = (read_concept_set(folder, sources=[name]) for name in ("test", "train"))
    return data, EvalContext(
        languages=("en",), seed=1, items_dir=tmp_path / "items", train=train,
        nearest=NearestPicture(train, data),
    )  # fmt: skip


def test_images_that_look_alike_have_one_class(setting):
    data, context = setting
    scores = {s.name: s for s in suites()["knn"].run(Oracle(data), data, context)}
    guessed = {s.name: s for s in suites()["knn"].run(Guesser(), data, context)}
    assert scores["accuracy"].value > guessed["accuracy"].value + 0.3
    assert scores["accuracy"].n == scores["group_accuracy"].n == 23
    assert scores["accuracy"].chance == pytest.approx(1 / 23, abs=1e-6)
    assert scores["accuracy"].reference > 0.5
    items = read_items(context.items_dir / "knn_accuracy.jsonl")
    assert np.mean([item["right"] for item in items]) == pytest.approx(guessed["accuracy"].value)


def test_near_neighbours_have_more_say():
    labels = ["b", "a", "a", "c"]
    assert _elected(labels, np.array([0, 1, 2]), np.array([5.0, 2.0, 2.0])) == "b"
    assert _elected(labels, np.array([0, 1, 2]), np.array([3.0, 2.0, 2.0])) == "a"
    assert _elected(labels, np.array([3, 0]), np.array([1.0, 1.0])) == "b"


def test_without_training_images_there_is_nothing_to_look_among(setting):
    data, context = setting
    with pytest.raises(DataError, match="knn needs a concept set and training images"):
        suites()["knn"].run(Guesser(), data, dataclasses.replace(context, train=None))
