"""Ranks are forked from one warmed process: the seconds of importing are paid once.

    results = run_ranks(work, arguments, ranks=2, threads=1)      # work(arguments) on each rank

The parent must not have computed with several threads and must hold no process group: neither
survives a fork. No rank outlives the parent, even after kill -9. SIGINT and SIGTERM to the parent
are passed on; a rank that is inside `stop_requests()` finishes its step, saves and returns, any
other leaves at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from infra.errors import UserError
from infra.launch import die_with_parent

EXIT_FAILED = 1
EXIT_STOPPED = 130
PR_SET_NAME = 15
# After the first failure the other ranks fail too, because their peer is gone. This is how long
# we collect what they say, to tell the cause from the consequences.
_FAILURE_GRACE_S = 0.5
# A second Ctrl-C within this time is the terminal and the launcher saying the same thing twice.
_SECOND_INTERRUPT_S = 1.0


class RankError(RuntimeError):
    """A rank failed, was killed, or did not end in time. The message holds its traceback."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of the forked processes this one is."""

    index: int
    """0 .. count-1"""
    count: int
    """how many there are"""
    address: tuple[str, int]
    """host and port where rank 0 keeps the rendezvous store"""
    listener: int | None
    """rank 0: file descriptor of the socket that already listens there"""


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
    """Inside, SIGINT and SIGTERM set `.asked` and do not end this rank."""
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
        UserError: a rank raised one; it is raised again here, without a traceback of the rank.
        RankError: a rank failed otherwise, was killed, or time ran out.
        KeyboardInterrupt: the parent was asked to stop and the ranks had nothing to save.
    """
    _prepare_parent()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        crew = _Crew(fn, args, listener, ranks, threads)
        with _forward_signals(crew):
            try:
                crew.wait(timeout_s)
            finally:
                crew.kill()
    return crew.results()


def _prepare_parent() -> None:
    from infra.backend import install

    install()
    import torch

    if not _may_fork or torch.distributed.is_initialized():
        raise RankError(
            "this process has or had a process group, whose threads do not survive a fork; "
            "do that work in run_ranks(..., ranks=1) too"
        )
    torch.set_num_threads(1)
    sys.stdout.flush()
    sys.stderr.flush()


class _Crew:
    """The forked processes, seen from the parent."""

    def __init__(self, fn, args, listener: socket.socket, ranks: int, threads: int) -> None:
        self.asked_at: float | None = None
        self._reports: dict[int, tuple[str, Any]] = {}
        self._exit_codes: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._pipes: dict[int, int] = {}
        # Objects made so far never become garbage in a rank; not looking at them again saves
        # both time in its collector and copies of shared pages.
        gc.freeze()
        try:
            for index in range(ranks):
                rank = Rank(
                    index=index,
                    count=ranks,
                    address=listener.getsockname(),
                    listener=listener.fileno() if index == 0 else None,
                )
                self._fork(rank, listener, fn, args, threads)
        except BaseException:
            self.kill()
            raise
        finally:
            gc.unfreeze()

    def _fork(self, rank: Rank, listener: socket.socket, fn, args, threads: int) -> None:
        read_end, write_end = os.pipe()
        # Until the rank has its own handlers, a signal must not run the parent's in it.
        blocked = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            for pipe in self._pipes.values():
                os.close(pipe)
            if rank.listener is None:
                listener.close()
            _be_rank(rank, write_end, before, fn, args, threads)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(write_end)
        self._pids[rank.index], self._pipes[rank.index] = pid, read_end

    def signal(self, signum: int) -> None:
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def wait(self, timeout_s: float | None) -> None:
        """Until all ranks have reported; ends the others soon after one fails."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        received = {index: bytearray() for index in self._pipes}
        with selectors.DefaultSelector() as selector:
            for index, pipe in self._pipes.items():
                selector.register(pipe, selectors.EVENT_READ, index)
            while selector.get_map():
                remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = selector.select(remaining)
                if not ready:
                    break
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 20)
                    received[key.data] += chunk
                    if chunk:
                        continue
                    selector.unregister(key.fd)
                    if not self._reap(key.data, bytes(received[key.data])):
                        soon = time.monotonic() + _FAILURE_GRACE_S
                        deadline = soon if deadline is None else min(deadline, soon)
        failed = [index for index in self._exit_codes if not self._succeeded(index)]
        if len(self._exit_codes) < len(self._pids) and not failed:
            self.kill()
            raise RankError(f"the ranks did not end within {timeout_s:g} s and were killed")

    def _reap(self, index: int, report: bytes) -> bool:
        pid = self._pids.pop(index)
        self._exit_codes[index] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._pids[index] = pid
        if report:
            self._reports[index] = pickle.loads(report)
        return self._succeeded(index)

    def _succeeded(self, index: int) -> bool:
        return self._exit_codes[index] == 0 and index in self._reports

    def kill(self) -> None:
        """End what still runs and close the pipes."""
        for index, pid in self._pids.items():
            if index not in self._exit_codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self._pids = {index: pid for index, pid in self._pids.items() if index in self._exit_codes}
        for pipe in self._pipes.values():
            os.close(pipe)
        self._pipes = {}

    def results(self) -> list[Any]:
        """What the ranks returned, or raise what went wrong."""
        failed = [index for index in self._exit_codes if not self._succeeded(index)]
        if not failed:
            return [self._reports[index][1] for index in sorted(self._reports)]
        if self.asked_at is not None or EXIT_STOPPED in self._exit_codes.values():
            raise KeyboardInterrupt
        for index in failed:
            kind, content = self._reports.get(index, ("", None))
            if kind == "user":
                raise content
        for index in failed:
            code = self._exit_codes[index]
            if code < 0:
                name = signal.Signals(-code).name
                hint = " (out of memory?)" if -code == signal.SIGKILL else ""
                raise RankError(f"rank {index} was killed by {name}{hint}")
        index = failed[0]
        text = self._reports.get(index, ("", f"no report; exit code {self._exit_codes[index]}"))[1]
        raise RankError(f"rank {index} of {len(self._pids)} failed:\n{text}")


def _be_rank(rank: Rank, pipe: int, mask, fn, args, threads: int) -> None:
    """The whole life of a rank, from the fork to its exit. Never returns."""
    global _this_rank
    code = EXIT_FAILED
    try:
        die_with_parent(signal.SIGKILL)
        _this_rank = rank
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, _on_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _name_process(f"rank {rank.index}/{rank.count}")
        import torch

        torch.set_num_threads(threads)
        report = ("value", fn(*args))
        payload = pickle.dumps(report)
        code = 0
    except UserError as error:
        payload = pickle.dumps(("user", error))
    except BaseException:  # noqa: BLE001 - the parent raises it
        payload = pickle.dumps(("error", traceback.format_exc()))
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
    """Pass SIGINT and SIGTERM on while the ranks run; a second, later Ctrl-C ends them at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def forward(signum: int, frame: Any) -> None:
        now = time.monotonic()
        if crew.asked_at is None:
            crew.asked_at = now
        elif signum == signal.SIGINT and now - crew.asked_at > _SECOND_INTERRUPT_S:
            raise KeyboardInterrupt
        crew.signal(signal.SIGTERM)

    before = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
