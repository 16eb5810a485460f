"""Ranks are forked from one warmed process: the seconds of importing are paid once.

    results = run_ranks(work, arguments, ranks=2, threads=1)      # work(arguments) on each rank

The parent must not have computed with several threads and must hold no process group: neither
survives a fork. No rank outlives the parent, even after kill -9. SIGINT, SIGTERM and SIGUSR1 (which
Slurm can send before the time limit) to the parent are passed on; a rank that is inside
`stop_requests()` finishes its step, saves and returns, any other leaves at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import pickle
import selectors
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import KilledError, UserError, ending
from vlfoundry.infra.core.interrupts import end_if_orphaned
from vlfoundry.infra.core.loopback import listen
from vlfoundry.infra.core.process import die_with_parent
from vlfoundry.infra.core.space import no_space

EXIT_FAILED = 1
EXIT_STOPPED = 130
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_NAME = 15
# After the first failure the other ranks fail too, because their peer is gone. This is how long
# we collect what they say, to tell the cause from the consequences.
_FAILURE_GRACE_S = 0.5
# A second Ctrl-C within this time is the terminal and the launcher saying the same thing twice.
_SECOND_INTERRUPT_S = 1.0


class RankError(RuntimeError):
    """A rank failed or did not end in time. The message holds its traceback."""


class RankKilledError(RankError, KilledError):
    """A rank was killed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of the forked processes this one is."""

    index: int
    """0 .. count-1"""
    count: int
    """how many there are"""
    store: int
    """file descriptor, the same file on all, by which they find each other"""


@dataclasses.dataclass
class StopRequests:
    """Whether somebody asked this rank to stop. Only a flag: the loop looks at it."""

    asked: bool = False


_this_rank: Rank | None = None
_may_fork = True
_stop: StopRequests | None = None


def forbid_forks() -> None:
    """Remember that this process has had a process group: its threads do not survive a fork."""
    global _may_fork
    _may_fork = False


def this_rank() -> Rank | None:
    """Which forked rank this process is; None in any other process."""
    return _this_rank


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Inside, `STOP_SIGNALS` set `.asked` and do not end this rank."""
    global _stop
    outer, _stop = _stop, StopRequests()
    try:
        yield _stop
    finally:
        _stop = outer


def run_ranks(
    fn: Callable[..., Any],
    *args: Any,
    ranks: int,
    threads: int = 1,
    timeout_s: float | None = None,
) -> list[Any]:
    """Run `fn(*args)` in `ranks` forked processes and return what each returned, by rank.

    Args:
        fn: any callable; it is not pickled. What it returns is (plain data and numpy arrays).
        ranks: number of processes; 1 also forks.
        threads: computing threads of each.
        timeout_s: kill all of them after so many seconds; None: never.

    Raises:
        UserError: a rank raised one; it is raised again here, without a traceback of the rank. Or
            there is no loopback interface.
        KilledError: a rank, or a process that a rank had started, was killed.
        RankError: a rank failed otherwise, or time ran out.
        KeyboardInterrupt: the parent was asked to stop and the ranks had nothing to save.
    """
    _prepare_parent()
    listen().close()  # the ranks will, on sockets of their own
    crew = _Crew()
    with os.fdopen(os.memfd_create("ranks")) as store, _forward_signals(crew):
        try:
            crew.start(store.fileno(), ranks, threads, lambda: fn(*args))
            crew.wait(timeout_s)
        finally:
            crew.kill()
    return crew.results()


def _prepare_parent() -> None:
    from vlfoundry.infra.backend import install

    install()
    import torch
    import torch._dynamo

    if not _may_fork or torch.distributed.is_initialized():
        raise RankError(
            "this process has or had a process group, whose threads do not survive a fork; "
            "do that work in run_ranks(..., ranks=1) too"
        )
    torch.set_num_threads(1)
    sys.stdout.flush()
    sys.stderr.flush()


@dataclasses.dataclass
class _Member:
    """One forked rank, seen from the parent."""

    pid: int
    pipe: int
    received: bytearray = dataclasses.field(default_factory=bytearray)
    exit_code: int | None = None
    """None while it runs"""
    kind: str = ""
    """"value", "user" or "error"; empty: it said nothing"""
    content: Any = None

    @property
    def failed(self) -> bool:
        return self.exit_code is not None and (self.exit_code != 0 or self.kind != "value")

    def end(self) -> None:
        """Collect its exit code and what it said."""
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.pipe)
        if self.received:
            self.kind, self.content = pickle.loads(bytes(self.received))


class _Crew:
    """All forked ranks, seen from the parent."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.wakeup: int | None = None
        """readable when a signal has come"""
        self._members: list[_Member] = []

    def start(self, store: int, ranks: int, threads: int, work: Callable[[], Any]) -> None:
        """Fork all ranks."""
        # Objects made so far never become garbage in a rank; not looking at them again saves
        # both time in its collector and copies of shared pages.
        gc.freeze()
        try:
            for index in range(ranks):
                self._fork(Rank(index=index, count=ranks, store=store), threads, work)
        finally:
            gc.unfreeze()
        if self.asked_at is not None:  # while we were forking: the last ranks missed it
            self.signal(signal.SIGTERM)

    def _fork(self, rank: Rank, threads: int, work: Callable[[], Any]) -> None:
        read_end, write_end = os.pipe()
        parent = os.getpid()
        # Until the rank has its own handlers, a signal must not run the parent's in it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        pid = os.fork()
        if pid == 0:
            for pipe in (read_end, *(member.pipe for member in self._members)):
                os.close(pipe)
            _be_rank(rank, parent, write_end, mask, threads, work)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(write_end)
        self._members.append(_Member(pid=pid, pipe=read_end))

    def signal(self, signum: int) -> None:
        """Send a signal to every rank that still runs."""
        for member in self._members:
            if member.exit_code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signum)

    def wait(self, timeout_s: float | None) -> None:
        """Until all ranks have ended, or one has failed and the others had time to say why.

        Raises:
            RankError: time ran out.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                selector.register(member.pipe, selectors.EVENT_READ, member)
            if self.wakeup is not None:
                selector.register(self.wakeup, selectors.EVENT_READ)
            while any(member.exit_code is None for member in self._members):
                left = deadline - time.monotonic()
                ready = selector.select(None if math.isinf(left) else max(0.0, left))
                if not ready and not any(member.failed for member in self._members):
                    raise RankError(f"the ranks did not end within {timeout_s:g} s; killed them")
                if not ready:
                    return
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 20)
                    if key.data is None:  # a signal, whose handler has run by now
                        continue
                    key.data.received += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                        key.data.end()
                        if key.data.failed:
                            deadline = min(deadline, time.monotonic() + _FAILURE_GRACE_S)

    def kill(self) -> None:
        """End what still runs; it has not failed by itself, so it is forgotten."""
        for member in self._members:
            if member.exit_code is None:
                os.kill(member.pid, signal.SIGKILL)
                os.waitpid(member.pid, 0)
                os.close(member.pipe)

    def results(self) -> list[Any]:
        """What the ranks returned, or raise what went wrong."""
        failed = {i: member for i, member in enumerate(self._members) if member.failed}
        if not failed:
            return [member.content for member in self._members]
        if self.asked_at is not None or any(m.exit_code == EXIT_STOPPED for m in failed.values()):
            raise KeyboardInterrupt
        for member in failed.values():
            if member.kind == "user":
                raise member.content
        for index, member in failed.items():
            if member.exit_code < 0:
                raise RankKilledError(f"rank {index} {ending(member.exit_code)}")
        index, member = next(iter(failed.items()))
        text = member.content or f"it said nothing; exit code {member.exit_code}"
        raise RankError(f"rank {index} of {len(self._members)} failed:\n{text}")


def _be_rank(
    rank: Rank, parent: int, pipe: int, mask: set, threads: int, work: Callable[[], Any]
) -> None:
    """The whole life of a rank, from the fork to its exit. Never returns."""
    global _this_rank
    code = EXIT_FAILED
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before we could ask
            os._exit(EXIT_FAILED)
        _this_rank = rank
        signal.set_wakeup_fd(-1)  # it is the parent's
        for signum in STOP_SIGNALS:
            signal.signal(signum, _on_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _name_process(f"rank {rank.index}/{rank.count}")
        import torch

        torch.set_num_threads(threads)
        payload = pickle.dumps(("value", work()))
        code = 0
    except (UserError, KilledError) as error:
        payload = pickle.dumps(("user", error))
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        full = no_space(error, Path("work"), Path("artifacts"))
        said = ("user", full) if full else ("error", traceback.format_exc())
        payload = pickle.dumps(said)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(pipe, "wb") as stream:
            stream.write(payload)
    finally:
        # Not sys.exit: what the parent registered to run at its exit is not ours to run.
        os._exit(code)


def _on_signal(signum: int, frame: Any) -> None:
    if _stop is None:
        os._exit(EXIT_STOPPED)
    _stop.asked = True


def _name_process(name: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


@contextlib.contextmanager
def _forward_signals(crew: _Crew) -> Iterator[None]:
    """Pass `STOP_SIGNALS` on while the ranks run; a second, later Ctrl-C ends them at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    parent = os.getppid()

    def forward(signum: int, frame: Any) -> None:
        end_if_orphaned(parent)
        now = time.monotonic()
        if crew.asked_at is None:
            crew.asked_at = now
        elif signum == signal.SIGINT and now - crew.asked_at > _SECOND_INTERRUPT_S:
            raise KeyboardInterrupt
        crew.signal(signal.SIGTERM)

    # Else one that comes in the instant before the parent begins to wait, or that another thread
    # receives, would not be seen until a rank ends.
    crew.wakeup, waker = os.pipe()
    os.set_blocking(waker, False)
    before_waker = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    before = {signum: signal.signal(signum, forward) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before_waker)
        os.close(waker)
        os.close(crew.wakeup)
