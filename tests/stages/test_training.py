"""The training stages as processes: what they make, that they repeat, and that they survive."""

import copy
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_project import (
    LIMIT_S,
    PARAMS,
    ROOT,
    Running,
    artifacts,
    make_project,
    run_stage,
    start_fork,
    start_process,
    write_params,
)
from vlfoundry.infra.core import workfolder
from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.core.stage import EXIT_INTERRUPTED

pytestmark = pytest.mark.slow

MADE_FOLDERS = tuple(
    f"artifacts/{stage}" for stage in ("pretrain_text", "contrastive", "generative", "sft")
)
TEXT, STAGE1, STAGE2 = (f"{folder}/model" for folder in MADE_FOLDERS[:3])
MADE = {  # folder: kind of the model, what it is made from
    "pretrain_text": ("text", {"artifacts/shard/stage1"}),
    "contrastive": ("internvl_c", {"artifacts/shard/stage1", TEXT}),
    "generative": ("internvl_g", {"artifacts/shard/stage2", TEXT, STAGE1}),
    "sft/simple": ("chat_simple", {"artifacts/shard/stage2", "data/chat", TEXT, STAGE1}),
    "sft/full": (
        "chat_full",
        {"artifacts/shard/stage2", "data/chat", STAGE2, "artifacts/sft/simple/model"},
    ),
}
STEPS = PARAMS["contrastive"]["train"]["steps"]
MODEL_FILES = ("config.json", "tokenizer.json", "weights.safetensors")


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "weights.safetensors")


def steps(root: Path, folder: str) -> list[dict[str, float]]:
    history = json.loads((root / "artifacts" / folder / "history.json").read_text("utf-8"))
    assert history["format"] == "vlfoundry.history.v1"
    return history["steps"]


def record(root: Path) -> dict:
    return json.loads((state(root, "contrastive") / "record.json").read_text("utf-8"))


def state(root: Path, address: str) -> Path:
    found = workfolder.current(root, address)
    assert found
    return found


# --- what the stages make


@pytest.mark.parametrize("folder", MADE)
def test_a_stage_makes_a_model_a_history_and_its_lineage(trained: Path, folder: str) -> None:
    kind, inputs = MADE[folder]
    made = artifacts(trained, folder)
    beside = {"history.json", "loss.json", "lineage.json"}
    assert set(made) == {f"model/{name}" for name in MODEL_FILES} | beside
    place = trained / "artifacts" / folder
    assert json.loads((place / "model/config.json").read_text("utf-8"))["kind"] == kind
    stage, _, variant = folder.partition("/")
    asked = PARAMS[stage]["train"][variant] if variant else PARAMS[stage]["train"]
    rows = steps(trained, folder)
    assert [row["step"] for row in rows] == list(range(asked["steps"]))
    curve = json.loads((place / "loss.json").read_text("utf-8"))
    assert curve == [{"step": row["step"], "loss": row["loss"]} for row in rows]
    name = folder.replace("/", "-")
    rates = json.loads((trained / f"work/throughput/{name}.json").read_text("utf-8"))
    noted = json.loads((state(trained, name) / "record.json").read_text("utf-8"))
    assert rates == noted["throughput"]
    assert rates["samples_per_s"] > 0
    lineage = json.loads((place / "lineage.json").read_text("utf-8"))
    assert set(lineage["inputs"]) == inputs
    assert lineage["outputs"][f"artifacts/{folder}/history.json"] == made["history.json"]


@pytest.mark.parametrize("folder", ["pretrain_text", "sft/full"])
def test_a_second_run_makes_the_same_bytes(trained: Path, tmp_path: Path, folder: str) -> None:
    """Those of the other stages are compared after kills (test_crash.py)."""
    again = copied(trained, tmp_path / "again", without=("work", f"artifacts/{folder}"))
    stage, _, variant = folder.partition("/")
    run_stage(again, stage, *([f"variant={variant}"] if variant else []))
    assert artifacts(again, "") == artifacts(trained, "")


def test_stage_2_leaves_stage_1_as_it_was(trained: Path) -> None:
    before = weights(trained / "artifacts/contrastive/model")
    after = weights(trained / "artifacts/generative/model")
    learnt = {name for name in before if not np.array_equal(before[name], after[name])}
    assert learnt == {"logit_scale"}
    new = {".".join(name.split(".")[:2]) for name in after.keys() - before.keys()}
    assert {"text.query_tokens", "itm_head.weight"} <= new


def test_stage_2_learns_what_is_new(trained: Path) -> None:
    from vlfoundry.models.internvl.predict import load_model

    folder = trained / "artifacts/generative/model"
    untrained = load_model(folder, untrained_seed=PARAMS["seed"]).module.state_dict()
    after = weights(folder)
    for name in ("text.query_tokens", "itm_head.weight"):
        assert not np.array_equal(untrained[name].numpy(), after[name]), name


@pytest.mark.parametrize("folder", ["contrastive", "generative"])
def test_what_a_stage_made_embeds(trained: Path, folder: str) -> None:
    from vlfoundry.models.internvl.predict import load_model

    model = load_model(trained / "artifacts" / folder / "model")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
    for found in (model.embed_images(pictures), model.embed_texts(["sun", "太阳", "شمس"])):
        assert found.shape == (3, PARAMS["model"]["embed_dim"])
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("folder", ["generative", "sft/simple", "sft/full"])
def test_what_a_stage_made_writes(trained: Path, folder: str) -> None:
    from vlfoundry.models.internvl.predict import load_model
    from vlfoundry.models.internvl.prompts import caption_prompt

    model = load_model(trained / "artifacts" / folder / "model")
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    prompt = caption_prompt("en") if folder == "generative" else "What is this?"
    texts = model.generate(pictures, [prompt] * 2, max_new_tokens=4)
    assert len(texts) == 2
    assert texts[0] == texts[1]


def test_adapters_are_learnt_beside_a_base_that_stays(trained: Path, tmp_path: Path) -> None:
    """Stage 3 with LoRA; `full` goes on with the adapters that `simple` made."""
    from vlfoundry.models.internvl.predict import load_model

    root = copied(trained, tmp_path / "lora", without=("work", "artifacts/sft"))
    params = copy.deepcopy(PARAMS)
    adapter = {"rank": 2, "alpha": 4}
    params["sft"] |= {
        "trainable": ["lora", "connector"],
        "lora": {"vision": adapter, "language": adapter},
    }
    write_params(root, params)
    base = weights(root / STAGE1)
    base |= {f"language{n.removeprefix('text')}": w for n, w in weights(root / TEXT).items()}
    made = {}
    for variant in ("simple", "full"):
        run_stage(root, "sft", f"variant={variant}")
        made[variant] = weights(root / f"artifacts/sft/{variant}/model")
        for name, weight in made[variant].items():
            if name.startswith(("vision.", "language.")) and ".lora." not in name:
                assert np.array_equal(weight, base[name]), name
    adapters = [name for name in made["simple"] if ".lora." in name]
    assert adapters
    assert all(made["simple"][name].any() for name in adapters)
    assert all(not np.array_equal(made["simple"][n], made["full"][n]) for n in adapters)
    pictures = np.zeros((1, 32, 32, 3), np.uint8)
    model = load_model(root / "artifacts/sft/full/model")
    assert len(model.generate(pictures, ["What is this?"], max_new_tokens=4)) == 1

    write_params(root, PARAMS)
    refused = start_fork(root, "sft", "variant=full")
    assert refused.wait() == 2
    assert "fold them in with `vlfoundry merge`" in refused.output


def test_the_default_profile_starts_at_guessing(warm, tmp_path: Path) -> None:
    """ln(batch) within a tenth: neither sure of wrong answers nor collapsed."""
    default = load_params(ROOT / "params.yaml")
    params = copy.deepcopy(PARAMS) | {
        key: default[key] for key in ("model", "contrastive", "languages")
    }
    params["pretrain_text"]["train"]["steps"] = 1
    params["contrastive"]["train"] |= {"steps": 1, "warmup_steps": 0}
    make_project(tmp_path, params, concepts=30)
    run_stage(tmp_path, "pretrain_text")
    run_stage(tmp_path, "contrastive")
    guessing = math.log(default["contrastive"]["train"]["batch_samples"])
    assert steps(tmp_path, "contrastive")[0]["loss"] == pytest.approx(guessing, rel=0.1)


# --- killed and stopped


@pytest.fixture
def ready(trained: Path, tmp_path: Path) -> Path:
    """A project in which everything is there that `contrastive` needs, and nothing that it made."""
    return copied(trained, tmp_path / "ready", without=("work", *MADE_FOLDERS[1:]))


def copied(root: Path, target: Path, without: tuple[str, ...] = ()) -> Path:
    """A copy of a project without some of its files and folders."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {n for n in names if Path(folder, n).relative_to(root).as_posix() in without}

    shutil.copytree(root, target, ignore=left_out, symlinks=True)
    return target


def until_a_checkpoint(root: Path, running: Running) -> Running:
    deadline = time.monotonic() + LIMIT_S
    while not list(root.glob("work/contrastive/*/checkpoints/step-*")):
        assert running.collect() is None, f"it ended too early:\n{running.output}"
        assert time.monotonic() < deadline, "it made no checkpoint"
        time.sleep(0.005)
    return running


def test_killed_and_unchanged_it_resumes_killed_and_changed_it_starts_clean(
    trained: Path, ready: Path, tmp_path: Path
) -> None:
    running = until_a_checkpoint(ready, start_fork(ready, "contrastive"))
    assert len(running.ranks()) == 2
    running.kill_9()
    changed = copied(ready, tmp_path / "changed")

    # As a user's: a process of its own, which imports everything anew.
    resumed = run_stage(ready, "contrastive", start=start_process)
    done = record(ready)["resumed_from"]
    assert 2 <= done < STEPS
    assert f"going on after step {done} of {STEPS}" in resumed
    assert "Warning" not in resumed
    assert len(workfolder.folders(ready / "work/contrastive")) == 1
    assert artifacts(ready, "contrastive") == artifacts(trained, "contrastive")

    params = copy.deepcopy(PARAMS)
    params["contrastive"]["train"]["lr"] = 2.0e-3
    write_params(changed, params)
    never_killed = copied(changed, tmp_path / "never_killed", without=("work",))
    output = run_stage(changed, "contrastive")
    assert "others than in 1 earlier run below work/contrastive: it starts anew" in output
    assert "going on after step" not in output
    assert record(changed)["resumed_from"] == 0
    (_, earlier) = workfolder.folders(changed / "work/contrastive")
    assert list(earlier.glob("checkpoints/step-*"))
    assert steps(changed, "contrastive")[0]["lr"] == 2.0e-3
    run_stage(never_killed, "contrastive")
    assert artifacts(changed, "contrastive") == artifacts(never_killed, "contrastive")
    assert artifacts(changed, "contrastive") != artifacts(trained, "contrastive")

    write_params(changed, PARAMS)  # changed back, it goes on where it was killed
    assert f"going on after step {done} of {STEPS}" in run_stage(changed, "contrastive")
    assert record(changed)["resumed_from"] == done
    assert state(changed, "contrastive") == earlier
    assert artifacts(changed, "contrastive") == artifacts(trained, "contrastive")


def to_the_terminal(running: Running) -> None:
    """Ctrl-C: everyone in the foreground gets it."""
    os.killpg(running.pid, signal.SIGINT)


def to_the_parent(running: Running) -> None:
    os.kill(running.pid, signal.SIGTERM)


@pytest.mark.parametrize("stop", [to_the_terminal, to_the_parent])
def test_stopped_it_says_how_to_go_on_and_does(
    trained: Path, ready: Path, stop: Callable[[Running], None]
) -> None:
    running = until_a_checkpoint(ready, start_fork(ready, "contrastive"))
    stop(running)
    assert running.wait() == EXIT_INTERRUPTED, running.output
    assert "saved; run the same command again to go on" in running.output
    assert running.output.endswith("contrastive: stopped; run it again to go on\n")
    assert not (ready / "artifacts/contrastive/history.json").exists()
    output = run_stage(ready, "contrastive")
    assert f"going on after step {record(ready)['resumed_from']} of {STEPS}" in output
    assert artifacts(ready, "contrastive") == artifacts(trained, "contrastive")


def test_a_rank_that_is_killed_ends_the_stage_and_the_next_run_goes_on(
    trained: Path, ready: Path
) -> None:
    running = until_a_checkpoint(ready, start_fork(ready, "contrastive"))
    running.ranks()[1].kill()
    assert running.wait() == 1
    assert "was killed by SIGKILL" in running.output
    assert "going on after step" in run_stage(ready, "contrastive")
    assert artifacts(ready, "contrastive") == artifacts(trained, "contrastive")
