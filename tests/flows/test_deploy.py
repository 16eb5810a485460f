"""What a deployment may be asked for, and who keeps whom out; without a server."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from tests.support.toy_project import wait_until
from vlfoundry.flows.cli import app
from vlfoundry.flows.deploy import Deployment, pool_of, prefect_yaml
from vlfoundry.flows.flowrun import COMMAND
from vlfoundry.flows.kept import connect, keep, kept
from vlfoundry.flows.lock import BusyError, run_lock
from vlfoundry.flows.marks import is_held, mark
from vlfoundry.flows.turn import turn
from vlfoundry.infra.core.errors import ConfigError, UserError

pytestmark = pytest.mark.slow

HOLDS = """
import sys, time
from pathlib import Path
from vlfoundry.flows.marks import mark
with mark(Path(sys.argv[1]), "a mark", "somebody") as taken:
    print(taken is not None, flush=True)
    time.sleep(60)
"""
RUNS = """
import sys, time
from pathlib import Path
from vlfoundry.flows.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""

TURNS = """
import asyncio, subprocess
from vlfoundry.flows.worker import Pulse
run = subprocess.Popen(["sleep", "100"])
async def turns(pulse):
    beating = asyncio.create_task(pulse.beat())
    await asyncio.sleep(0.3)
    STUCK
with Pulse(lambda line: print(line, flush=True), limit_s=2) as pulse:
    pulse.code = 7
    asyncio.run(turns(pulse))
run.kill()
run.wait()
"""


def started(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A Python process, once it has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"name": "a/b"}, "name 'a/b': expected a name without any of"),
        ({"name": " "}, "name ' ': expected"),
        ({"pool": "a%b"}, "--pool 'a%b': expected"),
        ({"every": "1"}, "--every '1': expected a number above 0 and a unit"),
        ({"every": "0h"}, "--every '0h': expected"),
        ({"every": "99999999999w"}, "--every '99999999999w': expected"),
        ({"every": "1d", "cron": "0 3 * * *"}, "got --cron and --every, expected one of them"),
        ({"timezone": "Mars/Base"}, "--timezone 'Mars/Base': expected a name such as UTC"),
        ({"if_busy": "later"}, "--if-busy 'later': expected one of ['wait', 'refuse']"),
    ],
)
def test_what_cannot_be_deployed(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Deployment(**{"name": "nightly"} | asked)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "cron", ["", "0 3 * *", "61 3 * * *", "R 3 * * *", "0 3 * * * 7", "@daily"]
)
def test_a_cron_that_prefect_could_not_read(cron: str) -> None:
    with pytest.raises(ConfigError, match="expected minute, hour, day of the month"):
        Deployment(name="nightly", cron=cron).check_cron()


def test_the_field_of_a_cron_that_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'0 25 \* 13 \*': the hour cannot be '25'; the month "):
        Deployment(name="nightly", cron="0 25 * 13 *").check_cron()


def test_what_can_be_deployed() -> None:
    Deployment(name="nightly", cron="*/5 3-7 * * mon").check_cron()
    Deployment(name="nightly").check_cron()
    every = Deployment(name="nightly", every="36h").interval()
    assert every is not None
    assert every.total_seconds() == 36 * 3600


def test_no_server(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    monkeypatch.chdir(toy)
    try:
        with pytest.raises(UserError, match="start one with `vlfoundry server`"):
            connect(toy)
        os.environ["PREFECT_API_URL"] = ""  # set to nothing is not set
        with pytest.raises(UserError, match="start one with `vlfoundry server`"):
            connect(toy)
        os.environ["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
        with pytest.raises(UserError, match=r"at http://127\.0\.0\.1:9/api does not answer"):
            connect(toy)
        asked = CliRunner().invoke(app, ["server", "--env"])
        assert "no Prefect server is kept" in str(asked.exception)
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_port_that_is_taken(toy: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: the port is taken; name another"):
            keep(toy, "127.0.0.1", port, print)
    with pytest.raises(UserError, match="is no port"):
        keep(toy, "127.0.0.1", 70000, print)
    assert kept(toy) is None


def test_a_mark_is_held_while_a_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "marks" / "one"
    assert not is_held(path)
    other = started(HOLDS, path)
    assert is_held(path)
    with mark(path, "a mark", "us") as taken:
        assert taken is None
    assert path.read_text() == "somebody"
    other.kill()
    other.communicate()
    assert not is_held(path)
    with mark(path, "a mark", "us") as taken:
        assert taken is not None
        assert is_held(path)
    assert path.read_text() == "us"


def test_deployed_runs_take_turns(tmp_path: Path) -> None:
    asked, said = ["weekly", ["sft@full"], []], list[str]()
    other = started(HOLDS, tmp_path / "work/deployed.lock")
    refused = turn(tmp_path, "blue-fox", asked, said.append, wait=False)
    with pytest.raises(BusyError, match="the run somebody of this project is at work"), refused:
        raise AssertionError
    assert said == []
    os.kill(other.pid, signal.SIGCONT)
    subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -9 {other.pid}"])
    began = time.monotonic()
    with turn(tmp_path, "blue-fox", asked, said.append, wait=True) as begin:
        assert time.monotonic() - began > 1
        assert said == ["the run somebody of this project is at work; waiting for its end"]
        same = turn(tmp_path, "red-fox", asked, said.append, wait=True)
        with pytest.raises(BusyError, match="the same parameters is waiting already"), same:
            raise AssertionError
        begin()
        later = turn(tmp_path, "red-fox", asked, said.append, wait=False)
        with pytest.raises(BusyError, match="the run blue-fox of this project"), later:
            raise AssertionError
    other.communicate()


def test_a_run_waits_for_another(tmp_path: Path) -> None:
    said = list[str]()
    other = started(RUNS, tmp_path, "1.5")
    with pytest.raises(BusyError, match=f"process {other.pid}"), run_lock(tmp_path, said.append):
        raise AssertionError
    with run_lock(tmp_path, said.append, wait=True):
        wait_until(lambda: other.poll() is not None, "the end of the other", limit_s=5)
    assert said == [f"a run (process {other.pid}) goes on in {tmp_path}; waiting for it to end"]
    other.communicate()


@pytest.mark.parametrize(
    ("stuck", "code"), [("while True: pass", 7), ("await asyncio.sleep(3)", 0)]
)
def test_a_loop_that_stands_still_ends_the_worker(stuck: str, code: int) -> None:
    """With its runs, which would keep the pipe open; one that turns is left alone."""
    done = subprocess.run(
        [sys.executable, "-c", TURNS.replace("STUCK", stuck)],
        stdout=subprocess.PIPE, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (done.returncode, "the worker hangs" in done.stdout) == (code, code != 0)


def test_the_prefect_yaml_of_a_project(tmp_path: Path) -> None:
    root = tmp_path / "it's: my <team>"
    facts = YAML(typ="safe", pure=True).load(prefect_yaml(root))
    (deployment,) = facts["deployments"]
    assert facts["name"] == root.name
    assert deployment["entrypoint"] == "vlfoundry.flows.deployed.pipeline"
    assert deployment["work_pool"]["name"] == pool_of(root) == "it's: my -team-"
    assert deployment["work_pool"]["job_variables"] == {
        "command": COMMAND, "working_dir": "{{ $PWD }}",
    }  # fmt: skip
    del facts["deployments"][0]["parameters"]["if_busy"]
    assert deployment["parameters"] == {"profile": None, "stages": [], "overrides": []}
