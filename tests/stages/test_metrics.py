"""What `dvc metrics` and `dvc plots` read of the files that stages make for them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.report_tree import build_tree
from vlfoundry.eval.compare.scores import ENSEMBLE, Score, headline
from vlfoundry.eval.report.collect import metrics
from vlfoundry.flows.workspace import yaml_text
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.git import git
from vlfoundry.infra.core.stage import Bound, Context
from vlfoundry.stages import evaluate, report, sft

pytestmark = pytest.mark.slow

CURVE = [{"step": 0, "loss": 2.5}, {"step": 1, "loss": 1.25}, {"step": 2, "loss": 1.125}]


def score(suite: str, name: str, value: float, lang: str = "") -> Score:
    return Score(
        suite=suite, name=name, value=value, n=7, stderr=0.1, interval=(0.0, 1.0), lang=lang
    )


def test_only_what_stands_for_all_languages_is_a_headline() -> None:
    scores = [
        score("zero_shot", "top1", 0.125, "en"),
        score("zero_shot", "top1", 0.25, ENSEMBLE),
        score("zero_shot", "top5", 0.5, ENSEMBLE),
        score("box", "mean_iou", 0.75),
        score("box", "mean_iou", 0.875, "zh"),
    ]
    assert headline(scores) == {
        "zero_shot": {"top1": {"ensemble": 0.25}, "top5": {"ensemble": 0.5}},
        "box": {"mean_iou": 0.75},
    }


def test_without_a_funnel_or_a_gate_there_are_no_numbers_of_them() -> None:
    assert metrics({"funnel": {}, "losses": {"bootstrap": {"fold 1": {}}}, "gate": None}) == {
        "funnel": {}, "loss": {}, "gate": {"passed": None},
    }  # fmt: skip


def entry(one: Bound) -> dict[str, Any]:
    """A stage of dvc.yaml that makes nothing but its metrics and plots, which are there."""
    keys = ("x", "y", "title", "template")
    return {
        "cmd": "true",
        "metrics": [{path: {"persist": True}} for path in one.metrics],
        "plots": [
            {plot.path: {**{key: getattr(plot, key) for key in keys}, "persist": True}}
            for plot in one.plots
        ],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_tree(tmp_path_factory.mktemp("run") / "tree")
    one = report.STAGE.bind(None)
    report.STAGE.run(build(report.Config, {"report": {}}), Context(one, root, "key"))
    (root / "artifacts/sft/full/loss.json").write_text(json.dumps(CURVE))
    stages = {
        "report": entry(one),
        "evaluate": entry(evaluate.STAGE.bind("internvl_g")),
        "sft": entry(sft.STAGE.bind("full")),
    }
    (root / "dvc.yaml").write_text(yaml_text({"stages": stages}))
    (root / "work/throughput").mkdir()
    (root / "work/throughput/contrastive.json").write_text('{"samples_per_s": 96.5}')
    (root / ".dvcignore").write_text((Path(__file__).parents[2] / ".dvcignore").read_text("utf-8"))
    (root / ".gitignore").write_text("/artifacts/\n/work/\n")
    git(root, "init", "--quiet")
    dvc(root, "init", "--quiet")
    dvc(root, "repro", "--quiet")
    return root


def dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_dvc_reads_the_scores_the_funnel_and_the_losses(root: Path) -> None:
    shown = json.loads(dvc(root, "metrics", "show", "--json"))[""]["data"]
    made = json.loads((root / report.OUT).read_text())
    told = shown["artifacts/report/metrics.json"]["data"]
    steps = {step["step"]: step["kept"] for step in made["funnel"]["steps"]}
    assert told["funnel"] == {
        "ingest": made["funnel"]["records"], **steps, **made["funnel"]["shards"],
    }  # fmt: skip
    assert len(set(told["funnel"].values())) > 2
    assert told["loss"]["contrastive"] == made["losses"]["contrastive"]["loss"]["last"]
    assert told["gate"] == {"passed": made["gate"]["passed"]}

    scores = shown["artifacts/evaluate/internvl_g/metrics.json"]["data"]
    entries = made["scores"]["internvl_g"]["scores"]
    wanted = {(e["suite"], e["name"]): e["value"] for e in entries if e["lang"] == ENSEMBLE}
    found = scores["internvl_g"]
    assert wanted
    assert {key: found[key[0]][key[1]]["ensemble"] for key in wanted} == wanted
    assert "top1" in found["zero_shot"]
    assert "en" not in json.dumps(found).split('"')


def test_dvc_draws_the_funnel_and_a_loss(root: Path) -> None:
    shown = json.loads(dvc(root, "plots", "show", "--json"))["data"]
    assert set(shown) == {"artifacts/report/funnel.json", "artifacts/sft/full/loss.json"}
    (curve,) = shown["artifacts/sft/full/loss.json"]
    values = curve["content"]["data"]["values"]
    assert [{key: row[key] for key in ("step", "loss")} for row in values] == CURVE
    assert curve["content"]["title"]["text"] == "loss of sft@full"
    (funnel,) = shown["artifacts/report/funnel.json"]
    told = json.loads((root / "artifacts/report/metrics.json").read_text())["funnel"]
    rows = funnel["content"]["data"]["values"]
    assert {row["after"]: row["records"] for row in rows} == told


def test_dvc_reads_rates_that_nothing_hashes(root: Path) -> None:
    """From a folder that git and DVC ignore, since the file is named."""
    assert "96.5" in dvc(root, "metrics", "show", "work/throughput/contrastive.json")
    assert "throughput" not in dvc(root, "metrics", "show")
