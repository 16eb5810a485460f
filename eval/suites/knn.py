"""Nearest neighbours: do images of one group, or of one class, lie together for the vision tower?

Each image under test is given the class, and the group, that most of its nearest training images
have. Nothing is learnt and nothing is tuned, as in Wu et al. 2018 (arXiv 1805.01978), section 3.4.

Letters: N images under test, T training images, W features, K neighbours.
"""

from collections.abc import Callable

import numpy as np

from vlfoundry.eval.compare.scores import Score, mean_score, write_items
from vlfoundry.eval.context import EvalContext, Model, probe_features, unit
from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder, Picture
from vlfoundry.eval.metrics import compute
from vlfoundry.eval.suite import Suite
from vlfoundry.infra.core.errors import DataError

NAME = "knn"
TASK = "linear_probe"
"""whose view of an oblong image is taken (models.preprocess.geometry)"""
NEIGHBOURS = 10
TEMPERATURE = 0.07
"""of the weights by which neighbours vote: exp(cosine / temperature)"""


def run(model: Model, data: DataFolder, setting: EvalContext) -> list[Score]:
    """Accuracy on classes and on groups; chance is the commonest one of the training images.

    The reference is the nearest training image without any learning (HOG).
    Raises DataError if there are no training images to look among.
    """
    if not isinstance(data, ConceptSet) or setting.train is None:
        raise DataError(
            f"{data.folder}: knn needs a concept set and training images, from other sources of "
            "the same folder: name them with --train-source"
        )
    train = setting.train
    known, shown = (unit(probe_features(model, part, TASK)) for part in (train, data))
    similar = shown @ known.T  # [N, T]
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]  # [N, K]
    votes = np.exp(np.take_along_axis(similar, nearest, 1) / TEMPERATURE)
    labels: dict[str, Callable[[Picture], str]] = {
        "accuracy": lambda picture: picture.concept,
        "group_accuracy": lambda picture: data.concepts[picture.concept].group,
    }
    scores = []
    for name, label in labels.items():
        theirs = [label(picture) for picture in train.pictures]
        ours = [label(picture) for picture in data.pictures]
        said = [_elected(theirs, *row) for row in zip(nearest, votes, strict=True)]
        hits = np.array(_right(said, ours), float)
        commonest = max(sorted(set(theirs)), key=theirs.count)
        items = write_items(
            setting.items_dir,
            f"{NAME}_{name}",
            (
                {"id": picture.id, "answer": answer, "said": text, "right": hit}
                for picture, answer, text, hit in zip(
                    data.pictures, ours, said, hits.tolist(), strict=True
                )
            ),
        )
        reference = _reference(data, setting, name)
        scores.append(
            mean_score(
                NAME,
                name,
                hits,
                chance=float(np.mean([answer == commonest for answer in ours])),
                reference=None if reference is None else float(np.mean(_right(reference, ours))),
                items=items,
                seed=setting.seed,
            )
        )
    return scores


def _elected(labels: list[str], nearest: np.ndarray, votes: np.ndarray) -> str:
    """The label with most votes; of equal ones the first by name."""
    found: dict[str, float] = {}
    for index, vote in zip(nearest.tolist(), votes.tolist(), strict=True):
        found[labels[index]] = found.get(labels[index], 0.0) + vote
    return max(sorted(found), key=lambda label: found[label])


def _reference(data: ConceptSet, setting: EvalContext, name: str) -> list[str] | None:
    if setting.nearest is None:
        return None
    concepts = setting.nearest.concepts
    best = setting.nearest.scores(concepts).argmax(axis=1)
    found = [concepts[index] for index in best]
    return found if name == "accuracy" else [data.concepts[concept].group for concept in found]


def _right(said: list[str], answers: list[str]) -> list[float]:
    return compute("exact_match", predictions=said, references=[[a] for a in answers])["per_item"]


SUITE = Suite(
    name=NAME,
    position=35,
    needs="embed",
    data="concepts",
    asks="which class and group most of the nearest training images are of",
    metrics=("exact_match",),
    run=run,
    whole=("accuracy", "group_accuracy"),
)
