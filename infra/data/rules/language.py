"""Which language is a short caption in? Learnt from a corpus whose tags are mostly right.

Two witnesses, neither of which is the record itself: what character n-grams say that were counted
in *other* captions (naive Bayes, cross-fitted), and how other records tag the very same text.
Scripts need no rule of their own: an n-gram of kana or Arabic letters speaks for itself, and the
hard pairs (Chinese or kanji-only Japanese, English or Italian) are told apart by use.
"""

from collections.abc import Sequence

import numpy as np

FOLDS = 5
ORDERS = (1, 2, 3)
TEMPER = float(len(ORDERS))
"""The n-grams of three orders overlap: each letter is counted about three times."""
SMOOTHING = 0.1
NGRAM_VOTES = 1.0
"""The n-grams' opinion weighs as much as that many other records with the same text."""


def tag_probability(captions: Sequence[str], tags: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Probability of each record's own tag, and the most probable language. [N] float64, [N] str.

    A text that two languages share (a loan word) keeps both tags, as its other records show.
    """
    languages, tag = np.unique(np.asarray(tags), return_inverse=True)
    texts, text = np.unique(np.asarray(captions, dtype=object), return_inverse=True)
    votes = np.zeros((len(texts), len(languages)))
    np.add.at(votes, (text, tag), 1.0)
    guess = _ngram_scores(texts.tolist(), votes)
    guess = np.exp(guess - np.logaddexp.reduce(guess, axis=1, keepdims=True))[text]
    others = votes[text]
    others[np.arange(len(tag)), tag] -= 1.0
    posterior = others + NGRAM_VOTES * guess
    posterior /= posterior.sum(axis=1, keepdims=True)
    return posterior[np.arange(len(tag)), tag], languages[posterior.argmax(axis=1)]


def _ngram_scores(texts: list[str], votes: np.ndarray) -> np.ndarray:
    """Tempered log likelihood of each text under each language. [texts, languages]."""
    ids: dict[str, int] = {}
    grams = [[ids.setdefault(gram, len(ids)) for gram in _ngrams(text)] for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(g) for g in grams])
    gram = np.array([g for text in grams for g in text], np.int64)
    fold = np.arange(len(texts)) % FOLDS  # texts are sorted: neighbours, alike, fall apart
    counts = np.zeros((FOLDS, len(ids), votes.shape[1]))
    np.add.at(counts, (fold[owner], gram), votes[owner])
    total = counts.sum(axis=0)
    result = np.zeros_like(votes)
    for number in range(FOLDS):
        seen = total - counts[number]
        log_p = np.log(seen + SMOOTHING) - np.log(seen.sum(axis=0) + SMOOTHING * len(ids))
        inside = fold[owner] == number
        np.add.at(result, owner[inside], log_p[gram[inside]])
    return result / TEMPER


def _ngrams(text: str) -> list[str]:
    padded = f" {text.lower()} "
    return [padded[i : i + n] for n in ORDERS for i in range(len(padded) - n + 1)]
