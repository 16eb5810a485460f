"""chrF: F-score of character n-grams, for texts of any script."""

import unicodedata
from collections import Counter
from typing import Any

import datasets
import evaluate

DESCRIPTION = """Sentence-level chrF: mean precision and recall over character n-grams of the
orders 1 to 6 (as far as both texts are that long), combined with beta = 2; the best over the
references; then the mean over items. Source: M. Popovic, WMT 2015."""
INPUTS = """predictions: a text each; references: one or more texts each."""

ORDERS = 6
BETA = 2.0


class Chrf(evaluate.Metric):
    """Returns chrf and per_item: [chrf, ...], as fractions of 1."""

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
        values = [
            max((chrf(guess, text) for text in texts), default=0.0)
            for guess, texts in zip(predictions, references, strict=True)
        ]
        return {"chrf": sum(values) / len(values), "per_item": values}


def chrf(guess: str, truth: str):
    """chrF of one text against one reference."""
    left, right = plain(guess), plain(truth)
    precisions, recalls = [], []
    for order in range(1, ORDERS + 1):
        guessed, true = grams(left, order), grams(right, order)
        if not guessed or not true:
            break
        common = sum((guessed & true).values())
        precisions.append(common / sum(guessed.values()))
        recalls.append(common / sum(true.values()))
    if not precisions or not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def plain(text: str):
    """Case folded, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def grams(text: str, order: int):
    """Character n-grams with their counts."""
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
