"""A run with its own parameters gets its own place and leaves the checkout alone."""

import io
import shutil
import stat
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlfoundry.flows.cli
from tests.support.tiny_project import ROOT
from tests.support.toy_project import DVC_YAML, commit_all, reproduce, sh
from vlfoundry.flows.graph import load_graph
from vlfoundry.flows.launch import run_pipeline
from vlfoundry.flows.terminal import Terminal
from vlfoundry.flows.workspace import Variation, workspace
from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.core.dvccache import cache_folder
from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.core.project import find_root
from vlfoundry.infra.registry.gto import resolve_model

pytestmark = pytest.mark.slow


def prepare(root: Path, variation: Variation, folder: Path | None = None) -> Path:
    """The workspace, its lock let go again."""
    with workspace(root, variation, folder) as lock:
        return lock.root


def make_checkout(root: Path) -> None:
    """Give a project code, which is then part of its runs."""
    for name in ("stages", "vlfoundry/stages"):
        (root / name).mkdir(parents=True)


def test_profile_and_overrides_reach_params_yaml(toy: Path) -> None:
    make_checkout(toy)
    (toy / "work.py").write_text((toy / "work.py").read_text() + "# not committed\n")
    (toy / "stages" / "new.py").write_text("# not even tracked\n")
    before = sh(toy, "git", "status", "--porcelain"), (toy / "params.yaml").read_text()
    variation = Variation(profile="base", overrides=("seed=7", "start=warm"))
    place = prepare(toy, variation)
    assert place == toy / "work" / "workspaces" / variation.name
    assert variation.name.startswith("base-")
    assert load_params(place / "params.yaml") == {
        "seed": 7, "start": "warm", "train": {"lr": 0.1},
    }  # fmt: skip
    assert (place / "work.py").read_text() == (toy / "work.py").read_text()
    assert (place / "stages" / "new.py").is_file()
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


def test_what_dvc_add_keeps_comes_along(toy: Path) -> None:
    for name in ("data/raw/a.bin", "data/raw/deep/b.bin", "big rows.txt"):
        (toy / name).parent.mkdir(parents=True, exist_ok=True)
        (toy / name).write_text("first")
    dvc = [sys.executable, "-m", "dvc", "add", "--quiet", "data/raw", "big rows.txt"]
    sh(toy, *dvc)
    commit_all(toy)
    variation = Variation(overrides=("seed=7",))
    place = prepare(toy, variation)
    assert (place / "data/raw/deep/b.bin").samefile(toy / "data/raw/deep/b.bin")
    assert (place / "big rows.txt").read_text() == "first"
    (toy / "big rows.txt").unlink()
    (toy / "big rows.txt").write_text("second, and longer")
    assert prepare(toy, variation) == place
    assert (place / "big rows.txt").read_text() == "second, and longer"
    assert sh(place, "git", "status", "--porcelain") == " M params.yaml\n"
    (toy / "big rows.txt").unlink()  # as in a fresh clone, before `dvc pull`
    prepare(toy, variation)


def test_mistakes_are_messages(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"'big': expected one of \['base'\] \(files of profiles/\) or \[.*'hour', ",
    ):
        prepare(toy, Variation(profile="big"))
    with pytest.raises(ConfigError, match=r"'train\.lrr' does not exist; did you mean 'lr'"):
        prepare(toy, Variation(overrides=("train.lrr=1",)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="neither empty nor a workspace"):
        prepare(toy, Variation(profile="base"), tmp_path / "full")
    assert not Variation()


def test_a_stage_that_is_not_there_leaves_no_workspace(toy: Path) -> None:
    with pytest.raises(ConfigError, match="no stage 'foo' in"):
        run_pipeline(
            toy, stages=("foo",), variation=Variation(profile="base"),
            terminal=Terminal(io.StringIO()),
        )  # fmt: skip
    assert not (toy / "work" / "workspaces").exists()


def test_secrets_stay_where_they_are(toy: Path) -> None:
    """Keys in DVC's own file keep their mode; what nobody names is in no commit of a run."""
    local = toy / ".dvc" / "config.local"
    local.write_text("['remote \"store\"']\n    url = s3://b/c\n    access_key_id = K\n")
    local.chmod(0o600)
    (toy / "dvc.yaml").write_text(
        DVC_YAML.replace("[source.txt, work.py]", "[source.txt, work.py, data/chat]")
    )
    private = (".env", "notes/password.txt", "data/.env", "key.pem", "a b\n.txt", "data/chat/.env")
    needed = ("data/chat/mine.jsonl", "profiles/mine.yaml", "launchers/big.yaml", "raw.dvc")
    for name in (*private, *needed):
        (toy / name).parent.mkdir(parents=True, exist_ok=True)
        (toy / name).write_text("outs: [] # secret")
        (toy / name).chmod(0o600)
    said: list[str] = []
    with workspace(toy, Variation(overrides=("seed=7",)), say=said.append) as lock:
        place = lock.root
    kept = place / ".dvc" / "config.local"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert "access_key_id = K" in kept.read_text()
    assert [name for name in private if (place / name).exists()] == []
    assert [name for name in needed if not (place / name).exists()] == []
    commit = sh(place, "git", "rev-parse", "HEAD").strip()
    assert not set(private) & set(
        sh(toy, "git", "ls-tree", "-rz", "--name-only", commit).split("\0")
    )
    assert any("left out of the run: 6 files that git does not know" in line for line in said)
    assert "refs/runs/" in sh(toy, "git", "for-each-ref", "--points-at", commit)


def test_a_project_below_the_root_of_its_repository_is_refused_at_once(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = tmp_path / "outer"
    (outer / "inner").mkdir(parents=True)
    sh(outer, "git", "init", "--quiet")
    for name in ("dvc.yaml", "params.yaml", ".dvc"):
        source, target = toy / name, outer / "inner" / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    monkeypatch.chdir(outer / "inner")
    with pytest.raises(ConfigError, match=r"has to be the root of its own.* or run `git init` in"):
        find_root()
    with pytest.raises(ModelError, match=r"registered names need a project: .*git init"):
        resolve_model("champion")
    before = sorted(path for path in outer.rglob("*") if ".git" not in path.parts)
    for command in (["run", "--set", "seed=2"], ["models"], ["register", "x"], ["lineage", "x"]):
        ended = CliRunner().invoke(vlfoundry.flows.cli.app, command)
        assert isinstance(ended.exception, ConfigError), command
    assert sorted(path for path in outer.rglob("*") if ".git" not in path.parts) == before
    sh(outer / "inner", "git", "init", "--quiet")
    assert find_root() == outer / "inner"


@pytest.mark.parametrize("damage", ["cut", "empty", "junk"])
def test_a_torn_lock_is_not_taken_along_nor_kept(toy: Path, damage: str) -> None:
    """As it is for a moment while DVC writes it, or for good after a crash."""
    reproduce(toy)
    whole = (toy / "dvc.lock").read_text()
    torn = {"cut": whole[: len(whole) // 2], "empty": "", "junk": "{{"}[damage]
    (toy / "dvc.lock").write_text(torn)
    place = prepare(toy, Variation(overrides=("seed=7",)))
    assert not (place / "dvc.lock").exists()
    (place / "dvc.lock").write_text(torn)
    assert prepare(toy, Variation(overrides=("seed=7",))) == place
    assert not (place / "dvc.lock").exists()
    (toy / "dvc.lock").write_text(whole)
    (place / "dvc.lock").write_text(whole)
    prepare(toy, Variation(overrides=("seed=7",)))
    assert (place / "dvc.lock").read_text() == whole


def test_nothing_is_made_for_parameters_that_a_stage_refuses(tmp_path: Path) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    sh(tmp_path, "git", "init", "--quiet")
    with pytest.raises(ConfigError, match="steps"):
        prepare(tmp_path, Variation(overrides=("contrastive.train.steps=[1,2]",)))
    assert not (tmp_path / "work").exists()
    assert sh(tmp_path, "git", "for-each-ref") == ""
    with pytest.raises(ConfigError, match=r"no profile '\.\./params'"):
        prepare(tmp_path, Variation(profile="../params"))


def test_a_key_among_the_sources_is_no_source(toy: Path) -> None:
    make_checkout(toy)
    (toy / "stages/id_rsa").write_text("secret")
    (toy / "stages/service.json").write_text("secret")
    (toy / "stages/new.py").write_text("# mine")
    place = prepare(toy, Variation(overrides=("seed=7",)))
    assert sorted(path.name for path in (place / "stages").iterdir()) == ["new.py"]


def test_folders_of_code_are_the_users_own_where_there_is_none_of_ours(toy: Path) -> None:
    for name in ("models/notes.py", "eval/mine.yaml", "profiles/mine.yaml", "launchers/mine.yaml"):
        (toy / name).parent.mkdir(exist_ok=True)
        (toy / name).write_text("")
    place = prepare(toy, Variation(overrides=("seed=7",)))
    assert not (place / "models").exists()
    assert not (place / "eval").exists()
    assert (place / "profiles/mine.yaml").is_file()
    assert (place / "launchers/mine.yaml").is_file()


@pytest.mark.parametrize("name", ["vlfoundry.py", "vlfoundry/__init__.py"])
def test_a_project_must_not_hide_the_code(toy: Path, name: str) -> None:
    (toy / name).parent.mkdir(exist_ok=True)
    (toy / name).touch()
    with pytest.raises(ConfigError, match="Python takes it for VLFoundry"):
        find_root(toy)
    (toy / "vlfoundry/stages").mkdir(parents=True)  # a checkout
    assert find_root(toy) == toy
