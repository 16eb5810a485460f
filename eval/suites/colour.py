"""What colour is the background of a composed scene? Asked and answered in several languages."""

from typing import Any

import numpy as np

from vlfoundry.eval.compare.scores import Score, mean_score, write_items
from vlfoundry.eval.context import EvalContext, Model
from vlfoundry.eval.datasets.folders import DataFolder
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
from vlfoundry.infra.data.synthetic.scenes import answer_words

NAME = "colour"
MAX_NEW_TOKENS = 12


def run(model: Model, data: DataFolder, setting: EvalContext) -> list[Score]:
    """Exact match over all languages and for each; chance is the best constant answer.

    `in_words` is the share of replies that are a colour word of the language at all: one that is
    not counts as wrong and is reported, never dropped.
    """
    questions = ask(
        data, NAME, languages=setting.languages, count=setting.scenes, seed=setting.seed
    )
    keep_scenes(setting.items_dir, questions)
    said = replies(
        model, [q.image for q in questions], [q.prompt for q in questions], MAX_NEW_TOKENS
    )
    hits = np.array(_match(said, [q.answer for q in questions]))
    known = compute(
        "exact_match",
        predictions=said,
        references=[list(answer_words(NAME, q.lang)) for q in questions],
    )["per_item"]
    constant = best_constant(questions, _match)
    near = nearest_answers(questions, NAME, setting)
    reference = _match(
        [n.answers[q.lang] for n, q in zip(near, questions, strict=False)],
        [q.answer for q in questions[: len(near)]],
    )
    items = write_items(
        setting.items_dir,
        NAME,
        (
            {"id": q.id, "lang": q.lang, "prompt": q.prompt, "answer": q.answer, "said": text,
             "right": hits[i], "in_words": known[i], "picture": q.picture}
            for i, (q, text) in enumerate(zip(questions, said, strict=True))
        ),
    )  # fmt: skip
    scores = [
        mean_score(
            NAME,
            "accuracy",
            hits[rows],
            lang=lang,
            chance=float(constant[rows].mean()),
            reference=float(np.array(reference)[rows].mean()) if near else None,
            items=items,
            seed=setting.seed,
        )
        for lang, rows in by_language(questions).items()
    ]
    return [*scores, mean_score(NAME, "in_words", known, items=items, seed=setting.seed)]


def _match(answers: Any, truths: Any) -> list[float]:
    if not answers:
        return []
    references = [[truth] for truth in truths]
    return compute("exact_match", predictions=list(answers), references=references)["per_item"]


SUITE = Suite(
    name=NAME,
    position=60,
    needs="chat",
    data="concepts",
    asks="what colour the background of a composed scene is, in each language (`scenes.json`)",
    metrics=("exact_match",),
    run=run,
    whole=("accuracy", "in_words"),
    each=("accuracy",),
    opened=True,
    headlines=(
        Headline(kind="chat_simple", key="accuracy", label="colour questions, chat simple"),
        Headline(kind="chat_full", key="accuracy", label="colour questions, chat full"),
    ),
)
