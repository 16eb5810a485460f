"""Training that goes on from a model folder: its own last result, or one of another make."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
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
from vlfoundry.infra.core.fingerprint import fingerprint

pytestmark = pytest.mark.slow

STANDSTILL = 1e-30
"""a learning rate that changes no weight by anything that one sees"""
GOES_ON = {  # stage and variant -> what made the folder, and all names of its `start`
    "contrastive": ("contrastive", ("model",)),
    "generative": ("generative", ("model", "head")),
    "sft@simple": ("sft/simple", ("vision", "language")),
    "sft@full": ("sft/full", ("qllama", "chat")),
}


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """What the stages made, as a project of its own without their state."""
    target = tmp_path / "project"
    work = shutil.ignore_patterns("work")
    return Path(shutil.copytree(trained, target, ignore=work, symlinks=True))


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "weights.safetensors")


def moved(root: Path, made: str, name: str) -> str:
    """The result of a stage as a folder of data/start; what all stages made is gone."""
    shutil.copytree(root / "artifacts" / made / "model", root / "data/start" / name)
    for stage in ("pretrain_text", "contrastive", "generative", "sft"):
        shutil.rmtree(root / "artifacts" / stage)
    return f"data/start/{name}"


def one_step(address: str, lr: float = STANDSTILL) -> dict:
    """Parameters under which a stage takes one step."""
    params = copy.deepcopy(PARAMS)
    stage, _, variant = address.partition("@")
    train = params[stage]["train"][variant] if variant else params[stage]["train"]
    train |= {"steps": 1, "warmup_steps": 0, "lr": lr, "save_every_steps": 1}
    return params


def arguments(address: str) -> tuple[str, ...]:
    stage, _, variant = address.partition("@")
    return (stage, *([f"variant={variant}"] if variant else []))


@pytest.mark.parametrize("address", GOES_ON)
def test_it_begins_with_every_weight_of_its_own_last_result(project: Path, address: str) -> None:
    made, keys = GOES_ON[address]
    folder = moved(project, made, "last")
    params = one_step(address)
    stage, _, variant = address.partition("@")
    slots = dict.fromkeys(keys, folder)
    params[stage]["start"] = {variant: slots} if variant else slots
    write_params(project, params)
    output = run_stage(project, *arguments(address))
    assert "new: nothing" in output
    before, after = weights(project / folder), weights(project / "artifacts" / made / "model")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, rtol=0, atol=1e-20, err_msg=name)
    lineage = json.loads((project / "artifacts" / made / "lineage.json").read_text("utf-8"))
    assert lineage["inputs"][folder] == fingerprint(project / folder)
    assert lineage["starts"] == {folder: None}
    state = workfolder.current(project, address)
    assert state
    record = json.loads((state / "record.json").read_text("utf-8"))
    assert {entry["folder"] for entry in record["start"]["from"]} == {folder}
    assert record["start"]["new"] == []


def test_stage_1_goes_on_where_it_was(warm, tmp_path: Path) -> None:
    """The default model learns 8 concepts; what goes on from it begins far below guessing."""
    default = load_params(ROOT / "params.yaml")
    params = copy.deepcopy(PARAMS) | {
        key: default[key] for key in ("model", "contrastive", "languages")
    }
    params["pretrain_text"]["train"]["steps"] = 1
    params["contrastive"]["captions"] = 2
    train = params["contrastive"]["train"]
    train |= {"steps": 30, "batch_samples": 16, "warmup_steps": 5}
    make_project(tmp_path, params, concepts=8)
    run_stage(tmp_path, "pretrain_text")
    run_stage(tmp_path, "contrastive")
    guessing = math.log(train["batch_samples"])
    assert losses(tmp_path)[0] > 0.8 * guessing
    shutil.copytree(tmp_path / "artifacts/contrastive/model", tmp_path / "data/start/last")
    shutil.rmtree(tmp_path / "artifacts/pretrain_text")
    params["contrastive"]["start"] = {"model": "data/start/last"}
    train |= {"steps": 1, "warmup_steps": 0}
    write_params(tmp_path, params)
    run_stage(tmp_path, "contrastive")
    assert losses(tmp_path)[0] < 0.6 * guessing


def losses(root: Path) -> list[float]:
    history = json.loads((root / "artifacts/contrastive/history.json").read_text("utf-8"))
    return [row["loss"] for row in history["steps"]]


def test_what_cannot_start_is_refused_before_a_rank_is_forked(project: Path) -> None:
    def refused(**start: str) -> str:
        params = copy.deepcopy(PARAMS)
        params["generative"]["start"] = start
        write_params(project, params)
        running = start_fork(project, "generative")
        assert running.wait() == 2, running.output
        assert not list((project / "work/generative").glob("*/checkpoints"))
        return running.output

    shutil.copytree(project / "artifacts/generative/model", project / "data/start/g")
    assert "both have 'text.head.weight'" in refused(model="data/start/g")
    assert "'text.head.weight' of the new model must not begin from nothing" in refused(
        head="artifacts/contrastive/model"
    )
    config = project / "data/start/g/config.json"
    facts = json.loads(config.read_text("utf-8"))
    facts["model"]["vision"]["heads"] = 4
    config.write_text(json.dumps(facts), "utf-8")
    message = refused(model="data/start/g", head="data/start/g")
    assert "vision.heads is 4 there and 2 in the parameters" in message
    assert "`vlfoundry import SOURCE TARGET --profile NAME`" in message
    assert "did you mean 'model'?" in refused(modle="data/start/g")
    assert "write it as 'data/start/g'" in refused(model="data/start/g/")


def test_another_content_is_another_run_and_the_same_is_the_same(project: Path) -> None:
    folder = moved(project, "contrastive", "last")
    params = one_step("contrastive")
    params["contrastive"]["start"] = {"model": folder}
    write_params(project, params)
    run_stage(project, "contrastive")
    again = run_stage(project, "contrastive")
    assert "the old run lies in" not in again
    (project / folder / "origin.json").write_text('{"ref": "internvl_c@v0.1.0"}', "utf-8")
    assert "below work/contrastive: it starts anew" in run_stage(project, "contrastive")


@pytest.mark.parametrize("cut", ["pipeline: 2", "pipeline: 2\nvirtual_pipeline: 2"])
def test_a_rank_fills_what_it_holds(
    project: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """In a pipeline no rank holds every part, and under the interleaved schedule it has several."""
    profile = project / "cut.yaml"
    profile.write_text(f"ranks: 2\nthreads: 1\nmicro_batch_samples: 4\n{cut}\n", "utf-8")
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(profile))
    folder = moved(project, "sft/simple", "last")
    params = one_step("sft@simple")
    params["sft"]["start"] = {"simple": {"vision": folder, "language": folder}}
    write_params(project, params)
    run_stage(project, "sft", "variant=simple")
    before, after = weights(project / folder), weights(project / "artifacts/sft/simple/model")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, rtol=0, atol=1e-20, err_msg=name)
