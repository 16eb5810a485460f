"""Does this text belong to this picture? Image-text matching, as stage 2 trains it.

In each language a picture is shown with its own caption and with a wrong one; in a concept set
captions are names. Letters: N pictures, M distinct captions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eval.datasets import DataFolder
from eval.embedding import IMAGE_BATCH, Model, Setting, embed_pictures, embed_texts, in_batches
from eval.pairing import Pairs, name_captions, pair_up
from eval.scores import Score, mean_score, write_items

NAME = "matching"
TASK = "retrieval"
"""whose view of an oblong picture is taken (models.sight)"""
CHANCE = 0.5
"""of any constant answer: half of the texts are right"""
SURE = 0.5
"""from this probability on the answer is yes"""
KINDS = {"accuracy": "random", "hard_accuracy": "similar"}
"""score -> the wrong captions that it is about"""


def run(model: Model, data: DataFolder, setting: Setting) -> list[Score]:
    """Accuracy with wrong captions drawn at random, and with those that the model's embeddings find
    most similar to the picture (`hard_accuracy`): over all languages, and for each.

    Right and wrong captions count the same, so a constant answer reaches one half.
    """
    pictures = embed_pictures(model, data, TASK)
    rng = np.random.default_rng([setting.seed, len(data)])
    items = [
        item
        for lang in setting.languages
        for item in _ask(model, data, pair_up(data, lang, name_captions), lang, pictures, rng)
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


def _ask(
    model: Model,
    data: DataFolder,
    pairs: Pairs,
    lang: str,
    pictures: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    """An item for each picture and each of its three captions; a picture to which all captions
    belong has no wrong one, and is left out."""
    similarity = pictures[pairs.rows] @ embed_texts(model, pairs.texts).T  # [N, M]
    rows = np.flatnonzero(~pairs.right.all(axis=1))
    right = pairs.right[rows]
    drawn = rng.random(right.shape)
    chosen = {
        "own": np.where(right, drawn, -1).argmax(axis=1),
        "random": np.where(right, -1, drawn).argmax(axis=1),
        "similar": np.where(right, -np.inf, similarity[rows]).argmax(axis=1),
    }
    shown = [data.pictures[index] for index in pairs.rows[rows]]
    for caption, columns in chosen.items():
        texts = [pairs.texts[column] for column in columns]
        said = _probabilities(model, [picture.encoded for picture in shown], texts)
        for picture, text, probability in zip(shown, texts, said.tolist(), strict=True):
            yield {
                "picture": picture.id,
                "lang": lang,
                "text": text,
                "caption": caption,
                "probability": probability,
                "hit": float((probability >= SURE) == (caption == "own")),
            }


def _probabilities(model: Model, pictures: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
    starts = range(0, len(texts), IMAGE_BATCH)
    batches = [(pictures[i : i + IMAGE_BATCH], texts[i : i + IMAGE_BATCH], TASK) for i in starts]
    return np.concatenate(in_batches(model, "match", batches))
