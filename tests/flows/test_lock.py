"""A run that is refused changes nothing; one that was killed is waited for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.toy_project import sh
from vlfoundry.flows.lock import BusyError, run_lock
from vlfoundry.flows.workspace import Variation, workspace
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.git import GitError

pytestmark = pytest.mark.slow

START = """
import sys, time
from pathlib import Path
from vlfoundry.flows.workspace import Variation, workspace
from vlfoundry.infra.core.errors import UserError
folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
try:
    with workspace(Path(sys.argv[1]), Variation(overrides=(sys.argv[2],)), folder) as lock:
        time.sleep(1.5)
        print("held", (lock.root / "params.yaml").read_text().split()[1])
except UserError as error:
    print(error)
"""
# Takes the lock, gives it to a process that takes some time to end, and is killed.
KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from vlfoundry.flows.lock import run_lock
with run_lock(Path(sys.argv[1])) as lock:
    subprocess.Popen(["sleep", sys.argv[2]], pass_fds=(lock.descriptor,))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): fingerprint(path) for path in files}


def at_once(root: Path, *arguments: tuple[str, ...]) -> list[str]:
    """What processes said that prepared a workspace at the same moment."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(root), *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for words in arguments
    ]  # fmt: skip
    return [process.communicate(timeout=120)[0].strip() for process in running]


@pytest.mark.parametrize(
    ("variation", "named"),
    [
        (Variation(overrides=("seed=3",)), False),
        (Variation(profile="base"), False),
        (Variation(profile="base", overrides=("seed=3", "start=warm")), False),
        (Variation(), True),
    ],
)
def test_a_refused_run_changes_nothing(
    toy: Path, tmp_path: Path, variation: Variation, named: bool
) -> None:
    folder = tmp_path / "by hand" if named else None
    with workspace(toy, variation, folder) as lock:
        (lock.root / "dvc.lock").write_text("schema: '2.0'\n")
        (lock.root / "artifacts").mkdir()
        before = contents(lock.root), sh(lock.root, "git", "rev-parse", "HEAD")
        (toy / "work.py").write_text("# another source\n")
        (toy / "params.yaml").write_text("seed: 77\nstart: scratch\ntrain:\n  lr: 0.5\n")
        (toy / ".dvc" / "config.local").write_text("[core]\n    remote = other\n")
        (toy / "data/start/last").mkdir(parents=True)
        (toy / "data/start/last/weights").write_text("new")
        with (
            pytest.raises(BusyError, match=rf"a run \(process {os.getpid()}\) goes on in"),
            workspace(toy, variation, folder),
        ):
            pass
        assert (contents(lock.root), sh(lock.root, "git", "rev-parse", "HEAD")) == before
    with workspace(toy, variation, folder) as lock:  # its turn has come
        assert (lock.root / "work.py").read_text() == "# another source\n"
        assert (lock.root / "dvc.lock").read_text() == "schema: '2.0'\n"


def test_first_runs_at_once_in_one_workspace(toy: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "new")
    said = at_once(toy, *((f"seed={seed}", place) for seed in (11, 12, 13)))
    assert len([line for line in said if line.startswith("held 1")]) == 1, said
    assert len([line for line in said if ") goes on in " in line]) == 2, said


def test_first_runs_at_once_in_workspaces_of_their_own(toy: Path) -> None:
    (toy / "work.py").write_text("# not committed: each makes the same commit of it\n")
    said = at_once(toy, *((f"seed={seed}",) for seed in (11, 12, 13, 14)))
    assert said == ["held 11", "held 12", "held 13", "held 14"]


def test_a_run_that_was_killed_is_waited_for(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), "2"]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    began, said = time.monotonic(), list[str]()
    with run_lock(tmp_path, said.append):
        assert 0.5 < time.monotonic() - began < 10
    assert len(said) == 1
    assert "was killed; waiting for its stages to end" in said[0]


def test_dvc_lock_survives_a_kill_while_sources_change(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_the_checkout, of_the_run = "schema: '2.0'\n", "schema: '2.0'\nstages: {}\n"
    (toy / "dvc.lock").write_text(of_the_checkout)
    variation = Variation(overrides=("seed=3",))
    with workspace(toy, variation) as lock:
        (lock.root / "dvc.lock").write_text(of_the_run)
    from vlfoundry.infra.core import git as module

    def dies(root: Path, *words: str, **options: tuple[int, ...]) -> str:
        said = module.git(root, *words, **options)
        if words[0] == "checkout":
            raise GitError("killed behind the checkout")
        return said

    monkeypatch.setattr("vlfoundry.flows.workspace.git", dies)
    with pytest.raises(GitError), workspace(toy, variation):
        pass
    assert (lock.root / "dvc.lock").read_text() == of_the_checkout
    monkeypatch.undo()
    with workspace(toy, variation):
        assert (lock.root / "dvc.lock").read_text() == of_the_run
    assert not list((lock.root / "work").rglob("dvc.lock"))


def test_what_a_killed_git_has_left(toy: Path) -> None:
    variation = Variation(overrides=("seed=3",))
    with workspace(toy, variation) as lock:
        index = Path(sh(lock.root, "git", "rev-parse", "--git-path", "index.lock").strip())
    (lock.root / index).touch()
    with workspace(toy, variation):
        pass
    unborn = toy / "work" / "unborn"  # as far as `git worktree add` comes when it is killed
    sh(toy, "git", "worktree", "add", "--no-checkout", "--detach", str(unborn))
    (toy / ".git/worktrees/unborn/HEAD").unlink()
    (toy / ".git/worktrees/unborn/locked").write_text("initializing")
    with workspace(toy, variation, unborn):
        assert (unborn / "work.py").is_file()


def test_checkouts_are_no_workspaces(toy: Path, tmp_path: Path) -> None:
    sh(tmp_path, "git", "clone", "--quiet", str(toy), str(tmp_path / "other"))
    sh(toy, "git", "worktree", "add", "--quiet", "-b", "mine", str(tmp_path / "mine"))
    (toy / "work").mkdir(exist_ok=True)
    (toy / "work" / "file").touch()
    for place, said in (
        (toy, "is a checkout, not a workspace"),
        (tmp_path / "other", "is a checkout, not a workspace"),
        (tmp_path / "mine", "has branch 'mine' checked out"),
        (toy / "work.py", "is inside of the project"),
        (toy / "~" / "new", "is inside of the project"),
        (toy / "work" / "file", "is not a directory"),
    ):
        with pytest.raises(ConfigError, match=said), workspace(toy, Variation(), place):
            pass
        if place.is_dir():
            assert sh(place, "git", "status", "--porcelain") == ""
    assert sh(toy, "git", "symbolic-ref", "HEAD").startswith("refs/heads/")
