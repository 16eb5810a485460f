"""DVC's own commands on two runs of a small project, and what a restore costs."""

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accept.meter import Measured, measure
from accept.small import environment, small_project, vlfoundry

pytestmark = pytest.mark.accept

MINUTE = 60.0
RESTORES = 3
TRAINED = ("pretrain_text", "contrastive", "generative", "sft/simple", "sft/full")
Record = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project, run once, its dvc.lock committed."""
    place = small_project(tmp_path_factory.mktemp("dvc") / "small")
    os.environ.update(environment(place))
    ended = run(place)
    assert ended.code == 0, ended.output[-3000:]
    author = ("-c", "user.name=Small", "-c", "user.email=small@localhost")
    for command in (["add", "dvc.lock"], [*author, "commit", "--quiet", "-m", "run"]):
        subprocess.run(["git", *command], cwd=place, check=True)
    return place


@pytest.fixture(scope="module")
def two(project: Path) -> Path:
    """The project after an experiment with another seed, which lies in the tree."""
    dvc(project, "exp", "run", "--quiet", "--name", "another", "-S", "seed=2")
    return project


def run(place: Path) -> Measured:
    return measure(vlfoundry(place, "run"), place, 15 * MINUTE)


def dvc(place: Path, *arguments: str) -> str:
    command = [str(Path(vlfoundry(place)[0]).with_name("dvc")), *arguments]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=15 * MINUTE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_many_cached_stages_come_back_in_one_go(project: Path, record_property: Record) -> None:
    """What it costs more than a run with nothing to do: under 10 s for all 17."""
    lock, costs = (project / "dvc.lock").read_bytes(), []
    for _ in range(RESTORES):
        shutil.rmtree(project / "artifacts")
        (project / "dvc.lock").unlink()
        restored, idle = run(project), run(project)
        assert restored.code == idle.code == 0, restored.output + idle.output
        assert restored.output.count(": restored, ") == 17
        assert "nothing to do" in idle.output
        assert (project / "dvc.lock").read_bytes() == lock
        costs.append((restored.wall_s, restored.cpu_s, idle.wall_s, idle.cpu_s))
    wall, cpu, idle_wall, idle_cpu = (
        statistics.median(column) for column in zip(*costs, strict=True)
    )
    record_property("wall_s", wall)
    record_property("cpu_s", cpu)
    record_property("idle_wall_s", idle_wall)
    record_property("idle_cpu_s", idle_cpu)
    assert wall - idle_wall < 10


def test_dvc_push_and_pull(project: Path, tmp_path: Path) -> None:
    lock = (project / "dvc.lock").read_bytes()
    dvc(project, "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    dvc(project, "push", "--quiet", "--run-cache")
    shutil.rmtree(project / "artifacts")
    shutil.rmtree(project / ".dvc" / "cache")
    dvc(project, "pull", "--quiet", "--run-cache")
    dvc(project, "remote", "remove", "--local", "store")
    assert "up to date" in dvc(project, "status")
    assert (project / "dvc.lock").read_bytes() == lock


def test_scores_of_two_runs_stand_side_by_side(two: Path) -> None:
    rows = {
        metric: entry
        for entries in json.loads(dvc(two, "metrics", "diff", "--all", "--json")).values()
        for metric, entry in entries.items()
    }
    assert 40 <= len(rows) <= 60
    assert rows["funnel.ingest"]["diff"] != 0
    for name in (
        "internvl_c.zero_shot.top1.ensemble",
        "chat_full.box.mean_iou",
        "loss.contrastive",
    ):
        assert set(rows[name]) >= {"old", "new"}, name
    told = dvc(two, "metrics", "diff")
    assert max(map(len, told.splitlines())) <= 130


def test_experiments_are_a_table(two: Path) -> None:
    told = dvc(two, "exp", "show", "--only-changed", "--drop", "artifacts/", "--csv").splitlines()
    columns = told[0].split(",")
    assert "seed" in columns
    assert "loss.contrastive" in columns
    assert not [name for name in columns if "artifacts/" in name or ".py" in name]
    another = next(line.split(",") for line in told if line.startswith("another,"))
    assert another[columns.index("seed")] == "2"


def test_curves_of_two_runs_lie_in_one_diagram(two: Path) -> None:
    shown = json.loads(dvc(two, "plots", "diff", "HEAD", "--json"))["data"]
    paths = {f"artifacts/{stage}/loss.json" for stage in ("bootstrap", *TRAINED)}
    assert set(shown) == paths | {"artifacts/report/funnel.json"}
    for path, (diagram,) in shown.items():
        values = diagram["content"]["data"]["values"]
        assert {row["rev"] for row in values} == {"HEAD", "workspace"}, path


def test_a_queued_experiment(two: Path) -> None:
    dvc(two, "exp", "run", "--queue", "--name", "queued", "-S", "report.examples=5")
    dvc(two, "queue", "start")
    deadline = time.monotonic() + 5 * MINUTE
    while "Success" not in (status := dvc(two, "queue", "status")):
        assert "Failed" not in status, dvc(two, "queue", "logs", "queued")
        assert time.monotonic() < deadline, status
        time.sleep(2)
    told = dvc(two, "metrics", "diff", "another", "queued", "--json")
    assert json.loads(told) == {}


def test_rates_of_the_last_training(two: Path) -> None:
    paths = [f"work/throughput/{stage.replace('/', '-')}.json" for stage in TRAINED]
    shown = json.loads(dvc(two, "metrics", "show", "--json", *paths))[""]["data"]
    assert set(shown) == set(paths)
    assert all(rates["data"]["samples_per_s"] > 0 for rates in shown.values())
    assert "up to date" in dvc(two, "status")
