"""Questions on composed scenes, whose answers are known because we made the scenes.

The scenes show drawings of the set under test, so a model cannot have seen them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from vlfoundry.eval.context import EvalContext, Model, in_batches
from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder, Picture
from vlfoundry.eval.reference import squared_distances
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.data.images.decode import Picture as Shown
from vlfoundry.infra.data.synthetic.scenes import Drawing, compose, conversation

SCENE_PX = 64
BATCH = 50
TRAINING_SCENES: int = 500
KINDS = ("colour", "box", "caption")
SCENES_KEPT = 24


class InLanguage(Protocol):
    """Something that is asked in a language."""

    @property
    def lang(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its scene and its true answer."""

    id: str
    """Unique inside the suite, e.g. colour-017."""
    image: np.ndarray
    """uint8 [S, S, 3]."""
    lang: str
    """Language of question and answer."""
    prompt: str
    """The question."""
    answer: str
    """The true answer."""
    answers: dict[str, str]
    """The true answer of the same scene in every language."""
    picture: str
    """Id of the drawing that the scene shows."""
    box: tuple[int, int, int, int]
    """Where the drawing is: x1, y1, x2, y2 in 0..1000."""


def ask(
    data: DataFolder, kind: str, *, languages: Sequence[str], count: int, seed: int
) -> list[Question]:
    """`count` questions of one kind, the languages in turn, one drawing in each scene.

    Question i depends on (seed, kind, i) and the set alone, so that all models get the same ones.
    Raises DataError if the set has no drawing with a name in each language.
    """
    usable = _usable(data, tuple(languages))
    questions = []
    for index in range(count):
        rng = np.random.default_rng([seed, KINDS.index(kind), index])
        picture, drawing = usable[int(rng.integers(len(usable)))]
        scene = compose(rng, [drawing], SCENE_PX)
        turns = {
            lang: conversation(scene, kind, lang, {drawing.concept: drawing.names[lang]})
            for lang in languages
        }
        lang = languages[index % len(languages)]
        questions.append(
            Question(
                id=f"{kind}-{index:03d}",
                image=scene.image,
                lang=lang,
                prompt=turns[lang][0],
                answer=turns[lang][1],
                answers={tag: turn[1] for tag, turn in turns.items()},
                picture=picture.id,
                box=scene.objects[0][1],
            )
        )
    return questions


def replies(
    model: Model, images: Sequence[Shown], prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """The model's answers, a batch at a time."""
    parts = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
    batches = [(images[part], prompts[part], max_new_tokens) for part in parts]
    answers = [text for texts in in_batches(model, "generate", batches) for text in texts]
    assert len(answers) == len(prompts), "a model answers every prompt"
    return answers


def keep_scenes(items_dir: Path, questions: Sequence[Question]) -> None:
    """Write the first scenes as pictures beside the items, for whoever reads the answers."""
    from PIL import Image

    folder = items_dir / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    for question in questions[:SCENES_KEPT]:
        Image.fromarray(question.image).save(folder / f"{question.id}.png")


def nearest_answers(
    questions: Sequence[Question], kind: str, setting: EvalContext
) -> list[Question]:
    """For each question, the most similar scene made of training drawings; [] without training.

    Its answer (in the question's language) is what a reference without learning would say.
    """
    if setting.train is None:
        return []
    from vlfoundry.infra.data.images.bulk import hog_features

    known = ask(
        setting.train,
        kind,
        languages=setting.languages,
        count=TRAINING_SCENES,
        seed=stream_seed(setting.seed, Stream.REFERENCE),
    )
    distances = squared_distances(
        hog_features(np.stack([q.image for q in questions])),
        hog_features(np.stack([q.image for q in known])),
    )
    return [known[index] for index in distances.argmin(axis=1)]


def by_language(questions: Sequence[InLanguage]) -> dict[str, np.ndarray]:
    """Indices of the questions: of all under "", and of each language, if there are several."""
    langs = np.array([question.lang for question in questions])
    parts = {"": np.arange(len(questions))}
    distinct = list(dict.fromkeys(langs.tolist()))
    if len(distinct) > 1:
        parts |= {lang: np.flatnonzero(langs == lang) for lang in distinct}
    return parts


def best_constant(
    questions: Sequence[Question], value: Callable[[Sequence[str], Sequence[str]], list[float]]
) -> np.ndarray:
    """Per question, what the best constant answer of its language is worth: float [Q].

    `value(answers, truths)` gives the worth of each answer. Of each language's true answers the
    one with the highest mean is chosen: an upper bound of what answering without looking reaches.
    """
    worth = np.zeros(len(questions))
    langs = {question.lang for question in questions}
    for lang in sorted(langs):
        rows = [i for i, question in enumerate(questions) if question.lang == lang]
        truths = [questions[i].answer for i in rows]
        candidates = sorted(set(truths))
        flat = value(
            [candidate for candidate in candidates for _ in truths], truths * len(candidates)
        )
        table = np.array(flat).reshape(len(candidates), len(truths))
        worth[rows] = table[table.mean(axis=1).argmax()]
    return worth


@lru_cache(maxsize=2)  # the sets under test and of training, for every suite and the control
def _usable(data: DataFolder, languages: tuple[str, ...]) -> list[tuple[Picture, Drawing]]:
    if not isinstance(data, ConceptSet):
        raise DataError(
            f"{data.folder} is a {data.kind}; questions on scenes need drawings with names, "
            "that is a concept set"
        )
    named = [
        picture
        for picture in data.pictures
        if all(lang in data.concepts[picture.concept].names for lang in languages)
    ]
    if not named:
        raise DataError(f"{data.folder}: no drawing has a name in each of {list(languages)}")
    pixels = ConceptSet(data.folder, named, data.concepts).squares(SCENE_PX, keep_alpha=True)
    # a drawing without solid pixels at the smallest size in a scene has no box to ask for
    solid = (pixels[..., 3] >= 250).sum(axis=(1, 2)) >= 64
    return [
        (p, Drawing(concept=p.concept, rgba=rgba, names=data.concepts[p.concept].names))
        for p, rgba, is_solid in zip(named, pixels, solid, strict=True)
        if is_solid
    ]
