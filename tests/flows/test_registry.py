"""Versions and standings as GTO tags, and weights that come back from DVC's cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy_project import PARAMS_YAML, commit_all, reproduce, sh
from vlfoundry.flows.fetch import fetch
from vlfoundry.flows.launch import finish
from vlfoundry.flows.start import import_model
from vlfoundry.infra.core.dvccache import cache_folder, md5_of, object_path
from vlfoundry.infra.core.errors import DataError, ModelError
from vlfoundry.infra.core.git import git
from vlfoundry.infra.registry.gto import (
    find_version,
    list_models,
    register_model,
    register_passed,
    resolve_model,
)

pytestmark = pytest.mark.slow

MODEL = Path("artifacts/train/a")


def test_register_retrain_promote_resolve(trained: Path) -> None:
    root, before = trained, (sh(trained, "git", "rev-parse", "HEAD"), sh(trained, "git", "status"))
    first_weights = (root / MODEL / "weights").read_text()
    first = register_model(root, MODEL, promote="champion")
    assert (first.ref, first.stages, first.path) == ("toy_a@v0.1.0", ("champion",), str(MODEL))
    assert register_model(root, root / MODEL, promote="champion") == first  # same weights, once
    assert before == (sh(root, "git", "rev-parse", "HEAD"), sh(root, "git", "status"))
    assert "train@a" in git(root, "show", f"{first.commit}:dvc.lock")

    (root / "params.yaml").write_text(PARAMS_YAML.replace("0.001", "0.5"))
    reproduce(root)
    second = register_model(root, MODEL)
    assert (second.ref, second.stages) == ("toy_a@v0.2.0", ())
    assert second.commit != first.commit
    other = register_model(root, Path("artifacts/train/b"), promote="champion")
    assert other.ref == "toy_b@v0.1.0"

    def weights(ref: str) -> str:
        return (resolve_model(ref) / "weights").read_text()

    assert weights("toy_a@v0.1.0") == weights("toy_a") == weights("toy_a#champion") == first_weights
    assert weights("toy_b#champion") == (root / "artifacts/train/b/weights").read_text()
    assert weights("toy_a@v0.2.0") == (root / MODEL / "weights").read_text() != first_weights
    assert weights(str(MODEL)) == weights("toy_a@v0.2.0")

    register_model(root, MODEL, promote="champion")
    assert {version.ref: version.stages for version in list_models(root)} == {
        "toy_a@v0.1.0": (), "toy_a@v0.2.0": ("champion",), "toy_b@v0.1.0": ("champion",),
    }  # fmt: skip
    assert weights("toy_a#champion") == weights("toy_a@v0.2.0")


def test_gto_reads_our_tags(trained: Path) -> None:
    import gto.api

    register_model(trained, MODEL, promote="champion")
    shown = gto.api.show(str(trained), "toy_a#champion")
    assert [(entry["artifact"], entry["version"]) for entry in shown] == [("toy_a", "v0.1.0")]


def test_an_unknown_name_lists_the_known_ones(trained: Path) -> None:
    with pytest.raises(ModelError, match=r"no model 'nobody'.*none is registered yet"):
        resolve_model("nobody")
    register_model(trained, MODEL, promote="champion")
    with pytest.raises(ModelError, match=r"registered: toy_a@v0\.1\.0 #champion"):
        resolve_model("toy_a@v9.0.0")


def test_what_is_not_the_pipelines_is_refused(trained: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        register_model(trained, Path("profiles"))
    (trained / MODEL / "weights").write_text("touched")
    with pytest.raises(DataError, match=r"not what dvc\.lock says: weights differ"):
        register_model(trained, MODEL)
    assert list_models(trained) == ()


def test_a_damaged_cache_is_noticed(trained: Path) -> None:
    version = register_model(trained, MODEL)
    cached = [
        path
        for path in (trained / ".dvc/cache/files/md5").rglob("*")
        if path.is_file() and path.read_bytes().startswith(b"train-a")
    ]
    assert len(cached) == 1
    cached[0].chmod(0o644)
    cached[0].write_text("rotten")
    with pytest.raises(DataError, match=r"weights in DVC's cache is damaged"):
        resolve_model(version.ref)
    cached[0].unlink()
    with pytest.raises(DataError, match=r"DVC's cache in .* lacks"):
        resolve_model(version.ref)


def test_the_gate_decides(trained: Path) -> None:
    gate = trained / "artifacts/gate/gate.json"
    assert register_passed(trained) is None
    gate.parent.mkdir()
    gate.write_text(json.dumps({"passed": False, "model": str(MODEL)}))
    assert register_passed(trained) is None
    gate.write_text(json.dumps({"passed": True, "model": str(MODEL)}))
    passed = register_passed(trained)
    assert passed is not None
    assert passed[0].stages == ("champion",)
    assert passed[1] is None
    assert register_passed(trained) == passed


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        (None, "did not compare it with toy_a@v0.1.0, which it replaces"),
        ({"name": "data/start/other"}, "did not compare it with toy_a@v0.1.0, which it replaces"),
        ({"name": "toy_a@v0.1.0"}, ""),
    ],
)
def test_a_champion_that_was_not_compared_with_is_not_replaced_in_silence(
    trained: Path, baseline: dict[str, str] | None, said: str
) -> None:
    register_model(trained, MODEL, promote="champion")
    (trained / "params.yaml").write_text(PARAMS_YAML.replace("0.001", "0.5"))
    reproduce(trained)
    gate = trained / "artifacts/gate/gate.json"
    gate.parent.mkdir()
    gate.write_text(json.dumps({"passed": True, "model": str(MODEL), "baseline": baseline}))
    first, *notes = finish(trained).lines
    assert first.startswith("gate: promoted; champion: toy_a@v0.2.0")
    assert (said in "".join(notes)) if said else not notes
    assert len(finish(trained).lines) == 1  # it is the champion now


def test_a_committed_run_is_registered_at_head(trained: Path) -> None:
    commit_all(trained)
    assert register_model(trained, MODEL).commit == git(trained, "rev-parse", "HEAD")
    assert git(trained, "for-each-ref", "refs/runs") == ""


def test_models_and_register_on_the_command_line(trained: Path) -> None:
    def vlfoundry(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vlfoundry.flows.cli", *arguments],
            cwd=trained, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip

    assert "no model is registered yet" in vlfoundry("models").stdout
    assert "toy_a@v0.1.0" in vlfoundry("register", str(MODEL), "--promote", "champion").stdout
    assert "#champion" in vlfoundry("models").stdout
    refused = vlfoundry("register", "profiles")
    assert refused.returncode == 2
    assert refused.stderr.startswith("vlfoundry: ")
    assert "Traceback" not in refused.stderr


def test_a_stage_that_models_of_two_kinds_have_is_not_one_of_them(trained: Path) -> None:
    register_model(trained, MODEL, promote="champion")
    assert find_version(trained, "champion").ref == "toy_a@v0.1.0"
    register_model(trained, Path("artifacts/train/b"), promote="champion")
    several = r"toy_a#champion \(toy_a@v0\.1\.0\), toy_b#champion \(toy_b@v0\.1\.0\); say which"
    for ask in (find_version, lambda root, ref: resolve_model(ref, root)):
        with pytest.raises(ModelError, match=rf"'champion' is several models: {several}"):
            ask(trained, "champion")
    assert find_version(trained, "toy_b#champion").ref == "toy_b@v0.1.0"
    assert find_version(trained, "toy_a").ref == "toy_a@v0.1.0"
    with pytest.raises(ModelError, match="several models"):
        import_model(trained, "champion", trained / "data/start/champion")
    assert not (trained / "data/start/champion").exists()


def test_a_second_machine_fetches_from_a_remote_that_came_after_the_run(
    trained: Path, tmp_path: Path
) -> None:
    version = register_model(trained, MODEL)
    dvc = (sys.executable, "-m", "dvc")
    sh(trained, *dvc, "remote", "add", "--quiet", "--default", "store", str(tmp_path / "store"))
    sh(trained, *dvc, "push", "--quiet")
    second = tmp_path / "second"
    sh(tmp_path, "git", "clone", "--quiet", str(trained), str(second))
    with pytest.raises(DataError, match=r"`vlfoundry fetch MODEL` gets a model"):
        resolve_model(version.ref, second)
    with pytest.raises(DataError, match=r"DVC could not fetch toy_a@v0\.1\.0.*; `dvc remote"):
        fetch(second, version.ref)
    # As people write it: relative to .dvc, and only in the file that is not committed.
    (second / ".dvc/config").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n"
    )
    assert "toy_a@v0.1.0" in fetch(second, "toy_a")
    folder = resolve_model(version.ref, second)
    assert (folder / "weights").read_bytes() == (trained / MODEL / "weights").read_bytes()
    assert sh(second, "git", "worktree", "list").count("\n") == 1
    assert not (second / "work/fetch").exists()
    shutil.rmtree(cache_folder(second))
    # One that was killed has left its worktree; another died before git knew of its own.
    sh(second, "git", "worktree", "add", "--quiet", "--detach", "work/fetch", version.commit)
    fetch(second, "toy_a")
    (second / "work/fetch/half").mkdir(parents=True)
    fetch(second, "toy_a")
    assert sh(second, "git", "worktree", "list").count("\n") == 1
    assert not (second / "work/fetch").exists()


def overwrite(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"x" * path.stat().st_size)


def test_a_folder_is_not_fetched(toy: Path) -> None:
    with pytest.raises(ModelError, match="is a folder, which is here already; expected a reg"):
        fetch(toy, str(toy))
    with pytest.raises(ModelError, match="no model 'nope'"):
        fetch(toy, "nope")


def test_what_is_fetched_is_what_the_run_made(trained: Path, tmp_path: Path) -> None:
    version = register_model(trained, MODEL)
    dvc = (sys.executable, "-m", "dvc")
    store, target = tmp_path / "store", trained / "data/start/it"
    sh(trained, *dvc, "remote", "add", "--quiet", "--default", "store", str(store))
    sh(trained, *dvc, "push", "--quiet")
    md5 = md5_of(trained / MODEL / "weights")
    here = object_path(cache_folder(trained), md5)
    overwrite(here)
    with pytest.raises(DataError, match=r"weights in DVC's cache is damaged .*vlfoundry fetch"):
        import_model(trained, version.ref, target)
    assert list(target.parent.iterdir()) == []
    here.unlink()
    (here / "inside").mkdir(parents=True)  # nobody's file
    fetch(trained, version.ref)
    import_model(trained, version.ref, target)
    assert md5_of(target / "weights") == md5
    overwrite(here)
    overwrite(store / "files" / "md5" / md5[:2] / md5[2:])
    with pytest.raises(DataError, match=r"remote has other bytes of toy_a@v0\.1\.0"):
        fetch(trained, version.ref)
    assert not here.exists()


@pytest.mark.parametrize("stage", ["bad stage!", "", "Champion", "a/b"])
def test_a_stage_that_cannot_be_named_is_refused_before_anything_is_registered(
    trained: Path, stage: str
) -> None:
    with pytest.raises(ModelError, match="is not the name of a stage"):
        register_model(trained, MODEL, promote=stage)
    assert list_models(trained) == ()
