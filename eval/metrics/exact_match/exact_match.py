"""Answers that are the same text, but for case, width, outer space and a closing stop."""

import unicodedata
from typing import Any

import datasets
import evaluate

DESCRIPTION = """Share of answers that equal one of the accepted ones after normalisation."""
INPUTS = """predictions: a text each; references: the accepted texts of each."""


class ExactMatch(evaluate.Metric):
    """Returns exact_match and per_item: [0 or 1, ...]."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[Any], references: list[Any]):
        hits = [
            float(normal(guess) in {normal(text) for text in accepted})
            for guess, accepted in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(hits) / len(hits), "per_item": hits}


def normal(text: str):
    """NFKC, case folded, single spaces, no closing full stop of any script."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.rstrip(".。．۔ ")
