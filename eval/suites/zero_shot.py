"""Zero-shot classification: every picture against the names of all classes of the set.

Letters: N pictures, C classes, D embedding width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlfoundry.eval.compare.scores import ENSEMBLE, Score, mean_score, write_items
from vlfoundry.eval.context import EvalContext, Model, embed_pictures, embed_texts, unit
from vlfoundry.eval.datasets.folders import Concept, ConceptSet, DataFolder, PairSet
from vlfoundry.eval.metrics import compute
from vlfoundry.eval.metrics.ranking import best_rank, chance_at, top_candidates
from vlfoundry.eval.suite import Headline, Suite
from vlfoundry.infra.core.errors import DataError

NAME = "zero_shot"
CUTS = (1, 5)
TEMPLATES = ("{name}",)


def run(
    model: Model, data: DataFolder, setting: EvalContext, *, templates: Sequence[str] = TEMPLATES
) -> list[Score]:
    """Top-1 and top-5 for each language and for the mean of the languages' class vectors.

    All classes are candidates. Pictures that are the same for two concepts, and concepts that bear
    the same name in the language, accept either answer. Where some concepts were held out from
    training, seen and held-out ones are also scored apart, among the same candidates.
    Raises DataError where there is nothing to classify.
    """
    named = as_concept_set(data)
    languages = setting.languages if isinstance(data, ConceptSet) else ("",)
    pictures = embed_pictures(model, named, NAME)
    vectors = {lang: _class_vectors(model, named, lang, templates) for lang in languages}
    scores = []
    for lang, by_class in vectors.items():
        names = {c: named.concepts[c].names[lang] for c in by_class}
        scores += _score(named, setting, lang, pictures, by_class, names)
    if len(languages) > 1:
        every: dict[str, list[np.ndarray]] = {}
        for by_class in vectors.values():
            for concept, vector in by_class.items():
                every.setdefault(concept, []).append(vector)
        means = {c: unit(np.mean(every[c], axis=0)) for c in sorted(every)}
        scores += _score(named, setting, ENSEMBLE, pictures, means, {})
    return scores


def as_concept_set(data: DataFolder) -> ConceptSet:
    """A pair set with labels as a concept set: each label is a class, named by itself."""
    if isinstance(data, ConceptSet):
        return data
    assert isinstance(data, PairSet)
    import dataclasses

    classes = sorted({picture.label for picture in data.pictures} - {""})
    if len(classes) < 2:
        raise DataError(
            f"{data.folder}: zero_shot needs classes, and this pair set has {len(classes)} labels; "
            "expected a column `label` with at least two, or a concept set; retrieval needs none"
        )
    without = [picture for picture in data.pictures if not picture.label]
    if without:
        raise DataError(
            f"{data.folder}/{without[0].source}.parquet, row {without[0].row}: label is empty or "
            f"missing, as in {len(without)} of {len(data)} rows; zero_shot needs one in each row: "
            "fill them in, or leave these rows out"
        )
    labelled = [dataclasses.replace(p, concept=p.label) for p in data.pictures]
    concepts = {c: Concept(concept=c, names={"": c}, keywords={}) for c in classes}
    return ConceptSet(data.folder, labelled, concepts)


def accepted_answers(data: ConceptSet, classes: Sequence[str], names: dict[str, str]) -> np.ndarray:
    """Which answers are right: bool [N, C].

    Its own class, the classes of pictures that look the same, and classes of the same name.
    """
    column = {concept: index for index, concept in enumerate(classes)}
    by_look: dict[int, set[int]] = {}
    for look, picture in zip(data.look, data.pictures, strict=True):
        if picture.concept in column:
            by_look.setdefault(int(look), set()).add(column[picture.concept])
    by_name: dict[str, set[int]] = {}
    for concept, name in names.items():
        by_name.setdefault(name, set()).add(column[concept])
    right = np.zeros((len(data), len(classes)), bool)
    for row, look in enumerate(data.look):
        for index in by_look.get(int(look), ()):
            same = by_name.get(names.get(classes[index], ""), {index})
            right[row, sorted(same | {index})] = True
    return right


def _class_vectors(
    model: Model, data: ConceptSet, lang: str, templates: Sequence[str]
) -> dict[str, np.ndarray]:
    classes = data.classes(lang) if lang else data.drawn
    if not classes:
        raise DataError(f"{data.folder}: no drawn concept has a name in {lang!r}")
    names = [data.concepts[concept].names[lang] for concept in classes]
    if len(set(names)) < 2:
        raise DataError(
            f"{data.folder}: zero_shot needs two names to choose from, and all {len(names)} "
            f"concepts are called {names[0]!r}{f' in {lang!r}' if lang else ''}"
        )
    prompts = [template.format(name=name) for template in templates for name in names]
    by_template = embed_texts(model, prompts).reshape(len(templates), len(classes), -1)
    return dict(zip(classes, unit(by_template.mean(axis=0)), strict=True))


def _score(
    data: ConceptSet,
    setting: EvalContext,
    lang: str,
    pictures: np.ndarray,
    by_class: dict[str, np.ndarray],
    names: dict[str, str],
) -> list[Score]:
    classes = list(by_class)
    right = accepted_answers(data, classes, names)
    known = np.flatnonzero(right.any(axis=1))  # pictures whose concept has a name here
    right = right[known]
    logits = pictures[known] @ np.stack([by_class[concept] for concept in classes]).T  # [N, C]
    guesses = top_candidates(logits, right, max(CUTS))
    hits = _hits(guesses, right)
    nearest = _reference_hits(setting, classes, right, known)
    held_out = np.array([data.pictures[i].concept in setting.held_out for i in known])
    items = write_items(
        setting.items_dir,
        f"{NAME}_{lang or 'labels'}",
        _items(data, classes, known, guesses, best_rank(logits, right), hits, held_out),
    )
    parts = {"": np.ones(len(known), bool)}
    if held_out.any() and not held_out.all():
        parts |= {"_seen": ~held_out, "_held_out": held_out}
    return [
        mean_score(
            NAME,
            f"top{cut}{suffix}",
            hits[cut][part],
            lang=lang,
            chance=chance_at(cut, right[part].sum(axis=1), len(classes)),
            reference=None if nearest is None else float(nearest[cut][part].mean()),
            items=items,
            seed=setting.seed,
        )
        for suffix, part in parts.items()
        for cut in CUTS
    ]


def _hits(guesses: np.ndarray, right: np.ndarray) -> dict[int, np.ndarray]:
    result = compute(
        "topk_accuracy",
        predictions=guesses.tolist(),
        references=[np.flatnonzero(row).tolist() for row in right],
        k=CUTS,
    )
    return {cut: np.array(result["per_item"][cut]) for cut in CUTS}


def _reference_hits(
    setting: EvalContext, classes: Sequence[str], right: np.ndarray, known: np.ndarray
) -> dict[int, np.ndarray] | None:
    if setting.nearest is None:
        return None
    ranks = best_rank(setting.nearest.scores(classes)[known], right)
    return {cut: (ranks <= cut).astype(float) for cut in CUTS}


def _items(
    data: ConceptSet,
    classes: Sequence[str],
    known: Any,
    guesses: Any,
    ranks: Any,
    hits: Any,
    held_out: Any,
):
    for row, index in enumerate(known):
        picture = data.pictures[index]
        yield {
            "id": picture.id,
            "concept": picture.concept,
            "guesses": [classes[guess] for guess in guesses[row]],
            "rank": int(ranks[row]),
            "held_out": bool(held_out[row]),
            **{f"top{cut}": hits[cut][row] for cut in CUTS},
        }


SUITE = Suite(
    name=NAME,
    position=10,
    needs="embed",
    data="any",
    asks="which of the classes' names an image is nearest to",
    metrics=("topk_accuracy",),
    run=run,
    each=tuple(f"top{cut}{part}" for part in ("", "_seen", "_held_out") for cut in CUTS),
    ensemble=True,
    labels=True,
    opened=True,
    headlines=(
        Headline(
            kind="internvl_c", key="top1/ensemble", label="zero-shot top-1, five languages together"
        ),
        Headline(
            kind="internvl_c", key="top5/ensemble", label="zero-shot top-5, five languages together"
        ),
    ),
)
