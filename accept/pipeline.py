"""The whole pipeline, end to end, on the embedded data, in a fresh clone."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accept import crash
from accept.clone import fresh_clone
from accept.meter import Measured, kill_after, measure

pytestmark = pytest.mark.accept

LANGUAGES = ("en", "zh", "ja", "ar", "it")
MINUTE = 60.0
RUN_KILLS = int(os.environ.get("ACCEPT_RUN_KILLS", "6"))
Record = Callable[[str, Any], None]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone of HEAD with its environment made."""
    return fresh_clone(tmp_path_factory.mktemp("accept") / "vlfoundry")


@pytest.fixture(scope="session")
def first(clone: Path) -> Measured:
    """The first `make run`."""
    return measure(["make", "run"], clone, 60 * MINUTE)


@pytest.fixture(scope="session")
def scores(clone: Path, first: Measured) -> Callable[[str], dict[str, dict[str, Any]]]:
    """Scores of a model by `suite/name/lang`."""
    assert first.code == 0, first.output[-3000:]

    def of(model: str) -> dict[str, dict[str, Any]]:
        path = clone / "artifacts" / "evaluate" / model / "scores.json"
        entries = json.loads(path.read_text("utf-8"))["scores"]
        return {"/".join(filter(None, (e["suite"], e["name"], e["lang"]))): e for e in entries}

    return of


def test_make_run_ends_in_20_minutes_and_8_gb(
    clone: Path, first: Measured, record_property: Record
) -> None:
    record_property("wall_s", first.wall_s)
    record_property("cpu_s", first.cpu_s)
    record_property("peak_mib", first.peak_mib)
    assert first.code == 0, first.output[-3000:]
    assert first.wall_s <= 20 * MINUTE
    assert first.peak_mib < 8 * 1024
    assert "work/report/index.html" in first.output
    assert (clone / "work" / "report" / "index.html").is_file()


def test_a_second_run_takes_a_minute_of_cpu(
    clone: Path, first: Measured, record_property: Record
) -> None:
    lock = (clone / "dvc.lock").read_bytes()
    again = measure(["make", "run"], clone, 10 * MINUTE)
    record_property("wall_s", again.wall_s)
    record_property("cpu_s", again.cpu_s)
    assert again.code == 0, again.output[-3000:]
    assert "nothing to do" in again.output
    assert again.cpu_s <= 60
    assert (clone / "dvc.lock").read_bytes() == lock


def test_dvc_alone_agrees(clone: Path, first: Measured) -> None:
    lock = (clone / "dvc.lock").read_bytes()
    ended = measure([".venv/bin/dvc", "repro"], clone, 10 * MINUTE)
    assert ended.code == 0, ended.output[-3000:]
    assert (clone / "dvc.lock").read_bytes() == lock


def test_zero_shot_on_the_unseen_vendor(scores: Callable, record_property: Record) -> None:
    found = scores("internvl_c")
    for name, least in (("top1", 0.08), ("top5", 0.25)):
        score = found[f"zero_shot/{name}/ensemble"]
        record_property(name, score["value"])
        record_property(f"{name}_untrained", score["untrained"])
        assert score["value"] >= least
        control = math.hypot(score["untrained_stderr"], 1 / score["n"])
        assert abs(score["untrained"] - score["chance"]) <= 4 * control
    names = ("zero_shot/top1", "zero_shot/top5", "retrieval/image_to_text_r10",
             "retrieval/text_to_image_r10")  # fmt: skip
    for name in names:
        for lang in LANGUAGES:
            score = found[f"{name}/{lang}"]
            record_property(f"{name}/{lang}", score["value"])
            assert score["interval"][0] > score["chance"], f"{name}/{lang}"


def test_the_gate_promotes_the_model(clone: Path, scores: Callable) -> None:
    """Its rules ask for what the checks here ask for, so it must agree with them."""
    scores("internvl_c")
    decision = json.loads((clone / "artifacts/gate/gate.json").read_text("utf-8"))
    assert not decision["reasons"]
    assert decision["passed"]
    listed = subprocess.run(
        [".venv/bin/vlfoundry", "models"], cwd=clone, check=True, capture_output=True, text=True
    )
    assert "champion" in listed.stdout


@pytest.mark.parametrize("model", ["chat_simple", "chat_full"])
def test_colours_and_boxes(scores: Callable, model: str, record_property: Record) -> None:
    found = scores(model)
    colour, box = found["colour/accuracy"], found["box/accuracy_iou50"]
    record_property("colour", colour["value"])
    record_property("box_iou50", box["value"])
    assert colour["value"] >= 0.95
    assert box["value"] >= 0.5


def test_contrastive_starts_at_ln_batch(
    clone: Path, first: Measured, record_property: Record
) -> None:
    history = json.loads((clone / "artifacts/contrastive/history.json").read_text("utf-8"))
    losses, guessing = [s["loss"] for s in history["steps"]], math.log(history["batch_samples"])
    record_property("first_loss_over_ln_batch", losses[0] / guessing)
    assert losses[0] == pytest.approx(guessing, rel=0.02)
    assert min(losses[: len(losses) // 4]) < 0.95 * guessing


def test_a_changed_parameter_runs_what_depends_on_it(clone: Path, first: Measured) -> None:
    path = clone / "params.yaml"
    before = path.read_text("utf-8")
    assert "examples: 12" in before
    path.write_text(before.replace("examples: 12", "examples: 11"), "utf-8")
    try:
        changed = measure(["make", "run"], clone, 10 * MINUTE)
        assert changed.code == 0, changed.output[-3000:]
        assert "1 of " in changed.output
        assert "report: ran" in changed.output
    finally:
        path.write_text(before, "utf-8")


def test_a_pipeline_killed_at_any_moment_ends_in_the_same_lock(
    clone: Path, record_property: Record
) -> None:
    """All stages with a tenth of their steps, so that the kills are spread over all of them, and a
    gate that asks for what so short a run reaches."""
    place = clone.parent / "killed"
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(clone), str(place)], check=True)
    subprocess.run(["make", "setup"], cwd=place, check=True)
    params = (place / "params.yaml").read_text("utf-8")
    short = re.sub(r"(steps: )(\d+)", lambda m: f"{m[1]}{max(1, int(m[2]) // 10)}", params)
    rule = "    - {variant: internvl_c, score: zero_shot/top1/ensemble, at_least: 0.0}\n"
    short, changed = re.subn(r"(  rules:\n)((    [-#].*\n)+)", rf"\1{rule}", short)
    assert changed == 1
    (place / "params.yaml").write_text(short, "utf-8")
    whole = measure(["make", "run"], place, 30 * MINUTE)
    assert whole.code == 0, whole.output[-3000:]
    lock = (place / "dvc.lock").read_bytes()
    for made in ("artifacts", "work", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(place / made)
    (place / "dvc.lock").unlink()

    moments, kills = random.Random(0), 0
    for _ in range(RUN_KILLS):
        kills += kill_after(["make", "run"], place, moments.uniform(30, whole.wall_s / 3))
    record_property("kills", kills)
    assert kills >= RUN_KILLS / 2
    last = measure(["make", "run"], place, 30 * MINUTE)
    assert last.code == 0, last.output[-3000:]
    assert (place / "dvc.lock").read_bytes() == lock


def test_kills_at_any_moment_do_not_change_a_bit(
    tmp_path_factory: pytest.TempPathFactory, record_property: Record
) -> None:
    """`ACCEPT_KILLS` and `ACCEPT_SEED` choose how many and which; alone: `-k kills`."""
    root = tmp_path_factory.mktemp("crash")
    crash.make_place(root)
    siege = crash.besiege(crash.Target(root=root))
    for name, value in dataclasses.asdict(siege).items():
        record_property(name, value)
    assert len(siege.kills) == crash.KILLS
    assert any(kill.checkpoint for kill in siege.kills), "no kill met a checkpoint"
    assert siege.same
