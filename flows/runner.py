"""Runs one DVC stage as a child process that leaves nothing behind.

DVC does not end its stage when DVC itself is ended, and a task of Prefect that times out does not
end its process. So every stage runs under `infra/core/guard.py`, in a session of its own: to stop
it, or to die, is to let go of the guard's standard input; the guard then ends the whole tree.
"""

import asyncio
import dataclasses
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from vlfoundry.infra.core.guard import command_line

State = Literal[
    "ran", "restored", "unchanged", "up to date", "failed", "timed out", "cancelled", "not run"
]
GOOD_STATES = frozenset({"ran", "restored", "unchanged", "up to date"})
STOP_GRACE_S = 10.0
"""A stopped stage has this long to save before it gets SIGTERM, and a quarter more before KILL."""
TAIL_LINES = 30
LINE_LIMIT_BYTES = 1 << 20
LAST_WORDS_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """How a stage ended."""

    name: str
    """The stage."""
    state: State
    """In one word; "restored" is DVC's run cache, "up to date" was not even asked."""
    seconds: float = 0.0
    """Wall time."""
    code: int | None = None
    """Exit status of DVC."""
    tail: tuple[str, ...] = ()
    """The last lines that it printed."""

    @property
    def good(self) -> bool:
        """Whether the stage's outputs are there and current."""
        return self.state in GOOD_STATES


def stage_environment() -> dict[str, str]:
    """The environment of a stage: this interpreter's programs first, output at once, no telemetry.

    Only what a run's results cannot depend on is set here.
    """
    programs = str(Path(sys.prefix) / "bin")
    return {
        **os.environ,
        "PATH": programs + os.pathsep + os.environ.get("PATH", ""),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "1",
    }


def dvc_command(name: str) -> list[str]:
    """`--wait-for-lock` is a global option of DVC: behind the subcommand it is an error."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]


async def run_stage(
    root: Path,
    name: str,
    *,
    timeout_s: float,
    stop: asyncio.Event,
    on_line: Callable[[str], None],
    grace_s: float = STOP_GRACE_S,
    held: tuple[int, ...] = (),
) -> StageResult:
    """Run one stage with DVC in `root`, and return how it ended; never raises for its failure.

    on_line: gets every line of output as it appears, DVC's own included.
    stop: once set, the stage is stopped and the state is "cancelled".
    held: file descriptors that guard and DVC keep open, even if we are killed.
    """
    began = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    states: list[State] = []

    def hear(line: str) -> None:
        tail.append(line)
        if seen := dvc_state(line, name):
            states.append(seen)
        on_line(line)

    code, ending = await run_guarded(
        dvc_command(name), root, timeout_s=timeout_s, stop=stop, on_line=hear, grace_s=grace_s,
        held=held,
    )  # fmt: skip
    state: State = ending or ("failed" if code else (states[-1] if states else "ran"))
    return StageResult(
        name=name, state=state, seconds=time.monotonic() - began, code=code, tail=tuple(tail)
    )


def dvc_state(line: str, name: str) -> State | None:
    """What a line of DVC's own output says about the stage."""
    if line == f"Running stage '{name}':":
        return "ran"
    if line.startswith(f"Stage '{name}' is cached - skipping run"):
        return "restored"
    if line.startswith(f"Stage '{name}' didn't change"):
        return "unchanged"
    return None


async def run_guarded(
    command: list[str],
    root: Path,
    *,
    timeout_s: float,
    stop: asyncio.Event,
    on_line: Callable[[str], None],
    grace_s: float,
    held: tuple[int, ...] = (),
) -> tuple[int, Literal["timed out", "cancelled"] | None]:
    """Run a command under the guard; its exit code, and how it was cut short, if it was."""
    process = await asyncio.create_subprocess_exec(
        *command_line(command, grace_s),
        cwd=root,
        env=stage_environment(),
        stdin=PIPE,
        stdout=PIPE,
        stderr=STDOUT,
        limit=LINE_LIMIT_BYTES,
        start_new_session=True,
        pass_fds=held,
    )
    reading = asyncio.create_task(_read_lines(process, on_line))
    ending_by_itself = asyncio.create_task(_ended(process.pid))
    stopping = asyncio.create_task(stop.wait())
    ending: Literal["timed out", "cancelled"] | None = None
    try:
        done, _ = await asyncio.wait(
            {ending_by_itself, stopping}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if ending_by_itself not in done:
            ending = "cancelled" if stopping in done else "timed out"
    finally:
        stopping.cancel()
        _let_go(process)
        try:
            # The guard needs grace_s, then a quarter of it, then a moment to kill.
            await asyncio.wait_for(ending_by_itself, grace_s * 1.25 + 10)
        finally:
            _kill_session(process)
        await asyncio.wait_for(reading, LAST_WORDS_S)
        await process.wait()
    assert process.returncode is not None
    return process.returncode, ending


async def _ended(pid: int) -> None:
    """Wait until a child has ended. `Process.wait` also waits for all who hold its output."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return  # ended and collected already
    loop.add_reader(watched, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)


async def _read_lines(process: Process, on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        on_line(line.decode("utf-8", "replace").rstrip("\r\n"))


def _let_go(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _kill_session(process: Process) -> None:
    """The last resort, should the guard itself have been killed: its group shares its number."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # as it should be
