"""Intersection over union of predicted and true boxes."""

from typing import Any

import datasets
import evaluate

DESCRIPTION = """Share of boxes [x1, y1, x2, y2] whose intersection over union with the truth
reaches a threshold. An answer without a box (an empty list) counts as 0 and is counted."""
INPUTS = """predictions: [x1, y1, x2, y2] or []; references: [x1, y1, x2, y2]; threshold."""


class IouAccuracy(evaluate.Metric):
    """Returns accuracy, mean_iou, unparsed (a count), and per_item: [iou, ...]."""

    def _info(self):
        box = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": box, "references": box}),
        )

    def _compute(self, predictions: list[Any], references: list[Any], threshold: float = 0.5):
        ious = [iou(guess, truth) for guess, truth in zip(predictions, references, strict=True)]
        return {
            "accuracy": sum(value >= threshold for value in ious) / len(ious),
            "mean_iou": sum(ious) / len(ious),
            "unparsed": sum(len(guess) != 4 for guess in predictions),
            "per_item": ious,
        }


def iou(guess: list[float], truth: list[float]):
    """Intersection over union of two boxes; 0 for a guess that is no box or has no area."""
    if len(guess) != 4:
        return 0.0
    width = min(guess[2], truth[2]) - max(guess[0], truth[0])
    height = min(guess[3], truth[3]) - max(guess[1], truth[1])
    if width <= 0 or height <= 0 or guess[2] <= guess[0] or guess[3] <= guess[1]:
        return 0.0
    area = (guess[2] - guess[0]) * (guess[3] - guess[1])
    union = area + (truth[2] - truth[0]) * (truth[3] - truth[1]) - width * height
    return width * height / union
