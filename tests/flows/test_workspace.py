"""A run with its own parameters gets its own place and leaves the checkout alone."""

from pathlib import Path

import pytest

from flows.graph import load_graph
from flows.workspace import Variation, workspace
from infra.config import load_params
from infra.errors import ConfigError
from infra.registry import cache_folder
from tests.flows.toy import sh


def prepare(root: Path, variation: Variation, folder: Path | None = None) -> Path:
    """The workspace, its lock let go again."""
    with workspace(root, variation, folder) as lock:
        return lock.root


def test_profile_and_overrides_reach_params_yaml(toy: Path) -> None:
    (toy / "work.py").write_text((toy / "work.py").read_text() + "# not committed\n")
    (toy / "new.txt").write_text("not even tracked\n")
    before = sh(toy, "git", "status", "--porcelain"), (toy / "params.yaml").read_text()
    variation = Variation(profile="base", overrides=("seed=7", "start=warm"))
    place = prepare(toy, variation)
    assert place == toy / "work" / "workspaces" / variation.name
    assert variation.name.startswith("base-")
    assert load_params(place / "params.yaml") == {
        "seed": 7, "start": "warm", "train": {"lr": 0.1},
    }  # fmt: skip
    assert (place / "work.py").read_text() == (toy / "work.py").read_text()
    assert (place / "new.txt").is_file()
    assert before == (sh(toy, "git", "status", "--porcelain"), (toy / "params.yaml").read_text())
    assert cache_folder(place) == cache_folder(toy)
    assert len(load_graph(place).nodes) == 4
    assert len(load_graph(toy).nodes) == 4  # the workspace's dvc.yaml is not one of ours


def test_a_second_run_goes_on_in_the_same_workspace(toy: Path) -> None:
    place = prepare(toy, Variation(overrides=("train.lr=1e-2",)))
    (place / "dvc.lock").write_text("schema: '2.0'\n")
    (place / "artifacts").mkdir()
    (toy / "work.py").write_text("# changed\n")
    assert prepare(toy, Variation(overrides=("train.lr=1e-2",))) == place
    assert (place / "work.py").read_text() == "# changed\n"
    assert (place / "dvc.lock").read_text() == "schema: '2.0'\n"
    assert (place / "artifacts").is_dir()
    assert load_params(place / "params.yaml")["train"]["lr"] == 0.01


def test_models_that_training_starts_from_come_along(toy: Path) -> None:
    last = toy / "data/start/last"
    last.mkdir(parents=True)
    (toy / "data/start/.gitignore").write_text("*\n!.gitignore\n")
    (last / "weights").write_text("first")
    variation = Variation(overrides=("start=data/start/last",))
    place = prepare(toy, variation)
    there = place / "data/start/last/weights"
    assert there.samefile(last / "weights")  # 28 GB are not copied
    assert sh(place, "git", "status", "--porcelain") == " M params.yaml\n"
    (last / "weights").unlink()
    (last / "weights").write_text("second")
    (last / "more").write_text("new")
    assert prepare(toy, variation) == place
    assert there.read_text() == "second"
    assert (place / "data/start/last/more").is_file()


def test_mistakes_are_messages(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile 'big': expected one of \['base'\]"):
        prepare(toy, Variation(profile="big"))
    with pytest.raises(ConfigError, match=r"'train\.lrr' does not exist; did you mean 'lr'"):
        prepare(toy, Variation(overrides=("train.lrr=1",)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="neither empty nor a workspace"):
        prepare(toy, Variation(profile="base"), tmp_path / "full")
    assert not Variation()
