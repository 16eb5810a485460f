"""Top-k accuracy where several answers may be right."""

from typing import Any

import datasets
import evaluate

DESCRIPTION = """Share of items with a right answer among the first k guesses."""
INPUTS = """predictions: guesses, best first, at least max(k) of them where there are that many
candidates; references: all right answers; k: which cuts to report."""


class TopkAccuracy(evaluate.Metric):
    """Returns top<k> for each k, and per_item: {k: [0 or 1, ...]}."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions: list[Any], references: list[Any], k: tuple[int, ...] = (1, 5)):
        per_item = {
            cut: [
                float(not set(guesses[:cut]).isdisjoint(right))
                for guesses, right in zip(predictions, references, strict=True)
            ]
            for cut in k
        }
        means = {f"top{cut}": sum(hits) / len(hits) for cut, hits in per_item.items()}
        return {**means, "per_item": per_item}
