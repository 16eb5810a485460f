"""Captions: words and character n-grams shared with the true ones, and whether they are in the
language that was asked for.

A chat model describes composed scenes, whose caption follows from how they were made. A model that
only captions is shown single drawings, whose name and keywords are two references in each
language. In a pair set, both describe the pictures, and the captions are the references.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlfoundry.eval.compare.scores import Score, mean_score, write_items
from vlfoundry.eval.context import EvalContext, Model
from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder, Picture
from vlfoundry.eval.metrics import compute
from vlfoundry.eval.questions import (
    ask,
    best_constant,
    by_language,
    keep_scenes,
    nearest_answers,
    replies,
)
from vlfoundry.eval.suite import Headline, Suite
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.images.decode import Picture as Shown
from vlfoundry.infra.data.synthetic.scenes import caption_question

NAME = "caption"
MEASURES = ("token_f1", "chrf")
IN_LANGUAGE = "in_language"
BROKEN = "\ufffd"
"""what a part of a character is decoded to"""
MAX_NEW_TOKENS = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One picture to describe."""

    id: str
    """Unique inside the suite."""
    image: Shown
    """The picture, as it is stored or as it was composed."""
    lang: str
    """Language of the caption."""
    prompt: str
    """What the model is asked."""
    answer: str
    """The first reference: what a constant answer is chosen from."""
    references: tuple[str, ...]
    """All true captions."""
    near: str | None
    """Caption of the nearest training picture, if there is one."""
    picture: str
    """Id of the picture."""
    texts: Mapping[str, tuple[str, ...]]
    """Language -> what is rightly said of the picture in it."""


def run(model: Model, data: DataFolder, setting: EvalContext) -> list[Score]:
    """Token F1 and chrF over all languages and for each; chance is the best constant caption.

    `in_language`, where the set has several languages, is the share of captions that say something,
    without a word that the set has in its other languages alone (whichever of them are scored), and
    without a part of a character. A word that the set does not have counts for any language, so a
    small set tells little.
    """
    is_chat = model.kind.startswith("chat")
    if is_chat and isinstance(data, ConceptSet):
        tasks = _scene_tasks(data, setting)
    else:
        tasks = _picture_tasks(data, setting, is_chat)
    said = replies(model, [t.image for t in tasks], [t.prompt for t in tasks], MAX_NEW_TOKENS)
    references = [list(task.references) for task in tasks]
    values = {m: _values(m, said, references) for m in MEASURES}
    fits = _in_language(data, tasks, said)
    items = write_items(
        setting.items_dir,
        NAME,
        (
            {"id": t.id, "lang": t.lang, "prompt": t.prompt, "answer": list(t.references),
             "said": text, "picture": t.picture, **{m: values[m][i] for m in MEASURES},
             **({} if fits is None else {IN_LANGUAGE: fits[i]})}
            for i, (t, text) in enumerate(zip(tasks, said, strict=True))
        ),
    )  # fmt: skip
    scores = [score for m in MEASURES for score in _scores(m, values[m], tasks, items, setting)]
    if fits is None:
        return scores
    return scores + [
        mean_score(NAME, IN_LANGUAGE, fits[rows], lang=lang, items=items, seed=setting.seed)
        for lang, rows in by_language(tasks).items()
    ]


def _scores(
    measure: str, values: np.ndarray, tasks: Any, items: str, setting: EvalContext
) -> list[Score]:
    constant = best_constant(
        tasks, lambda answers, truths: _values(measure, answers, [[t] for t in truths]).tolist()
    )
    has_near = all(task.near is not None for task in tasks)
    references = [list(task.references) for task in tasks]
    near = _values(measure, [task.near for task in tasks], references) if has_near else None
    return [
        mean_score(
            NAME,
            measure,
            values[rows],
            lang=lang,
            chance=float(constant[rows].mean()),
            reference=None if near is None else float(near[rows].mean()),
            items=items,
            seed=setting.seed,
        )
        for lang, rows in by_language(tasks).items()
    ]


def _in_language(data: DataFolder, tasks: Sequence[Task], said: Sequence[str]) -> np.ndarray | None:
    """1 for each text that is in its task's language, as far as the words of the set can tell; None
    where it has one language."""
    from vlfoundry.eval.metrics.token_f1.token_f1 import tokens

    if len(data.languages) < 2:
        return None
    words = {lang: {word for text in _texts(data, lang) for word in tokens(text)}
             for lang in data.languages}  # fmt: skip
    for task in tasks:
        for lang, texts in task.texts.items():
            words[lang].update(word for text in texts for word in tokens(text))

    def fits(task: Task, text: str) -> bool:
        found = set(tokens(text)) - words[task.lang]
        elsewhere = any(found & known for lang, known in words.items() if lang != task.lang)
        return bool(tokens(text)) and BROKEN not in text and not elsewhere

    return np.array([float(fits(*pair)) for pair in zip(tasks, said, strict=True)])


def _texts(data: DataFolder, lang: str) -> Iterator[str]:
    """All that the set says in a language."""
    if not isinstance(data, ConceptSet):
        yield from (text for p in data.pictures for tag, text in p.captions if tag == lang)
        return
    for concept in data.concepts.values():
        yield from concept.keywords.get(lang, ())
        if lang in concept.names:
            yield concept.names[lang]


def _values(measure: str, answers: Any, references: Any) -> np.ndarray:
    result = compute(measure, predictions=list(answers), references=list(references))
    return np.array(result["per_item"])


def _scene_tasks(data: ConceptSet, setting: EvalContext) -> list[Task]:
    questions = ask(
        data, NAME, languages=setting.languages, count=setting.scenes, seed=setting.seed
    )
    keep_scenes(setting.items_dir, questions)
    near = nearest_answers(questions, NAME, setting)
    return [
        Task(
            id=q.id,
            image=q.image,
            lang=q.lang,
            prompt=q.prompt,
            answer=q.answer,
            references=(q.answer,),
            near=near[i].answers[q.lang] if near else None,
            picture=q.picture,
            texts={lang: (text,) for lang, text in q.answers.items()},
        )
        for i, q in enumerate(questions)
    ]


def _picture_tasks(data: DataFolder, setting: EvalContext, is_chat: bool) -> list[Task]:
    rng = np.random.default_rng([setting.seed, len(data)])
    pool = [
        (index, lang, texts)
        for index in rng.permutation(len(data)).tolist()
        for lang in setting.languages
        if (texts := _true_captions(data, data.pictures[index], lang))
    ]
    if not pool:
        raise DataError(f"{data.folder}: no picture has a caption in {list(setting.languages)}")
    chosen = pool[: setting.scenes]
    pictures = [data.pictures[index] for index, _, _ in chosen]
    near = _nearest_names(data, setting)
    return [
        Task(
            id=f"{NAME}-{row:03d}",
            image=pictures[row].encoded,
            lang=lang,
            prompt=_prompt(lang, is_chat),
            answer=texts[0],
            references=texts,
            near=near[index].get(lang) if near else None,
            picture=pictures[row].id,
            texts={lang: texts},
        )
        for row, (index, lang, texts) in enumerate(chosen)
    ]


def _true_captions(data: DataFolder, picture: Picture, lang: str) -> tuple[str, ...]:
    if not isinstance(data, ConceptSet):
        return tuple(text for tag, text in picture.captions if tag == lang)
    concept = data.concepts[picture.concept]
    if lang not in concept.names:
        return ()
    keywords = ", ".join(concept.keywords.get(lang, ()))
    return (concept.names[lang], keywords) if keywords else (concept.names[lang],)


def _nearest_names(data: DataFolder, setting: EvalContext) -> list[dict[str, str]]:
    """Names of the nearest training picture of each picture; [] without training pictures."""
    if setting.nearest is None or not isinstance(data, ConceptSet):
        return []
    concepts = setting.nearest.concepts
    best = setting.nearest.scores(concepts).argmax(axis=1)
    return [data.concepts[concepts[index]].names for index in best]


def _prompt(lang: str, is_chat: bool) -> str:
    """How a model is asked for a caption of a single picture."""
    if is_chat:
        return caption_question(lang)
    from vlfoundry.models.internvl.prompts import caption_prompt

    return caption_prompt(lang)


SUITE = Suite(
    name=NAME,
    position=50,
    needs="generate",
    data="any",
    asks="for a caption in a language (`caption_question` of a chat model, else `caption_prompt`)",
    metrics=MEASURES,
    run=run,
    whole=(*MEASURES, IN_LANGUAGE),
    each=(*MEASURES, IN_LANGUAGE),
    headlines=(
        Headline(kind="chat_full", key="token_f1", label="words of captions of scenes, chat full"),
    ),
)
