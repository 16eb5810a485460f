"""Does this text belong to this picture? Image-text matching, as stage 2 trains it.

In each language a picture is shown with its own caption and with a wrong one; in a concept set
captions are names. Letters: N pictures, M distinct captions.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vlfoundry.eval.compare.scores import Score, mean_score, write_items
from vlfoundry.eval.context import (
    IMAGE_BATCH,
    EvalContext,
    Model,
    embed_pictures,
    embed_texts,
    in_batches,
)
from vlfoundry.eval.datasets.folders import DataFolder
from vlfoundry.eval.datasets.pairing import Pairs, name_captions, pair_up
from vlfoundry.eval.suite import Headline, Suite
from vlfoundry.infra.core.errors import DataError

NAME = "matching"
TASK = "retrieval"
"""whose view of an oblong picture is taken (models.preprocess.geometry)"""
CHANCE = 0.5
"""of any constant answer: half of the texts are right"""
SURE = 0.5
"""from this probability on the answer is yes"""
KINDS = {"accuracy": "random", "hard_accuracy": "similar"}
"""score -> the wrong captions that it is about"""


def run(model: Model, data: DataFolder, setting: EvalContext) -> list[Score]:
    """Accuracy with wrong captions drawn at random, and with those that the model's embeddings find
    most similar to the picture (`hard_accuracy`): over all languages, and for each.

    Right and wrong captions count the same, so a constant answer reaches one half.
    """
    pictures = embed_pictures(model, data, TASK)
    rng = np.random.default_rng([setting.seed, len(data)])
    questions = [
        question
        for lang in setting.languages
        for question in _ask(model, data, pair_up(data, lang, name_captions), lang, pictures, rng)
    ]
    if not questions:
        raise DataError(f"{data.folder}: each caption belongs to each picture, so none is wrong")
    said = _probabilities(model, data, questions)
    items = [
        {
            "id": f"{NAME}-{number:05d}",
            "picture": data.pictures[question.row].id,
            "lang": question.lang,
            "text": question.text,
            "caption": question.caption,
            "probability": probability,
            "hit": float((probability >= SURE) == (question.caption == "own")),
        }
        for number, (question, probability) in enumerate(zip(questions, said, strict=True))
    ]
    file = write_items(setting.items_dir, NAME, items)
    return [
        mean_score(
            NAME,
            score,
            [item["hit"] for item in items if item["caption"] in ("own", wrong)
             and lang in ("", item["lang"])],
            lang=lang,
            chance=CHANCE,
            items=file,
            seed=setting.seed,
        )
        for score, wrong in KINDS.items()
        for lang in ("", *setting.languages)
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question:
    """Does this text belong to this picture?"""

    row: int
    """of the picture"""
    lang: str
    text: str
    caption: str
    """own, random or similar: what the text is to the picture"""


def _ask(
    model: Model,
    data: DataFolder,
    pairs: Pairs,
    lang: str,
    pictures: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[_Question]:
    """One for each picture and each of its three captions; a picture to which all captions belong
    has no wrong one, and is left out."""
    similarity = pictures[pairs.rows] @ embed_texts(model, pairs.texts).T  # [N, M]
    rows = np.flatnonzero(~pairs.right.all(axis=1))
    right = pairs.right[rows]
    drawn = rng.random(right.shape)
    chosen = {
        "own": np.where(right, drawn, -1).argmax(axis=1),
        "random": np.where(right, -1, drawn).argmax(axis=1),
        "similar": np.where(right, -np.inf, similarity[rows]).argmax(axis=1),
    }
    for caption, columns in chosen.items():
        for row, column in zip(pairs.rows[rows].tolist(), columns, strict=True):
            yield _Question(row=row, lang=lang, text=pairs.texts[column], caption=caption)


def _probabilities(model: Model, data: DataFolder, questions: Sequence[_Question]) -> list[float]:
    """Those about one picture are asked together, so that the model looks at it once."""
    shown, which = data.files
    order = sorted(range(len(questions)), key=lambda i: which[questions[i].row])
    batches = []
    for start in range(0, len(order), IMAGE_BATCH):
        asked = [questions[i] for i in order[start : start + IMAGE_BATCH]]
        pictures = [shown[which[question.row]] for question in asked]
        batches.append((pictures, [question.text for question in asked], TASK))
    said = np.empty(len(questions), np.float32)
    said[order] = np.concatenate(in_batches(model, "match", batches))
    return said.tolist()


SUITE = Suite(
    name=NAME,
    position=40,
    needs="match",
    data="any",
    asks="whether a caption belongs to an image: its own, a random one, the most similar one",
    metrics=(),
    run=run,
    whole=tuple(KINDS),
    each=tuple(KINDS),
    headlines=(
        Headline(kind="internvl_g", key="accuracy", label="names that belong or not, InternVL-G"),
    ),
)
