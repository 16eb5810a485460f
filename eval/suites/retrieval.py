"""Image-text retrieval in both directions.

In a concept set the caption of a drawing is the list of its keywords, without the name itself, so
that this is not classification again. Letters: N pictures, M distinct captions.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from eval.datasets import ConceptSet, DataFolder
from eval.embedding import Model, Setting, embed_pictures, embed_texts
from eval.metrics import compute
from eval.ranking import best_rank, chance_at, top_candidates
from eval.scores import Score, mean_score, write_items
from infra.errors import DataError

NAME = "retrieval"
CUTS = (1, 5, 10)
MIN_CANDIDATES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pictures and captions of one language, and which belong together."""

    rows: np.ndarray
    """int64 [N]: pictures of the set that have a caption."""
    texts: tuple[str, ...]
    """M distinct captions."""
    right: np.ndarray
    """bool [N, M]."""


def run(model: Model, data: DataFolder, setting: Setting) -> list[Score]:
    """R@1, R@5 and R@10, image to text and text to image, for each language.

    A caption that two pictures share is one candidate and right for both; pictures that look the
    same share their captions. Rank counting: the rank of the best right answer is one more than
    the number of wrong ones that score at least as high (ties count against the model).
    """
    pictures = embed_pictures(model, data, NAME)
    scores = []
    for lang in setting.languages:
        pairs = pair_up(data, lang)
        logits = pictures[pairs.rows] @ embed_texts(model, pairs.texts).T  # [N, M]
        reference = _reference_logits(setting, data, lang, pairs)
        to_text = "image_to_text", logits, pairs.right, reference
        to_image = (
            "text_to_image",
            logits.T,
            pairs.right.T,
            None if reference is None else reference.T,
        )
        for direction, table, right, nearest in (to_text, to_image):
            scores += _score(data, setting, lang, pairs, direction, table, right, nearest)
    return scores


def keyword_caption(name: str, keywords: Sequence[str]) -> str:
    """The keywords in one line, without the name; empty if nothing is left."""
    return ", ".join(word for word in keywords if word.casefold() != name.casefold())


def pair_up(data: DataFolder, lang: str) -> Pairs:
    """Which captions of `lang` belong to which pictures. Raises DataError if fewer than two do."""
    own = [_captions(data, index, lang) for index in range(len(data))]
    by_look: dict[int, set[str]] = {}
    for look, texts in zip(data.look, own, strict=True):
        by_look.setdefault(int(look), set()).update(texts)
    column = {text: i for i, text in enumerate(dict.fromkeys(t for texts in own for t in texts))}
    rows = [index for index, texts in enumerate(own) if texts]
    if len(rows) < MIN_CANDIDATES or len(column) < MIN_CANDIDATES:
        raise DataError(
            f"{data.folder}: {len(rows)} pictures have a caption in {lang!r} ({len(column)} "
            f"distinct), expected at least {MIN_CANDIDATES}; the languages are {data.languages}"
        )
    right = np.zeros((len(rows), len(column)), bool)
    for row, index in enumerate(rows):
        right[row, [column[text] for text in by_look[int(data.look[index])]]] = True
    return Pairs(rows=np.array(rows), texts=tuple(column), right=right)


def _captions(data: DataFolder, index: int, lang: str) -> tuple[str, ...]:
    picture = data.pictures[index]
    if not isinstance(data, ConceptSet):
        return tuple(text for tag, text in picture.captions if tag == lang)
    concept = data.concepts[picture.concept]
    caption = keyword_caption(concept.names.get(lang, ""), concept.keywords.get(lang, ()))
    return (caption,) if caption else ()


def _reference_logits(
    setting: Setting, data: DataFolder, lang: str, pairs: Pairs
) -> np.ndarray | None:
    """The nearest training picture's concept, read through that concept's caption."""
    if setting.nearest is None or not isinstance(data, ConceptSet):
        return None
    table = setting.nearest.scores(data.drawn)[pairs.rows]
    logits = np.full((len(pairs.rows), len(pairs.texts)), -np.inf, np.float32)
    column = {text: index for index, text in enumerate(pairs.texts)}
    for index, key in enumerate(data.drawn):
        concept = data.concepts[key]
        text = keyword_caption(concept.names.get(lang, ""), concept.keywords.get(lang, ()))
        if text in column:
            target = logits[:, column[text]]
            np.maximum(target, table[:, index], out=target)
    return logits


def _score(data, setting, lang, pairs, direction, logits, right, nearest) -> list[Score]:
    ranks = best_rank(logits, right)
    counts = right.sum(axis=1)
    result = compute("recall_at_k", predictions=ranks, references=counts, k=CUTS)
    reference = None if nearest is None else best_rank(nearest, right)
    items = write_items(
        setting.items_dir,
        f"{NAME}_{direction}_{lang}",
        _items(data, pairs, direction, top_candidates(logits, right, 5), ranks, right),
    )
    return [
        mean_score(
            NAME,
            f"{direction}_r{cut}",
            result["per_item"][cut],
            lang=lang,
            chance=chance_at(cut, counts, right.shape[1]),
            reference=None if reference is None else float((reference <= cut).mean()),
            items=items,
            seed=setting.seed,
        )
        for cut in CUTS
    ]


def _items(data, pairs, direction, found, ranks, right):
    ids = [data.pictures[index].id for index in pairs.rows]
    queries, answers = (ids, pairs.texts) if direction == "image_to_text" else (pairs.texts, ids)
    for row, query in enumerate(queries):
        yield {
            "query": query,
            "right": [answers[index] for index in np.flatnonzero(right[row])],
            "found": [answers[index] for index in found[row]],
            "rank": int(ranks[row]),
        }
