"""Score one model on drawings that training never saw, beside its untrained twin and its baseline.

The twin has the same configuration and fresh random weights: what it reaches is what the task gives
away for nothing. A baseline is an earlier model, say the champion, on the very same items: its old
scores would be of other classes and drawings. Every suite that the model's kind can do is run; the
others are listed with the reason.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlfoundry.eval.compare.scores import headline, with_baseline, with_untrained, write_scores
from vlfoundry.eval.context import EvalContext
from vlfoundry.eval.datasets.folders import ConceptSet, read_concept_set
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.eval.ranks import Team, run_team
from vlfoundry.eval.reference import NearestPicture
from vlfoundry.eval.runner import choose_languages, model_facts, score_model
from vlfoundry.eval.suites import suites
from vlfoundry.infra.core.config import check_languages
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Stage, check_folder, main, read_origin
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.core.tables import read_table
from vlfoundry.infra.registry.gto import model_kind

DATA = "data"
CLASSES = "artifacts/ingest/classes.parquet"
RECORDS = "artifacts/ingest/records.parquet"
METRICS = "artifacts/evaluate/{variant}/metrics.json"
ARTWORK = ("emojitwo", "fluent", "fluent_flat", "fxemoji", "noto", "noto_v1", "twemoji")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and on what."""

    test_source: str = "twemoji"
    """Artwork file under test; training must not have read it."""
    suites: tuple[str, ...] = field(default_factory=lambda: tuple(suites()))
    """Suites to run as far as the model's kind allows."""
    scenes: int = 200
    """Questions of each kind on composed scenes."""
    baseline: dict[str, str] = field(default_factory=dict)
    """Model -> folder of an earlier one to compare it with; its own folder stands for none."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.suites) - set(suites()))
        if unknown:
            raise ConfigError(
                f"evaluate.suites: unknown suites {unknown}; choose from {list(suites())}"
            )
        strange = sorted(set(self.baseline) - set(OUTPUTS))
        if strange:
            raise ConfigError(
                f"evaluate.baseline: unknown models {strange}; choose from {list(OUTPUTS)}"
            )
        for name, folder in self.baseline.items():
            check_folder(f"evaluate.baseline.{name}", folder)
        if self.scenes < 1:
            raise ConfigError(f"evaluate.scenes is {self.scenes}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `evaluate` reads from params.yaml."""

    seed: int
    """Seed of scenes, intervals and the untrained twin."""
    languages: tuple[str, ...]
    """Languages to score."""
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        check_languages(self.languages)


def baseline_of(config: Config, variant: str | None) -> tuple[str, ...]:
    """The folder of the variant's baseline, if it has one."""
    assert variant
    own = OUTPUTS[variant].folder
    folder = config.evaluate.baseline.get(variant, own)
    return () if folder == own else (folder,)


def run(config: Config, context: Context) -> None:
    """Score the trained model, its twin and its baseline; write the scores, and the items of the
    first and the last."""
    assert context.variant
    folder = f"artifacts/evaluate/{context.variant}"
    data, train, held_out = read_sets(config, context)
    languages = choose_languages(data, config.languages)
    context.log(
        f"{len(data)} drawings of {config.evaluate.test_source}, {len(data.drawn)} classes, "
        f"{len(held_out)} of them held out; {len(train)} training drawings as reference"
    )
    nearest = NearestPicture(train, data)
    made = context.path(OUTPUTS[context.variant].folder)
    items = context.output(f"{folder}/items")
    runs: list[tuple[str, Path, int | None, Path]] = [
        ("trained", made, None, items),
        ("untrained", made, stream_seed(config.seed, Stream.UNTRAINED), context.work / "items"),
    ]
    baseline = baseline_of(config, context.variant)
    for path in baseline:
        kind = model_kind(context.path(path))
        if kind != OUTPUTS[context.variant].kind:
            raise ConfigError(
                f"evaluate.baseline.{context.variant} is {path}, a model of kind {kind}; expected "
                "one of the same kind, for others get other questions"
            )
    runs += [("baseline", context.path(path), None, items / "baseline") for path in baseline]

    def work(team: Team) -> tuple[dict[str, Any], dict[str, Any]]:
        results, facts = {}, {}
        with Progress(len(runs), unit="models", label=f"evaluate {context.variant}") as progress:
            for name, model_folder, seed, kept in runs:
                model = team.load(model_folder, untrained_seed=seed)
                shutil.rmtree(kept, ignore_errors=True)  # no item of an earlier run may stay
                setting = EvalContext(
                    languages=languages,
                    seed=config.seed,
                    items_dir=kept,
                    train=train,
                    nearest=nearest,
                    held_out=held_out,
                    scenes=config.evaluate.scenes,
                )
                context.log(f"{name} {model.kind}")
                results[name] = score_model(
                    model, data, setting, chosen=config.evaluate.suites, log=context.log
                )
                facts[name] = model_facts(model, model_folder)
                progress.update()
        return results, facts

    results, facts = run_team(work)
    scores, not_applicable = results["trained"]
    scores = with_untrained(scores, results["untrained"][0])
    if baseline:
        scores = with_baseline(scores, results["baseline"][0])
    write_scores(
        context.output(f"{folder}/scores.json"),
        scores,
        model={**facts["trained"], "folder": OUTPUTS[context.variant].folder},
        data=data.facts(),
        not_applicable=not_applicable,
        baseline=_named(context, baseline[0], facts["baseline"]) if baseline else None,
    )
    context.write_json(
        METRICS.format(variant=context.variant), {str(context.variant): headline(scores)}
    )


def _named(context: Context, folder: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a baseline, with the name that people know it by."""
    origin = read_origin(context.path(folder)) or {}
    return {**facts, "folder": folder, "name": origin.get("ref", folder)}


def read_sets(config: Config, context: Context) -> tuple[ConceptSet, ConceptSet, frozenset[str]]:
    """Drawings under test, drawings that training saw, and the held-out concepts.

    Raises ConfigError if training read the source under test.
    """
    test_source = config.evaluate.test_source
    sources = sorted(set(read_table(context.path(RECORDS), ["source"])["source"].to_pylist()))
    if test_source in sources:
        raise ConfigError(
            f"evaluate.test_source {test_source!r} is among the sources that training read "
            f"({sources}); choose another, or take it out of ingest.train_sources"
        )
    classes = read_table(context.path(CLASSES), ["concept", "split"]).to_pylist()
    held_out = frozenset(row["concept"] for row in classes if row["split"] == "held_out")
    known = {row["concept"] for row in classes}
    data = read_concept_set(context.path(DATA), sources=[test_source])
    train = read_concept_set(context.path(DATA), sources=sources)
    return data.only(known), train.only(known - held_out), held_out


STAGE = Stage(
    name="evaluate",
    config=Config,
    inputs=(
        f"{DATA}/concepts.parquet",
        *(f"{DATA}/{name}.parquet" for name in ARTWORK),
        CLASSES,
        RECORDS,
    ),
    outputs=(
        "artifacts/evaluate/{variant}/scores.json",
        "artifacts/evaluate/{variant}/items",
        METRICS,
    ),
    metrics=(METRICS,),
    run=run,
    timeout_s=3600,
    variants=tuple(OUTPUTS),
    variant_inputs={name: (output.folder,) for name, output in OUTPUTS.items()},
    start_parameters=lambda variant: (f"evaluate.baseline.{variant}",),
    starts=baseline_of,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
