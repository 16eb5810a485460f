"""Image-text retrieval in both directions.

In a concept set the caption of a drawing is the list of its keywords, without the name itself, so
that this is not classification again. Letters: N pictures, M distinct captions.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vlfoundry.eval.compare.scores import Score, mean_score, read_items, write_items
from vlfoundry.eval.context import EvalContext, Model, embed_pictures, embed_texts
from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder
from vlfoundry.eval.datasets.pairing import Pairs, keyword_caption, keyword_captions, pair_up
from vlfoundry.eval.metrics import compute
from vlfoundry.eval.metrics.ranking import best_rank, chance_at, top_candidates
from vlfoundry.eval.suite import Headline, Suite

NAME = "retrieval"
CUTS = (1, 5, 10)


def run(model: Model, data: DataFolder, setting: EvalContext) -> list[Score]:
    """R@1, R@5 and R@10, image to text and text to image, for each language, and over all.

    A caption that two pictures share is one candidate and right for both; pictures that look the
    same share their captions. Rank counting: the rank of the best right answer is one more than
    the number of wrong ones that score at least as high (ties count against the model).
    """
    pictures = embed_pictures(model, data, NAME)
    scores = []
    for lang in setting.languages:
        pairs = pair_up(data, lang, keyword_captions)
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
    return [*_over_all(scores, setting), *scores]


def _reference_logits(
    setting: EvalContext, data: DataFolder, lang: str, pairs: Pairs
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


def _score(
    data: DataFolder,
    setting: EvalContext,
    lang: str,
    pairs: Pairs,
    direction: str,
    logits: np.ndarray,
    right: np.ndarray,
    nearest: np.ndarray | None,
) -> list[Score]:
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


def _over_all(scores: Sequence[Score], setting: EvalContext) -> Iterator[Score]:
    """The cuts over both directions and all languages, each query the same."""
    files = dict.fromkeys(score.items for score in scores)
    queries = (
        {"of": Path(name).stem, **{key: item[key] for key in ("query", "rank")}}
        for name in files
        for item in read_items(setting.items_dir.parent / name)
    )
    items = write_items(setting.items_dir, NAME, queries)
    for cut in CUTS:
        parts = [score for score in scores if score.name.endswith(f"_r{cut}")]
        counts = np.array([score.n for score in parts])
        levels = [[score.chance, score.reference] for score in parts]
        chance, reference = (
            None if None in column else float(np.average(column, weights=counts))
            for column in zip(*levels, strict=True)
        )
        yield mean_score(
            NAME,
            f"r{cut}",
            [value for score in parts for value in score.by_item],
            chance=chance,
            reference=reference,
            items=items,
            seed=setting.seed,
        )


def _items(
    data: DataFolder,
    pairs: Pairs,
    direction: str,
    found: np.ndarray,
    ranks: np.ndarray,
    right: np.ndarray,
):
    ids = [data.pictures[index].id for index in pairs.rows]
    queries, answers = (ids, pairs.texts) if direction == "image_to_text" else (pairs.texts, ids)
    for row, query in enumerate(queries):
        yield {
            "query": query,
            "right": [answers[index] for index in np.flatnonzero(right[row])],
            "found": [answers[index] for index in found[row]],
            "rank": int(ranks[row]),
        }


SUITE = Suite(
    name=NAME,
    position=20,
    needs="embed",
    data="any",
    asks="which caption an image is nearest to, and which image a caption",
    metrics=("recall_at_k",),
    run=run,
    whole=tuple(f"r{cut}" for cut in CUTS),
    each=tuple(f"{way}_r{cut}" for way in ("image_to_text", "text_to_image") for cut in CUTS),
    headlines=(
        Headline(
            kind="internvl_c", key="text_to_image_r10/en", label="text-to-image R@10, English"
        ),
    ),
)
