"""Zero-shot classification. Letters: N pictures, C classes, P prompts of a class, D width.

Source: CLIP benchmark, metrics/zeroshot_classification.py.
"""

from collections.abc import Sequence

import numpy as np

from vlfoundry.eval.metrics.official.inputs import indices, same_length, table
from vlfoundry.eval.metrics.ranking import best_rank
from vlfoundry.infra.core.errors import DataError

LOGIT_SCALE = 100.0
TOP5_CLASSES = 5
"""With fewer classes than this there is no top-5 accuracy."""


def class_embeddings(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """One unit vector a class from its prompts: float64 [D, C].

    prompts: C arrays [P, D], P may differ. Normalise, average, normalise again.
    """
    if not len(prompts):
        raise DataError("no classes: expected the embedded prompts of each, float [P, D]")
    means = [_unit(table("prompts of a class", rows)).mean(axis=0) for rows in prompts]
    return _unit(table("class embeddings", means)).T


def zero_shot_logits(pictures: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """100 x cosine, float64 [N, C], from pictures [N, D] of any length and unit classes [D, C]."""
    left, right = table("pictures", pictures), table("classes", classes)
    if left.shape[1] != right.shape[0]:
        raise DataError(f"pictures {left.shape} do not fit classes {right.shape} (expected [D, C])")
    return LOGIT_SCALE * _unit(left) @ right


def zero_shot_accuracy(logits: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """acc1, acc5 (None below 5 classes) and mean_per_class_recall, fractions.

    logits: [N, C]; targets: [N], the right class. In acc1 and acc5 ties count against the model;
    torch.topk, which the benchmark uses, leaves their order open.
    """
    same_length(logits=logits, targets=targets)
    scores = table("logits", logits)
    right = indices("targets", targets, scores.shape[1])
    rank = best_rank(scores, right[:, None] == np.arange(scores.shape[1]))
    return {
        "acc1": float((rank <= 1).mean()),
        "acc5": float((rank <= 5).mean()) if scores.shape[1] >= TOP5_CLASSES else None,
        "mean_per_class_recall": mean_per_class_recall(scores.argmax(axis=1), right),
    }


def mean_per_class_recall(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Balanced accuracy: mean of each class's recall, over the classes that occur in `targets`."""
    same_length(predicted=predicted, targets=targets)
    guess, truth = np.asarray(predicted), np.asarray(targets)
    return float(np.mean([(guess[truth == label] == label).mean() for label in np.unique(truth)]))


def average_precision_per_class(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Multi-label average precision: float64 [C]; 0 for a class that no picture has.

    scores: [N, C]; targets: [N, C] of 0 and 1. Of tied pictures the earlier ranks first.
    """
    given, truth = table("scores", scores), table("targets", targets)
    if given.shape != truth.shape or not np.isin(truth, (0, 1)).all():
        raise DataError(f"targets {truth.shape} must be 0 or 1 and of the scores' {given.shape}")
    order = np.argsort(-given, axis=0, kind="stable")
    hits = np.take_along_axis(truth, order, axis=0)
    precision = hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]
    return (precision * hits).sum(axis=0) / np.maximum(hits.sum(axis=0), 1)


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over all classes, those that no picture has included."""
    return float(average_precision_per_class(scores, targets).mean())


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not lengths.all():
        raise DataError("an embedding is all zeros and has no direction; a model gave it")
    return rows / lengths
