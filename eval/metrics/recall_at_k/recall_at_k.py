"""Retrieval recall from ranks."""

from typing import Any

import datasets
import evaluate

DESCRIPTION = """Share of queries whose best right answer stands at rank k or before. Only the rank
of that one answer is needed, so no matrix of hits is built."""
INPUTS = """predictions: rank of the best right answer, from 1; references: number of right answers
of the query, at least 1; k: which cuts to report."""


class RecallAtK(evaluate.Metric):
    """Returns r<k> for each k, the median rank, and per_item: {k: [0 or 1, ...]}."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], k: tuple[int, ...] = (1, 5, 10)
    ):
        if min(references) < 1:
            raise ValueError("a query without a right answer has no rank; leave it out")
        per_item = {cut: [float(rank <= cut) for rank in predictions] for cut in k}
        means = {f"r{cut}": sum(hits) / len(hits) for cut, hits in per_item.items()}
        median = sorted(predictions)[len(predictions) // 2]
        return {**means, "median_rank": median, "per_item": per_item}
