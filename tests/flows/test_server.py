"""Prefect's server keeps a record; whatever becomes of it, a run ends as it would have."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.toy_project import processes_marked, steer, wait_for_the_end, wait_until
from vlfoundry.flows.database import fault, set_aside
from vlfoundry.flows.server import server

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "vlfoundry.flows.cli", "run"]
WAITS = """
sys.path.insert(0, os.environ["PYTHONPATH"])
from vlfoundry.infra.core.process import die_with_parent
die_with_parent()  # as every stage of ours
while not pathlib.Path("work/go").exists():
    pathlib.Path("work/started").touch()
    time.sleep(0.05)
"""
LAST = "pathlib.Path('work/last').touch()"


def marked(mark: str, part: str) -> list[psutil.Process]:
    """Processes of this test, that have `part` in their command line, guards left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = " ".join(process.cmdline())
            if process.environ().get("VLFOUNDRY_TEST_MARK") == mark and part in line:
                found.append(process)
    return found


def of_guard(process: psutil.Process) -> bool:
    return any(word.endswith("guard.py") for word in process.cmdline())


@pytest.fixture
def start(toy: Path, mark: str) -> Iterator[Callable]:
    """Starts `vlfoundry run`, and returns when its first stage runs and waits for work/go."""
    steer(toy, "prepare", WAITS)
    steer(toy, "score", LAST)
    running: list[subprocess.Popen] = []

    def begin(**environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            COMMAND, cwd=toy, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        )  # fmt: skip
        running.append(process)
        wait_until(
            lambda: (toy / "work/started").exists() or process.poll() is not None, "the first stage"
        )
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def ended_well(toy: Path, process: subprocess.Popen) -> str:
    """What a run has said that was let go on and ended in time; 4 stages, one line of the loss."""
    (toy / "work/go").touch()
    output, _ = process.communicate(timeout=120)
    assert time.time() - (toy / "work/last").stat().st_mtime < 10 + 3  # DVC stores what it made
    assert process.returncode == 0, output
    assert "total" in output
    assert output.count("ran") >= 4
    assert "Traceback" not in output
    assert "ERROR" not in output
    assert len(output.splitlines()) < 40, output
    return output


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_the_server_dies_or_hangs(toy: Path, start: Callable, mark: str, signum: int) -> None:
    process = start()
    victims = [p for p in marked(mark, "create_app") if not of_guard(p)]
    assert len(victims) == 1
    victims[0].send_signal(signum)
    time.sleep(2)
    output = ended_well(toy, process)
    assert output.count("record of this run is incomplete") == 1, output
    assert processes_marked(mark) == []


@pytest.mark.parametrize("answering", ["refused", "mute"])
def test_a_server_of_ones_own_that_does_not_answer(
    toy: Path, start: Callable, answering: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if answering == "refused":
            listener.close()
        process = start(PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        output = ended_well(toy, process)
    assert output.count("record of this run is incomplete") == 1, output


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh"])
def test_nothing_is_left_when_flow_and_guards_are_killed_at_once(
    start: Callable, mark: str, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("SHELL", shell)  # in which DVC starts a stage
    process = start()
    guards = [p for p in marked(mark, "guard.py") if of_guard(p)]
    assert len(guards) == 2
    for victim in (process, *guards):
        victim.kill()
    process.wait()
    wait_for_the_end(mark, limit_s=10)


def test_the_port_is_never_free(tmp_path: Path) -> None:
    """Between its choice and the server's start nobody can take it."""
    with (
        server(tmp_path) as running,
        socket.socket() as other,
        pytest.raises(OSError, match="Address already in use"),
    ):
        other.bind(("127.0.0.1", running.port))


def damage(path: Path, how: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE t (x TEXT)")
        database.executemany("INSERT INTO t VALUES (?)", [("word" * 200,)] * 300)
        database.commit()
    content = path.read_bytes()
    if how == "junk":
        path.write_bytes(os.urandom(5000))
    elif how == "cut":
        path.write_bytes(content[: len(content) // 3 + 100])
    elif how == "pages":
        path.write_bytes(content[:4096] + os.urandom(8192) + content[12288:])
    elif how == "directory":
        path.unlink()
        (path / "inside").mkdir(parents=True)


@pytest.mark.parametrize("how", ["junk", "cut", "pages", "directory"])
def test_a_damaged_database_is_moved_aside(tmp_path: Path, how: str) -> None:
    path, said = tmp_path / "prefect.db", list[str]()
    for _ in range(2):  # the second time another lies there already
        damage(path, how)
        path.with_name("prefect.db-wal").write_bytes(b"of the damaged one")
        why = fault(path)
        assert why
        set_aside(tmp_path, why, said.append)
        assert fault(path) is None
        assert [p.name for p in tmp_path.iterdir()] == ["prefect.db.damaged"]
    assert len(said) == 2
    assert "\n" not in said[0]


def test_a_good_database_stays(tmp_path: Path) -> None:
    path = tmp_path / "prefect.db"
    assert fault(path) is None
    path.touch()
    assert fault(path) is None
    path.unlink()
    damage(path, "not")
    assert fault(path) is None


def test_a_run_with_a_damaged_database(toy: Path, start: Callable) -> None:
    (toy / "work/prefect").mkdir(parents=True)
    damage(toy / "work/prefect/prefect.db", "junk")
    output = ended_well(toy, start())
    assert output.count("prefect.db") == 2
    assert "a new one is begun" in output
    assert "incomplete" not in output
    assert fault(toy / "work/prefect/prefect.db") is None


LATE_HEARTBEAT = """
import os, pathlib, sys
from vlfoundry.flows.server import prefect_environment
os.environ |= prefect_environment(pathlib.Path(sys.argv[1]))
import vlfoundry.flows.pipeline
from prefect.events import emit_event
from prefect.events.clients import PrefectEventsClient
from prefect.events.worker import EventsWorker

class Stopped:
    client_type = PrefectEventsClient
    def send(self, item):
        print("asked")
        raise RuntimeError("Cannot put items in a stopped service instance.")

EventsWorker.instance = classmethod(lambda cls, *_: Stopped())
emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": "prefect.flow-run.x"})
"""


def test_a_heartbeat_after_the_end_is_not_told(tmp_path: Path) -> None:
    """A run with nothing to do ended in Prefect's traceback of an event that came too late."""
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LATE_HEARTBEAT, str(tmp_path)],
        env=os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")
