"""Overlap of words between an answer and its nearest reference."""

import re
import unicodedata
from collections import Counter
from typing import Any

import datasets
import evaluate

DESCRIPTION = """Mean over items of the best token F1 over the references. A token is a word; in
scripts written without spaces (Han, kana, Thai) it is a character."""
INPUTS = """predictions: a text each; references: one or more texts each."""

TOKEN = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+"
)


class TokenF1(evaluate.Metric):
    """Returns token_f1 and per_item: [f1, ...]."""

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
            max((f1(guess, text) for text in texts), default=0.0)
            for guess, texts in zip(predictions, references, strict=True)
        ]
        return {"token_f1": sum(values) / len(values), "per_item": values}


def tokens(text: str):
    """Words and single characters of `text`, case folded."""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def f1(guess: str, truth: str):
    """Harmonic mean of token precision and recall."""
    left, right = Counter(tokens(guess)), Counter(tokens(truth))
    common = sum((left & right).values())
    total = sum(left.values()) + sum(right.values())
    return 2 * common / total if total else 0.0
