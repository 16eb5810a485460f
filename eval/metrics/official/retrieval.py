"""Retrieval where a picture has several captions. Letters: M captions, N pictures.

Source: CLIP benchmark, metrics/zeroshot_retrieval.py.
"""

from collections.abc import Iterable

import numpy as np

from vlfoundry.eval.metrics.official.inputs import indices, same_length, table
from vlfoundry.eval.metrics.ranking import best_rank
from vlfoundry.infra.core.errors import DataError


def retrieval_recall(
    scores: np.ndarray, picture_of_text: np.ndarray, cuts: Iterable[int] = (1, 5, 10)
) -> dict[str, float]:
    """image_retrieval_recall@k (a text finds its picture) and text_retrieval_recall@k.

    scores: [M, N]; picture_of_text: [M], the picture that each caption belongs to. A picture's
    search hits if any of its captions is among the first k. Ties count against the model. Raises
    DataError if a picture has no caption or k exceeds the candidates of a direction.
    """
    same_length(scores=scores, picture_of_text=picture_of_text)
    given = table("scores", scores)
    texts, pictures = given.shape
    right = indices("picture_of_text", picture_of_text, pictures)[:, None] == np.arange(pictures)
    if not right.any(axis=0).all():
        without = np.flatnonzero(~right.any(axis=0)).tolist()
        raise DataError(f"pictures {without[:5]} have no caption and cannot be searched; drop them")
    to_image, to_text = best_rank(given, right), best_rank(given.T, right.T)
    recall = {}
    for k in cuts:
        if not 1 <= k <= min(texts, pictures):
            raise DataError(f"recall@{k} needs 1 <= k <= {min(texts, pictures)} candidates")
        recall[f"image_retrieval_recall@{k}"] = float((to_image <= k).mean())
        recall[f"text_retrieval_recall@{k}"] = float((to_text <= k).mean())
    return recall
