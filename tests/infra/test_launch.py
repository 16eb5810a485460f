"""Launcher profiles, and that a stage does not outlive the process that started it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.errors import ConfigError
from infra.launch import PROFILES, LauncherProfile, load_profile, local_profile


def test_the_default_is_two_ranks_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLFOUNDRY_LAUNCHER", raising=False)
    profile = local_profile()
    assert (profile.name, profile.ranks, profile.threads, profile.data) == ("local", 2, 1, 2)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
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
        ConfigError, match=r"no launcher profile 'nowhere'; expected one of \['local"
    ):
        local_profile()


def test_a_layout_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 ranks cannot be shared by tensor 2 x pipeline 1"):
        LauncherProfile(ranks=3, tensor=2)
    with pytest.raises(ConfigError, match="threads is 0, expected 1 or more"):
        LauncherProfile(threads=0)
    with pytest.raises(ConfigError, match="limit_s is 0, expected more than 0, or null"):
        LauncherProfile(limit_s=0)


def test_a_stage_leaves_with_its_parent() -> None:
    stage = (
        "import time; from infra.launch import die_with_parent; die_with_parent();"
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
