"""Linear probe: do the vision tower's features separate the groups of concepts?

A logistic regression is fitted on pictures that training saw, and tested on those that it did not.
"""

import warnings

import numpy as np

from vlfoundry.eval.compare.scores import Score, mean_score, write_items
from vlfoundry.eval.context import EvalContext, Model, probe_features
from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder
from vlfoundry.eval.metrics import compute
from vlfoundry.eval.suite import Suite
from vlfoundry.infra.core.errors import DataError

NAME = "linear_probe"
MAX_ITERATIONS = 300


def run(model: Model, data: DataFolder, setting: EvalContext) -> list[Score]:
    """Accuracy on groups. Chance is the commonest group of the training pictures.

    The reference gives each picture the group of its nearest training picture.
    Raises DataError if there is nothing to fit on.
    """
    if not isinstance(data, ConceptSet) or setting.train is None:
        raise DataError(
            f"{data.folder}: linear_probe needs a concept set and pictures to fit on, from other "
            "sources of the same folder: name them with --train-source"
        )
    train = _with_group(setting.train)
    test = _with_group(data)
    fit_labels, labels = _groups(train), _groups(test)
    features, to_label = (probe_features(model, part, NAME) for part in (train, test))
    guesses = _fit_predict(features, fit_labels, to_label)
    hits = _accuracy(guesses, labels)
    names, counts = np.unique(fit_labels, return_counts=True)
    majority = str(names[counts.argmax()])
    items = write_items(
        setting.items_dir,
        NAME,
        (
            {"id": p.id, "group": label, "guess": guess, "right": hit}
            for p, label, guess, hit in zip(test.pictures, labels, guesses, hits, strict=True)
        ),
    )
    return [
        mean_score(
            NAME,
            "group_accuracy",
            hits,
            chance=float(np.mean([label == majority for label in labels])),
            reference=_nearest(data, test, setting, labels),
            items=items,
            seed=setting.seed,
        )
    ]


def _with_group(data: ConceptSet) -> ConceptSet:
    grouped = data.only([c for c in data.drawn if data.concepts[c].group])
    if len({grouped.concepts[c].group for c in grouped.drawn}) < 2:
        raise DataError(f"{data.folder}: linear_probe needs concepts of at least two groups")
    return grouped


def _groups(data: ConceptSet) -> list[str]:
    return [data.concepts[picture.concept].group for picture in data.pictures]


def _fit_predict(features: np.ndarray, labels: list[str], to_label: np.ndarray) -> list[str]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    probe = LogisticRegression(C=0.1, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # an untrained tower's features may not converge; the control is scored as it stands
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(scaler.transform(features), labels)
    return probe.predict(scaler.transform(to_label)).tolist()


def _nearest(
    data: ConceptSet, test: ConceptSet, setting: EvalContext, labels: list[str]
) -> float | None:
    if setting.nearest is None:
        return None
    concepts = setting.nearest.concepts
    best = setting.nearest.scores(concepts).argmax(axis=1)
    row = {picture.id: index for index, picture in enumerate(data.pictures)}
    guesses = [data.concepts[concepts[best[row[p.id]]]].group for p in test.pictures]
    return float(np.mean(_accuracy(guesses, labels)))


def _accuracy(guesses: list[str], labels: list[str]) -> np.ndarray:
    numbers = {group: index for index, group in enumerate(sorted({*guesses, *labels}))}
    result = compute(
        "topk_accuracy",
        predictions=[[numbers[guess]] for guess in guesses],
        references=[[numbers[label]] for label in labels],
        k=(1,),
    )
    return np.array(result["per_item"][1])


SUITE = Suite(
    name=NAME,
    position=30,
    needs="embed",
    data="concepts",
    asks="which group an image is of, by a logistic regression on the vision tower's features",
    metrics=("topk_accuracy",),
    run=run,
    whole=("group_accuracy",),
)
