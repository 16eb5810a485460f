"""Options of the training stages that the tiny project leaves at their defaults."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny_project import PARAMS, run_stage, write_params

pytestmark = pytest.mark.slow


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the trained project with other parameters."""

    def copied(name: str, params: dict) -> Path:
        root = tmp_path / name
        shutil.copytree(trained, root, ignore=shutil.ignore_patterns("work"), symlinks=True)
        write_params(root, params)
        return root

    return copied


def history(root: Path, folder: str) -> list[dict[str, float]]:
    return json.loads((root / "artifacts" / folder / "history.json").read_text("utf-8"))["steps"]


def test_stage_1_by_the_sigmoid_loss_and_stage_2_after_it(again) -> None:
    from vlfoundry.models.internvl.predict import load_model, read_weights

    params = copy.deepcopy(PARAMS)
    params["contrastive"]["objective"] = {"loss": "sigmoid"}
    params["contrastive"]["train"]["lr"] = 5.0e-3
    params["generative"]["train"]["steps"] = 2
    root = again("sigmoid", params)
    run_stage(root, "contrastive")
    steps = history(root, "contrastive")
    assert steps[0]["logit_bias"] == -10
    assert steps[0]["logit_scale"] == pytest.approx(10)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert 0 <= steps[-1]["accuracy"] <= 1
    learnt = load_model(root / "artifacts/contrastive/model").module.logit_bias.item()
    assert learnt == pytest.approx(steps[-1]["logit_bias"], abs=0.01)
    assert learnt != -10

    run_stage(root, "generative")
    assert "logit_bias" not in read_weights(root / "artifacts/generative/model")
    assert len(history(root, "generative")) == 2


@pytest.mark.parametrize(
    ("stage", "variant", "profile"),
    [
        ("contrastive", None, ""),
        ("generative", None, ""),
        ("sft", "simple", ""),
        ("sft", "simple", "packing: {max_tokens: 120, max_tiles: 4}\n"),
    ],
)
def test_drop_path_is_the_same_on_one_rank_and_on_two(
    again, tmp_path, monkeypatch, stage, variant, profile
) -> None:
    params = copy.deepcopy(PARAMS)
    params["model"]["vision"]["drop_path"] = 0.4
    train = params[stage]["train"]
    (train[variant] if variant else train)["steps"] = 2
    folder = f"{stage}/{variant}" if variant else stage
    steps = {}
    for ranks in (1, 2):
        place = tmp_path / f"place{ranks}.yaml"
        place.write_text(f"ranks: {ranks}\n{profile}")
        monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(place))
        root = again(f"ranks{ranks}", params)
        run_stage(root, stage, *([f"variant={variant}"] if variant else []))
        steps[ranks] = history(root, folder)
    plain = history(again("plain", PARAMS), folder)
    assert steps[1][0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-4)
    for one, two in zip(steps[1], steps[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
