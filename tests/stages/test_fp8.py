"""Stage 1 of the default profile in FP8, in short: it learns as in fp32, and says what it did."""

import copy
import json
from pathlib import Path

import pytest

from tests.support.tiny_project import (
    PARAMS,
    ROOT,
    make_project,
    run_stage,
    start_fork,
    write_params,
)
from vlfoundry.infra.core import workfolder
from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.train.gap import smoothed

pytestmark = pytest.mark.slow

STEPS = 20
EVERYWHERE = {"first_layers": 0, "last_layers": 0}


@pytest.fixture(scope="module")
def project(warm, tmp_path_factory) -> Path:
    """The default model, embedded drawings, a text tower of one step."""
    default = load_params(ROOT / "params.yaml")
    params = copy.deepcopy(PARAMS) | {key: default[key] for key in ("model", "languages")}
    params["pretrain_text"]["train"] |= {"steps": 1, "warmup_steps": 0}
    params["contrastive"] = {
        "captions": 1,
        "mask_ratio": 0.5,
        "unmasked_share": 0.0,
        "train": {"steps": STEPS, "batch_samples": 32, "lr": 2.0e-4, "warmup_steps": 5,
                  "log_every_steps": 10},
    }  # fmt: skip
    root = make_project(tmp_path_factory.mktemp("fp8") / "project", params, concepts=30)
    run_stage(root, "pretrain_text")
    return root


def trained_with(root: Path, **train) -> list[float]:
    """Losses of stage 1."""
    params = load_params(root / "params.yaml")
    params["contrastive"]["train"] |= train
    write_params(root, params)
    run_stage(root, "contrastive")
    history = json.loads((root / "artifacts/contrastive/history.json").read_text("utf-8"))
    return [row["loss"] for row in history["steps"]]


def test_it_learns_as_in_fp32(project: Path) -> None:
    plain = trained_with(project, fp8=None)
    assert smoothed(plain) < 0.95 * plain[0]
    found = trained_with(project, fp8=EVERYWHERE)
    assert found != plain
    assert smoothed(found) == pytest.approx(smoothed(plain), rel=0.01)
    state = workfolder.current(project, "contrastive")
    assert state
    record = json.loads((state / "record.json").read_text("utf-8"))
    assert record["left_fp8_at"] is None
    told = (state / "steps.jsonl").read_text("utf-8").splitlines()
    assert sum("fp8_lost_at" in line for line in told) == STEPS // 10


def test_widths_that_do_not_fit_are_refused(project: Path) -> None:
    params = load_params(project / "params.yaml")
    before = copy.deepcopy(params)
    params["model"]["vision"]["mlp_hidden"] = 500
    params["contrastive"]["train"]["fp8"] = {}
    write_params(project, params)
    running = start_fork(project, "contrastive")
    assert running.wait() == 2
    assert "train.fp8: vision: mlp_hidden 500 on 1 ranks is 500 a rank" in running.output
    assert "the next that fits is 512" in running.output
    write_params(project, before)
