"""A run may be killed, damaged, moved to other ranks, and the model does not know."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from accept.crash import Target, besiege
from tests.infra.test_torchrun import files_of_stage_1, use
from tests.models import test_qwen3 as qwen3
from tests.models.test_layouts import (
    ALL_STAGES,
    APART,
    DATA_LAYOUTS,
    GRADIENTS,
    PACKED,
    STAGES,
    gradients_are_those_of_one_rank,
    loss_curves_agree,
    micro_batches_and_data_ranks_are_exact,
    packed_gradients_are_those_of_padded_rows,
)
from tests.models.test_layouts import LAYOUTS as MATRIX
from tests.stages.conftest import TRAINING, TRAINING_IMPORTS
from tests.support.tiny_project import (
    LIMIT_S,
    PARAMS,
    artifacts,
    make_project,
    run_stage,
    start_fork,
    start_process,
)
from vlfoundry.infra.core.stage import EXIT_INTERRUPTED

pytestmark = pytest.mark.accept

KILLS = int(os.environ.get("ACCEPT_KILLS", "25"))
SEED = int(os.environ.get("ACCEPT_SEED", "0"))
OBJECTIVES = (("contrastive", ""), ("generative", ""), ("sft", "simple"))
LAYOUTS = {
    "data 1": "ranks: 1\n",
    "data 4": "ranks: 4\n",
    "tensor 2": "ranks: 2\ntensor: 2\n",
    "tensor 2 x data 2": "ranks: 4\ntensor: 2\n",
    "tensor 2, text 1": "ranks: 2\ntensor: 2\ntext_tensor: 1\n",
}
Record = Callable[[str, Any], None]


@pytest.fixture(scope="session")
def warm() -> None:
    """Import here what every stage would import for itself; they are forked from this process."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    from vlfoundry.infra.backend import install

    install()
    for name in TRAINING_IMPORTS:
        importlib.import_module(name)


@pytest.fixture(scope="session")
def trained(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project in which all training stages have run on two data-parallel ranks."""
    root = make_project(tmp_path_factory.mktemp("engine") / "trained")
    for stage, *arguments in TRAINING:
        run_stage(root, stage, *arguments)
    return root


def _copied(trained: Path, tmp_path: Path, stage: str, variant: str = "") -> Target:
    root = shutil.copytree(trained, tmp_path / "project", symlinks=True)
    return Target(root=root, stage=stage, variant=variant, start=start_fork)


def _stopped(target: Target) -> int:
    """Start it, and ask it to stop when it has made a checkpoint; the steps it has done."""
    running = target.run()
    deadline = time.monotonic() + LIMIT_S
    while not list(target.work.glob("checkpoints/step-*")):
        assert running.collect() is None, running.output
        assert time.monotonic() < deadline, "it made no checkpoint"
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGUSR1)
    assert running.wait() == EXIT_INTERRUPTED, running.output
    return max(int(path.name[5:]) for path in target.work.glob("checkpoints/step-*"))


def _history(target: Target) -> list[dict[str, float]]:
    path = target.root / "artifacts" / target.made / "history.json"
    return json.loads(path.read_text("utf-8"))["steps"]


@pytest.mark.parametrize(("stage", "variant"), OBJECTIVES)
def test_kills_at_any_moment_do_not_change_a_bit(
    trained: Path, tmp_path: Path, stage: str, variant: str, record_property: Record
) -> None:
    """`ACCEPT_KILLS` over all three objectives; `ACCEPT_SEED` chooses which moments."""
    target = _copied(trained, tmp_path, stage, variant)
    target.clear()
    kills = -(-KILLS // len(OBJECTIVES))
    siege = besiege(target, kills=kills, seed=SEED + OBJECTIVES.index((stage, variant)))
    for name, value in dataclasses.asdict(siege).items():
        record_property(name, value)
    assert len(siege.kills) == kills
    assert any(kill.checkpoint for kill in siege.kills), "no kill met a checkpoint"
    assert siege.same
    assert artifacts(target.root, target.made) == artifacts(trained, target.made)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink],
                         ids=["truncated", "flipped", "deleted"])  # fmt: skip
def test_any_damaged_file_is_named_and_the_checkpoint_before_is_used(
    trained: Path, tmp_path: Path, damage: Callable[[Path], None], record_property: Record
) -> None:
    target = _copied(trained, tmp_path, "contrastive")
    steps = PARAMS["contrastive"]["train"]["steps"]
    before = steps - PARAMS["contrastive"]["train"]["save_every_steps"]
    work = target.work
    intact = shutil.copytree(work, tmp_path / "intact")
    names = sorted(path.name for path in (intact / f"checkpoints/step-{steps:08d}").iterdir())
    record_property("files", names)
    for name in names:
        target.clear()
        shutil.copytree(intact, work)
        damage(work / f"checkpoints/step-{steps:08d}" / name)
        running = target.run()
        assert running.wait() == 0, running.output
        assert f"step-{steps:08d} is damaged ({name}); trying the one before" in running.output
        assert f"going on after step {before} of {steps}" in running.output
        assert "Traceback" not in running.output
        assert artifacts(target.root, target.made) == artifacts(trained, target.made), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stage", "variant"), OBJECTIVES)
def test_a_stopped_run_goes_on_in_another_layout(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    variant: str,
    layout: str,
    record_property: Record,
) -> None:
    """Losses within 1e-5 of the run that stayed; on other samples they would differ by far more."""
    target = _copied(trained, tmp_path, stage, variant)
    expected = _history(target)
    target.clear()
    done = _stopped(target)
    profile = tmp_path / "other.yaml"
    profile.write_text(LAYOUTS[layout], "utf-8")
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(profile))
    running = target.run()
    assert running.wait() == 0, running.output
    assert f"going on after step {done} of {len(expected)}" in running.output
    found = _history(target)
    assert found[:done] == expected[:done]
    worst = max(
        abs(row["loss"] - want["loss"]) / want["loss"]
        for row, want in zip(found, expected, strict=True)
    )
    record_property("resumed_from", done)
    record_property("worst_relative_difference", worst)
    assert worst <= 1e-5


@pytest.mark.parametrize(("stage", "layout"), GRADIENTS)
def test_gradients_are_those_of_one_rank(stage: str, layout: str) -> None:
    gradients_are_those_of_one_rank(stage, MATRIX[layout])


@pytest.mark.parametrize(("stage", "layout", "tied"), qwen3.CELLS)
def test_gradients_of_qwen3_are_those_of_one_rank(
    stage: str, layout: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen3.gradients_are_those_of_one_rank(stage, layout, tied, monkeypatch)


def test_a_stage_over_torchrun_that_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes agent and ranks with the stage."""
    made = []
    for name, kill in (("fork", False), ("torchrun", True)):
        root = make_project(tmp_path / name)
        run_stage(root, "pretrain_text")
        use(name, tmp_path, monkeypatch)
        if kill:
            running = start_process(root, "contrastive")
            deadline = time.monotonic() + LIMIT_S
            while not list(root.glob("work/contrastive/*/checkpoints/*")):
                assert time.monotonic() < deadline, running.output
                assert running.collect() is None, running.output
                time.sleep(0.02)
            running.kill_9()
            left = [p.cmdline() for p in psutil.process_iter()]
            assert not [words for words in left if "vlfoundry-ranks-" in " ".join(words)]
        run_stage(root, "contrastive", start=start_process)
        made.append(files_of_stage_1(root))
    assert made[0] == made[1]


@pytest.mark.parametrize(("stage", "layout"), PACKED)
def test_packed_gradients_are_those_of_padded_rows(stage: str, layout: str) -> None:
    packed_gradients_are_those_of_padded_rows(stage, MATRIX[layout])


@pytest.mark.parametrize("layout", DATA_LAYOUTS)
@pytest.mark.parametrize("stage", ALL_STAGES)
def test_micro_batches_and_data_ranks_are_exact(stage: str, layout: str) -> None:
    micro_batches_and_data_ranks_are_exact(stage, DATA_LAYOUTS[layout])


@pytest.mark.parametrize("layout", MATRIX)
@pytest.mark.parametrize("stage", STAGES)
def test_loss_curves_agree(stage: str, layout: str, tmp_path: Path) -> None:
    loss_curves_agree(stage, MATRIX[layout], tmp_path, steps=20)


@pytest.mark.parametrize("optimizer", ["adamw", "stable_adamw"])
@pytest.mark.parametrize("layout", APART)
def test_loss_curves_agree_where_each_tower_has_its_own_layout(
    layout: str, optimizer: str, tmp_path: Path
) -> None:
    loss_curves_agree("contrastive", APART[layout], tmp_path, steps=20, optimizer=optimizer)
