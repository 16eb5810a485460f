"""The run's facts as JSON, which is hashed, and as a page for people, which is not.

The page (`work/report/index.html`) also shows times and rates; they differ from run to run.
"""

from dataclasses import dataclass

from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.eval.report.collect import FUNNEL, STAGES, TRAINED, artefact, facts, metrics
from vlfoundry.eval.report.page import PAGE, render
from vlfoundry.infra.core.config import check_ranges
from vlfoundry.infra.core.stage import Context, Plot, Stage, main

OUT = "artifacts/report/report.json"
METRICS = "artifacts/report/metrics.json"
FUNNEL_PLOT = Plot(
    path="artifacts/report/funnel.json",
    x="records",
    y="after",
    title="records left after each step",
    template="bar_horizontal_sorted",
)
ARTWORK = ("emojitwo", "fluent", "fluent_flat", "fxemoji", "noto", "noto_v1", "twemoji")
FUNNEL_FILES = ("kept.parquet", "dropped.parquet", "metrics.json")
INGESTED = ("records", "images", "truth")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How much the page shows."""

    examples: int = 12
    """Examples of each kind, roughly."""

    def __post_init__(self) -> None:
        check_ranges("report", self, from_zero=("examples",))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `report` reads from params.yaml."""

    report: ReportConfig


def run(config: Config, context: Context) -> None:
    """Write the facts and the page, and say where the page is."""
    found = facts(context.root)
    context.write_json(OUT, found)
    context.write_json(METRICS, metrics(found))
    steps = metrics(found)["funnel"].items()
    context.write_json(FUNNEL_PLOT.path, [{"after": a, "records": n} for a, n in steps])
    page = render(context.root, context.path(PAGE), examples=config.report.examples)
    context.log(f"report: {page.relative_to(context.root)} ({page.stat().st_size / 1e6:.1f} MB)")


STAGE = Stage(
    name="report",
    config=Config,
    inputs=(
        "data/concepts.parquet",
        *(f"data/{name}.parquet" for name in ARTWORK),
        *(f"artifacts/ingest/{name}.parquet" for name in INGESTED),
        *(f"{artefact(step)}/{name}" for step in FUNNEL for name in FUNNEL_FILES),
        "artifacts/bootstrap/metrics.json",
        "artifacts/shard/stage1/index.json",
        "artifacts/shard/stage2/index.json",
        *(f"{artefact(stage)}/history.json" for stage in TRAINED if stage != "bootstrap"),
        *(
            f"artifacts/evaluate/{variant}/{part}"
            for variant in OUTPUTS
            for part in ("scores.json", "items")
        ),
        "artifacts/gate/gate.json",
        *(f"{artefact(stage)}/lineage.json" for stage in STAGES if stage != "report"),
    ),
    outputs=(OUT, METRICS, FUNNEL_PLOT.path),
    metrics=(METRICS,),
    plots=(FUNNEL_PLOT,),
    run=run,
    timeout_s=1800,
    cpu=1,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
