"""Runs a command so that nothing of it outlives whoever asked for it.

    python -P infra/core/guard.py GRACE_S -- COMMAND ...

The guard keeps its standard input open to whoever started it. When that pipe closes, because the
owner closed it on purpose (cancel, time limit, Ctrl-C) or because the owner is gone (kill -9), or
when the command itself ends, everything below the guard is stopped: first SIGINT, as a terminal
would send it, so that training can save; after GRACE_S SIGTERM; a quarter of that later SIGKILL.

It is a subreaper (prctl(2)): a grandchild whose parent was killed, such as the stage of a killed
DVC process, becomes the guard's own child and cannot get lost. Its exit status is the command's,
or 128 + the signal that ended it.

Only the standard library is imported, and nothing of ours: it must start in milliseconds and
run under `python -P -S` from a file path.

Whether all have ended is the kernel's to say, by ECHILD of waitpid(2): whoever is left below a
subreaper is, or is below, one of its children. A look through /proc cannot say it: a process whose
main thread has ended is a zombie there while its other threads, and its children, live on.
"""

import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.1


def command_line(command: list[str], grace_s: float) -> list[str]:
    """The argv that runs `command` under a guard. Give it a pipe as standard input."""
    # sys.executable with -S: no site packages, so the start costs about 20 ms of CPU.
    return [sys.executable, "-P", "-S", __file__, str(grace_s), "--", *command]


def descendants(pid: int) -> list[int]:
    """Process ids of all living descendants of `pid`, parents before children."""
    children: dict[int, list[int]] = {}
    zombies: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        state, parent = stat[stat.rindex(b")") + 2 :].split()[:2]
        children.setdefault(int(parent), []).append(int(entry.name))
        if state == b"Z":  # it may have children yet, see the head of this file
            zombies.add(int(entry.name))
    found: list[int] = []
    frontier = [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += frontier
    return [child for child in found if child not in zombies]


def parent_of(pid: int) -> int | None:
    """The process that `pid` is a child of; None: it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


def send(signum: int, pids: list[int]) -> None:
    """Signal every process of `pids` that still lives."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def stop_descendants(grace_s: float) -> None:
    """End everything below this process: SIGINT, then SIGTERM, then SIGKILL. All is collected:

    uncollected, the CPU time of a child would be in nobody's account.
    """
    for signum, patience_s in ((signal.SIGINT, grace_s), (signal.SIGTERM, grace_s / 4)):
        send(signum, descendants(os.getpid()))
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if all_ended():
                return
            time.sleep(POLL_S / 4)
    while not all_ended():
        send(signal.SIGKILL, descendants(os.getpid()))
        time.sleep(POLL_S / 10)


def all_ended() -> bool:
    """Collect what has ended; whether nothing is left below this process."""
    reap()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def reap() -> dict[int, int]:
    """Collect ended children; their exit codes by process id."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended[pid] = code if code >= 0 else 128 - code


def start(command: list[str]) -> int:
    """Start `command` with an empty standard input; its process id.

    Should this guard be killed, the kernel kills the command: who has lost his guard may be
    anywhere, such as deaf to SIGTERM at the end of a Python process.
    """
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        become(command, guard)
    return pid


def become(command: list[str], guard: int) -> None:
    """The child's way from the fork to the command. Never returns."""
    try:
        for signum in (*ASKED, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(signum, signal.SIG_DFL)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        control(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:  # else it was gone before we asked
            os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def control(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def main(arguments: list[str]) -> int:
    """Run the command after `--`; returns its exit status."""
    grace_s, dashes, *command = arguments
    assert dashes == "--"
    assert command
    control(PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for signum in (*ASKED, signal.SIGCHLD):
        signal.signal(signum, lambda *_: None)
    code = wait(start(command), wake_read)
    stop_descendants(float(grace_s))
    return code if code is not None else 128 + signal.SIGINT


def wait(child: int, wake: int) -> int | None:
    """Wait for `child`; its exit code, or None if the owner let go or a signal asked to stop."""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        ended = reap()
        if child in ended:
            return ended[child]
        if 0 in ready and not os.read(0, 4096):
            return None
        if wake in ready and set(os.read(wake, 4096)) - {signal.SIGCHLD}:
            return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
