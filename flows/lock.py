"""Only one run in a workspace: DVC's own locks do not keep two runs apart.

The lock belongs to the run and to every process that it starts for its stages: the guards and DVC
inherit it. So a run that was killed holds it until its last step has saved and left, and the next
run waits for that.
"""

import contextlib
import dataclasses
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.files import cannot_write
from vlfoundry.infra.core.space import no_space

LOCK_FILE = Path("work/run.lock")
PATIENCE_S = 60.0
"""How long a run waits for what a killed one has left; a stage has 12.5 s to save."""
POLL_S = 0.1


class BusyError(UserError):
    """Another run goes on in the same workspace."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLock:
    """The right to change a workspace."""

    root: Path
    """The workspace."""
    descriptor: int
    """What the processes of its stages inherit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Owner:
    """The process that took the lock. Its number alone may by now be another's."""

    pid: int
    started: str
    host: str

    @property
    def lives(self) -> bool:
        """Whether it still runs; a zombie does not, and of another machine we cannot know."""
        return self.host != socket.gethostname() or _started(self.pid) == self.started


@contextlib.contextmanager
def run_lock(
    root: Path, say: Callable[[str], None] = print, *, wait: bool = False
) -> Iterator[RunLock]:
    """Hold the lock of the workspace `root`.

    Args:
        root: the workspace; nothing but `LOCK_FILE` is touched in it.
        say: is told if this waits, and for whom.
        wait: until a run that has it has ended, however long that takes.

    Raises:
        BusyError: another run has it.
        UserError: the lock file cannot be written.
    """
    path = root / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, "the lock of the run", error) from error
    with file:
        _take(file, root, say, wait)
        _sign(file, path)
        yield RunLock(root=root, descriptor=file.fileno())


def _take(file: TextIO, root: Path, say: Callable[[str], None], wait: bool) -> None:
    deadline, waiting = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(file)
        else:
            return
        if owner and owner.lives and not wait:
            raise BusyError(
                f"a run (process {owner.pid}) goes on in {root}; wait for it, stop it, "
                "or give this one its own --workspace"
            )
        if owner and owner.lives:
            deadline = time.monotonic() + PATIENCE_S
        if time.monotonic() > deadline:
            raise BusyError(
                f"the last run in {root} ended, but processes of its stages still run after "
                f"{PATIENCE_S:.0f} s; try again when they have ended"
            )
        if owner and not waiting:
            waiting = True
            say(f"{_waited_for(owner, root)} to end")
        time.sleep(POLL_S)


def _waited_for(owner: _Owner, root: Path) -> str:
    if owner.lives:
        return f"a run (process {owner.pid}) goes on in {root}; waiting for it"
    return f"the last run (process {owner.pid}) was killed; waiting for its stages"


def _sign(file: TextIO, path: Path) -> None:
    file.truncate(0)
    file.write(f"{os.getpid()} {_started(os.getpid())} {socket.gethostname()}")
    try:
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()  # it would try again
        full = no_space(error, path.parent)
        raise (full or cannot_write(path, "the lock of the run", error)) from error


def _read(file: TextIO) -> _Owner | None:
    """Who has written the file; None: somebody is just writing it."""
    file.seek(0)
    words = file.read().split()
    if len(words) != 3 or not words[0].isdigit():
        return None
    return _Owner(pid=int(words[0]), started=words[1], host=words[2])


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; None: it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in "ZX" else words[19]
