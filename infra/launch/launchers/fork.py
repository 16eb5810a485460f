"""Ranks are forked from one warmed process: the seconds of importing are paid once. The default.

    results = run_ranks(work, arguments, ranks=2, threads=1)      # work(arguments) on each rank

The parent must not have computed with several threads and must hold no process group: neither
survives a fork. No rank outlives the parent, even after kill -9. SIGINT, SIGTERM and SIGUSR1 (which
Slurm can send before the time limit) to the parent are passed on; a rank that is inside
`stop_requests()` finishes its step, saves and returns, any other leaves at once.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from typing import Any

from vlfoundry.infra.backend.world import Rank, may_fork
from vlfoundry.infra.core.interrupts import end_if_orphaned
from vlfoundry.infra.core.loopback import listen
from vlfoundry.infra.core.process import die_with_parent
from vlfoundry.infra.launch.launcher import (
    EXIT_FAILED,
    STOP_SIGNALS,
    Launcher,
    RankEnd,
    RankError,
    be_rank,
    results_of,
)

# After the first failure the other ranks fail too, because their peer is gone. This is how long
# we collect what they say, to tell the cause from the consequences.
_FAILURE_GRACE_S = 0.5
# A second Ctrl-C within this time is the terminal and the launcher saying the same thing twice.
_SECOND_INTERRUPT_S = 1.0


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
            crew.start(f"/proc/self/fd/{store.fileno()}", ranks, threads, lambda: fn(*args))
            crew.wait(timeout_s)
        finally:
            crew.kill()
    return crew.results()


def _prepare_parent() -> None:
    from vlfoundry.infra.backend import install

    install()
    import torch
    import torch._dynamo

    if not may_fork() or torch.distributed.is_initialized():
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

    def start(self, store: str, ranks: int, threads: int, work: Callable[[], Any]) -> None:
        """Fork all ranks."""
        # Objects made so far never become garbage in a rank; not looking at them again saves
        # both time in its collector and copies of shared pages.
        gc.freeze()
        try:
            for index in range(ranks):
                self._fork(Rank(index=index, count=ranks, file=store), threads, work)
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
        ends = [RankEnd(m.exit_code, m.kind, m.content) for m in self._members]
        return results_of(ends, stopped=self.asked_at is not None)


def _be_rank(
    rank: Rank, parent: int, pipe: int, mask: set, threads: int, work: Callable[[], Any]
) -> None:
    """The whole life of a rank, from the fork to its exit. Never returns."""

    def prepare() -> None:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before we could ask
            os._exit(EXIT_FAILED)
        signal.set_wakeup_fd(-1)  # it is the parent's

    def send(payload: bytes) -> None:
        with os.fdopen(pipe, "wb") as stream:
            stream.write(payload)

    be_rank(rank, threads, work, send, prepare=prepare, mask=mask)


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


LAUNCHER = Launcher(name="fork", run=run_ranks)
