"""Where the right answer stands among all candidates, and where guessing would put it.

Letters: Q queries, C candidates.
"""

import math

import numpy as np


def best_rank(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Rank of each query's best right answer: 1 is first; int64 [Q].

    scores: float [Q, C]; positive: bool [Q, C], at least one a row. Ties count against the model:
    a wrong candidate with the same score stands before the right one, so that a model that gives
    one constant to everything gets nothing for it. Right answers never count against each other.
    """
    best = np.where(positive, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~positive).sum(axis=1)


def chance_at(k: int, positives: np.ndarray, candidates: int) -> float:
    """Mean chance that one of `positives` [Q] right answers is among k drawn from `candidates`."""
    counts, frequency = np.unique(positives, return_counts=True)
    hits = [1 - _miss(k, int(count), candidates) for count in counts]
    return float(np.average(hits, weights=frequency))


def _miss(k: int, positives: int, candidates: int) -> float:
    if candidates - positives < k:
        return 0.0
    return math.comb(candidates - positives, k) / math.comb(candidates, k)


def top_candidates(scores: np.ndarray, positive: np.ndarray, k: int) -> np.ndarray:
    """The k best candidates of each query, wrong before right where scores tie: int64 [Q, <=k]."""
    columns = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    order = np.lexsort((columns, positive, -scores), axis=1)
    return order[:, :k]
