"""Nothing that a stage started may outlive it, however it ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.toy_project import processes_marked, wait_for_the_end
from vlfoundry.flows.runner import run_guarded, run_stage
from vlfoundry.infra.core.guard import command_line

pytestmark = pytest.mark.slow

# A child in a session of its own, as an elastic launcher makes them, and a stubborn parent.
STUBBORN = "trap '' INT TERM; setsid sleep 300 & echo started; while true; do sleep 0.1; done"


def guarded(
    command: list[str], root: Path, *, timeout_s: float = 60, stop_after_s: float | None = None
) -> tuple[tuple[int, str | None], list[str]]:
    """Run a command under the guard; (exit code, ending) and its lines."""
    lines: list[str] = []

    async def scenario() -> tuple[int, str | None]:
        stop = asyncio.Event()
        if stop_after_s is not None:
            asyncio.get_running_loop().call_later(stop_after_s, stop.set)
        return await run_guarded(
            command, root, timeout_s=timeout_s, stop=stop, on_line=lines.append, grace_s=0.4
        )

    return asyncio.run(scenario()), lines


def test_exit_code_and_lines(tmp_path: Path) -> None:
    ended, lines = guarded(["sh", "-c", "echo one; echo two >&2; exit 3"], tmp_path)
    assert ended == (3, None)
    assert lines == ["one", "two"]


def test_a_command_ended_by_a_signal(tmp_path: Path) -> None:
    assert guarded(["sh", "-c", "kill -9 $$"], tmp_path)[0] == (137, None)


def test_a_time_limit_ends_the_whole_tree(tmp_path: Path, mark: str) -> None:
    (_, ending), lines = guarded(["sh", "-c", STUBBORN], tmp_path, timeout_s=1)
    assert (ending, lines) == ("timed out", ["started"])
    assert processes_marked(mark) == []


def test_a_stop_lets_the_command_save(tmp_path: Path, mark: str) -> None:
    code = (
        "import time\nprint('started', flush=True)\n"
        "try: time.sleep(300)\nexcept KeyboardInterrupt: print('saved')"
    )
    (_, ending), lines = guarded([sys.executable, "-c", code], tmp_path, stop_after_s=1)
    assert (ending, lines) == ("cancelled", ["started", "saved"])
    assert processes_marked(mark) == []


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path, mark: str) -> None:
    # As a killed DVC leaves its stage: a retry would start a second copy.
    ended, _ = guarded(["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 & exit 5"], tmp_path)
    assert ended == (5, None)
    assert processes_marked(mark) == []


def test_kill_9_of_the_owner_ends_everything(tmp_path: Path, mark: str) -> None:
    guard = command_line(["sh", "-c", STUBBORN], 0.4)
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen({guard!r}, stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(300)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"started\n"
    assert len(processes_marked(mark)) >= 4
    owner.kill()
    owner.wait()
    wait_for_the_end(mark, limit_s=5)


def test_kill_9_of_the_guard_ends_the_group(tmp_path: Path, mark: str) -> None:
    async def scenario() -> int:
        def kill_guard(line: str) -> None:
            assert line == "started"
            guard = next(c for c in _children(os.getpid()) if "sleep 300" in c[1])
            os.kill(guard[0], signal.SIGKILL)

        command = ["sh", "-c", "echo started; sleep 300; true"]
        code, _ = await run_guarded(
            command, tmp_path, timeout_s=60, stop=asyncio.Event(), on_line=kill_guard, grace_s=0.2
        )
        return code

    began = time.monotonic()
    assert asyncio.run(scenario()) == -signal.SIGKILL
    wait_for_the_end(mark, limit_s=5)
    assert time.monotonic() - began < 30


def _children(pid: int) -> list[tuple[int, str]]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found.append((int(child), Path(f"/proc/{child}/cmdline").read_text()))
    return found


def test_stage_states(toy: Path) -> None:
    async def run(name: str) -> str:
        result = await run_stage(
            toy, name, timeout_s=60, stop=asyncio.Event(), on_line=lines.append, grace_s=1
        )
        return result.state

    lines: list[str] = []
    assert asyncio.run(run("prepare")) == "ran"
    assert "hello from prepare" in lines
    assert asyncio.run(run("prepare")) == "unchanged"
    (toy / "dvc.lock").unlink()
    assert asyncio.run(run("prepare")) == "restored"
