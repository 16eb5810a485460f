"""A run may be killed anywhere and at any moment: nothing is lost, hangs or stays behind.

`ACCEPT_KILLS` and `ACCEPT_SEED` choose how many kills and which.
"""

import collections
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accept.siege import Project, besiege, make_project
from tests.support.toy_project import make_toy, reproduce, sh

pytestmark = pytest.mark.accept

KILLS = int(os.environ.get("ACCEPT_KILLS", "40"))
SEED = int(os.environ.get("ACCEPT_SEED", "0"))
Record = Callable[[str, Any], None]
# Loaded by every Python process of a run: the clock of each jumps by up to a day, once a second.
JUMPING = """
import random, time
_time, _hop = time.time, random.Random()
def _jump():
    _hop.seed(int(time.monotonic()))
    return _time() + _hop.choice((-86400, -61, 0, 7, 86400))
time.time = _jump
"""
REGISTER = """
import sys
from pathlib import Path
from vlfoundry.infra.registry.gto import register_model
print(register_model(Path.cwd(), Path(sys.argv[1]), promote="champion").ref)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A small project, and what an undisturbed run of it makes."""
    made = make_project(tmp_path_factory.mktemp("kills") / "vlfoundry")
    made.whole()
    return made


def test_kills_of_any_process_at_any_moment(project: Project, record_property: Record) -> None:
    outcome = besiege(project, KILLS, SEED)
    for name in ("runs", "different", "hung", "left"):
        record_property(name, getattr(outcome, name))
    for what in ("stage", "victims"):
        counted = collections.Counter(str(getattr(kill, what)) for kill in outcome.kills)
        record_property(f"kills_by_{what}", dict(sorted(counted.items())))
    record_property("slowest_end_s", max((kill.ended_s for kill in outcome.kills), default=0))
    assert len(outcome.kills) == KILLS
    assert outcome.different == 0
    assert outcome.hung == []
    assert outcome.left == []


def test_a_clock_that_jumps_changes_nothing(project: Project, tmp_path: Path) -> None:
    """In every process of the run, while one kill strikes; and files of tomorrow lie about."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    project.environment["PYTHONPATH"] = str(tmp_path)
    try:
        outcome = besiege(project, min(KILLS, 2), SEED + 1)
        assert (outcome.different, outcome.hung, outcome.left) == (0, [], [])
        tomorrow = time.time() + 86400
        for path in (project.root / "artifacts").rglob("*"):
            os.utime(path, (tomorrow, tomorrow))
        process = project.start()
        process.wait(600)
        assert project.ended_well(process), project.output
        assert project.made() == project.expected
    finally:
        del project.environment["PYTHONPATH"]


@pytest.mark.parametrize("seconds", [0, -3600], ids=["one second", "clock set back"])
def test_the_last_registration_is_the_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Two registrations whose tags carry the same second, or the second one an earlier time."""
    root = make_toy(tmp_path / "toy")
    began = 1_790_000_000
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    versions = []
    for number in range(2):
        (root / "params.yaml").write_text(f"seed: {number}\nstart: scratch\ntrain: {{lr: 0.1}}\n")
        reproduce(root)
        when = f"{began + number * seconds} +0000"
        for name in ("GIT_COMMITTER_DATE", "GIT_AUTHOR_DATE"):
            monkeypatch.setenv(name, when)
        versions.append(sh(root, sys.executable, "-c", REGISTER, "artifacts/train/a").strip())
    assert len(set(versions)) == 2
    listed = sh(root, sys.executable, "-m", "vlfoundry.flows.cli", "models").splitlines()
    champions = [line for line in listed if "#champion" in line]
    assert len(champions) == 1, listed
    assert champions[0].startswith(versions[1])


def test_two_registrations_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_toy(tmp_path / "toy")
    reproduce(root)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", REGISTER]
    running = [
        subprocess.Popen(
            [*command, f"artifacts/train/{name}"],
            cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    listed = sh(root, sys.executable, "-m", "vlfoundry.flows.cli", "models")
    for version in said:
        assert version in listed
