"""Runs suites on a model and a folder: for the command line and for the pipeline's stage."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.eval.compare.scores import Score, score_line, write_scores
from vlfoundry.eval.context import EvalContext, Model
from vlfoundry.eval.datasets.folders import (
    ConceptSet,
    DataFolder,
    PairSet,
    check_choices,
    read_concept_set,
    read_folder,
    refuse_missing_languages,
)
from vlfoundry.eval.ranks import Team, run_team
from vlfoundry.eval.reference import NearestPicture
from vlfoundry.eval.suite import Suite
from vlfoundry.eval.suites import suite, suites, why_not, why_not_kind
from vlfoundry.infra.core.errors import DataError, ModelError
from vlfoundry.infra.core.files import cannot_write, require_writable, require_writable_folder
from vlfoundry.models.internvl.config import CAPABILITIES
from vlfoundry.models.internvl.folder import check_shapes, read_config

LANGUAGES = ("en", "zh", "ja", "ar", "it")
SCENES = 250


def evaluate_folder(
    model_ref: str | Path,
    data_dir: str | Path,
    suite_name: str,
    json_out: str | Path,
    *,
    languages: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    train_sources: Sequence[str] | None = None,
    seed: int = 0,
    scenes: int = SCENES,
    log: Callable[[str], None] = print,
) -> list[Score]:
    """Score one model on any folder in one of the two formats, and write the score file.

    model_ref: a registered name, a checkpoint folder or an exported folder.
    languages: default are the five of the embedded data as far as the folder has them, else all
    that it has. sources: stems of the Parquet files under test, default all; train_sources: stems
    of those that references and probes may learn from.
    It runs where training runs, over the ranks of the launcher profile (`eval.ranks`).
    The items lie beside the score file, in `<its stem>.items/`.
    Raises DataError or ModelError for what cannot be read or done.
    """
    from vlfoundry.infra.registry.gto import resolve_model

    asked = suite(suite_name)
    out = Path(json_out)
    require_writable(out, "the scores")
    items = out.parent / f"{out.stem}.items"
    require_writable_folder(items, "the items")
    folder = resolve_model(str(model_ref))
    _check_model(folder, suite_name)
    check_choices(data_dir, sources=sources, train_sources=train_sources, languages=languages)
    data = read_folder(data_dir, sources=sources)
    if isinstance(data, PairSet) and asked.labels:
        for line in data.told:
            log(f"labels: {line}")
    train = read_concept_set(data_dir, sources=train_sources) if train_sources else None
    setting = EvalContext(
        languages=choose_languages(data, languages, asked, log),
        seed=seed,
        items_dir=items,
        train=train,
        nearest=_nearest(train, data),
        scenes=scenes,
    )

    def work(team: Team) -> tuple[list[Score], dict[str, Any]]:
        model = team.load(folder)
        reason = why_not(model, suite_name)
        if reason:
            raise ModelError(reason)
        return asked.run(model, data, setting), model_facts(model, folder)

    scores, facts = run_team(work)
    try:
        write_scores(out, scores, model=facts, data=data.facts())
    except OSError as error:
        for score in scores:
            log(score_line(score))
        raise cannot_write(out, "the scores", error) from error
    log(f"{suite_name}: {len(scores)} scores on {len(data)} pictures of {data.folder} -> {out}")
    return scores


def _check_model(folder: Path, suite_name: str) -> None:
    """Raises ModelError for a folder that is no whole model, or of a kind that has no such scores;
    before PyTorch is imported."""
    kind, config = read_config(folder)
    check_shapes(folder, kind, config)
    reason = why_not_kind(kind, CAPABILITIES[kind], suite_name)
    if reason:
        raise ModelError(reason)


def score_model(
    model: Model,
    data: DataFolder,
    setting: EvalContext,
    *,
    chosen: Sequence[str] | None = None,
    log: Callable[[str], None] = print,
) -> tuple[list[Score], dict[str, str]]:
    """All scores of the chosen suites (None: of all) that the model can do, and the reason for each
    that it cannot."""
    scores: list[Score] = []
    not_applicable: dict[str, str] = {}
    for name in suites() if chosen is None else chosen:
        reason = why_not(model, name)
        if reason:
            not_applicable[name] = reason
            continue
        found = suite(name).run(model, data, setting)
        log(f"{name}: {found[0].name} {found[0].lang} {found[0].value:.3f} (n {found[0].n})")
        scores += found
    return scores, not_applicable


def choose_languages(
    data: DataFolder,
    asked: Sequence[str] | None,
    suite: Suite | None = None,
    log: Callable[[str], None] = print,
) -> tuple[str, ...]:
    """The languages to score. Raises DataError for one that was asked for and is not there."""
    if suite and suite.labels and isinstance(data, PairSet):
        return ()  # classes are labels, which have no language
    available = data.languages
    if asked:
        refuse_missing_languages(data.folder, asked, available)
        chosen = tuple(dict.fromkeys(asked))
        _tell_of_gaps(data, chosen, log)
        return chosen
    chosen = tuple(lang for lang in LANGUAGES if lang in available) or tuple(sorted(available))
    if not chosen:
        raise DataError(f"{data.folder} has no text in any language, so there is nothing to score")
    left_out = [lang for lang in LANGUAGES if lang not in chosen]
    if left_out:
        log(f"{data.folder} has nothing in {left_out}; scoring {list(chosen)}")
    _tell_of_gaps(data, chosen, log)
    return chosen


def _tell_of_gaps(data: DataFolder, languages: Sequence[str], log: Callable[[str], None]) -> None:
    """Say of each language how many pictures of a pair set have no caption in it."""
    if not isinstance(data, PairSet):
        return
    for lang in languages:
        without = sum(lang not in dict(picture.captions) for picture in data.pictures)
        if without:
            log(
                f"{data.folder}: {without} of {len(data)} pictures have no caption in {lang!r}, "
                "and are left out where one is needed"
            )


def model_facts(model: Model, folder: Path) -> dict[str, Any]:
    """What a score file says of its model."""
    from vlfoundry.infra.core.fingerprint import fingerprint

    return {"kind": model.kind, "fingerprint": fingerprint(folder), "folder": folder.as_posix()}


def _nearest(train: ConceptSet | None, data: DataFolder) -> NearestPicture | None:
    if train is None or not isinstance(data, ConceptSet):
        return None
    shared = sorted(set(train.sources) & set(data.sources))
    if shared:
        raise DataError(
            f"the sources {shared} are both under test and training sources: a picture would be "
            "its own reference; choose the sources under test, e.g. --source twemoji"
        )
    return NearestPicture(train, data)
