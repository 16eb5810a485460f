"""Launcher profiles, and that a stage does not outlive the process that started it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.launch.profile import SHIPPED, ExecutionProfile, load_profile, local_profile


def test_the_default_is_two_ranks_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLFOUNDRY_LAUNCHER", raising=False)
    profile = local_profile()
    assert (profile.name, profile.ranks, profile.threads, profile.data) == ("local", 2, 1, 2)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_profile_loads(path: Path) -> None:
    assert load_profile(path.stem).name == path.stem


def test_the_environment_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wide.yaml").write_text("ranks: 8\ntensor: 2\npipeline: 2\n")
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(tmp_path / "wide.yaml"))
    assert (local_profile().name, local_profile().data) == ("wide", 2)
    (tmp_path / "wide.yaml").write_text("rank: 8\n")
    with pytest.raises(ConfigError, match="unknown key 'rank'; did you mean 'ranks'"):
        local_profile()
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", "nowhere")
    with pytest.raises(
        ConfigError,
        match=r"no launcher profile 'nowhere'; expected one of \['local'\] \(which come with",
    ):
        local_profile()


def test_a_launcher_of_the_project_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages run in the project; who asks from elsewhere says where it is."""
    own = tmp_path / "launchers"
    own.mkdir()
    (own / "local.yaml").write_text("ranks: 3\n")
    (own / "two nodes.yaml").write_text("ranks: 6\n")
    monkeypatch.delenv("VLFOUNDRY_LAUNCHER", raising=False)
    assert local_profile().ranks == 2
    assert local_profile(tmp_path).ranks == 3
    monkeypatch.chdir(tmp_path)
    assert local_profile().ranks == 3
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(own)
    assert local_profile().ranks == 3
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", "two nodes")
    assert (local_profile().name, local_profile().ranks) == ("two nodes", 6)
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", "launchers/two nodes.yaml")
    assert local_profile().ranks == 6
    with pytest.raises(
        ConfigError,
        match=rf"expected one of \['local', 'two nodes'\] \(files of launchers/ in {tmp_path}\)",
    ):
        load_profile("three", tmp_path)


def test_a_layout_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 ranks cannot be shared by tensor 2 x pipeline 1"):
        ExecutionProfile(ranks=3, tensor=2)
    with pytest.raises(ConfigError, match="threads is 0, expected 1 or more"):
        ExecutionProfile(threads=0)
    with pytest.raises(ConfigError, match="limit_s is 0, expected more than 0, or null"):
        ExecutionProfile(limit_s=0)


def test_a_stage_leaves_with_its_parent() -> None:
    stage = (
        "import time; from vlfoundry.infra.core.process import die_with_parent; die_with_parent();"
        "print('ready', flush=True); time.sleep(300)"
    )
    parent = subprocess.Popen(
        [
            sys.executable, "-c",
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, '-c', {stage!r}])\n"
            "print(child.pid, flush=True)\ntime.sleep(300)",
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (child,) = lines - {"ready"}
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: str) -> bool:
    """A zombie that nobody collects counts as gone."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
