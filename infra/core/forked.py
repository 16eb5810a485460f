"""A few jobs in forked processes, side by side; when one fails or is killed, all end at once.

    results = run_forked({"fold 1": lambda: train(1), "fold 2": lambda: train(2)})

A pool of the standard library is no substitute: a worker that the kernel kills for its memory
leaves `concurrent.futures` waiting for the others, which wait for work. `infra.backend.run_ranks`
is for jobs that talk to each other; this needs no torch.
"""

import contextlib
import dataclasses
import os
import pickle
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from vlfoundry.infra.core.errors import KilledError, UserError
from vlfoundry.infra.core.process import die_with_parent
from vlfoundry.infra.core.space import no_space

CHUNK_BYTES = 1 << 20


class JobError(RuntimeError):
    """A job raised an exception; the message holds its traceback."""


@dataclasses.dataclass(kw_only=True)
class _Job:
    name: str
    pid: int
    pipe: int
    received: bytearray = dataclasses.field(default_factory=bytearray)

    def result(self) -> Any:
        """What it returned, or raise what went wrong. Call it once its pipe is closed."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        if code or not self.received:
            raise KilledError.of(self.name, code)
        kind, content = pickle.loads(bytes(self.received))
        if kind == "value":
            return content
        if kind == "raise":
            raise content
        raise JobError(f"{self.name} failed:\n{content}")

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.pipe)


def run_forked(jobs: Mapping[str, Callable[[], Any]]) -> list[Any]:
    """Run each job in a forked process of its own; what they returned, in their order.

    Args:
        jobs: by the name that a message gives them; nothing is pickled but what they return. The
            caller must not have computed with several threads: those do not survive a fork.

    Raises:
        KilledError: one was killed, or left without a word.
        UserError: one raised it.
        JobError: one failed otherwise.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    running: list[_Job] = []
    try:
        for name, work in jobs.items():
            running.append(_fork(name, work))
        return _collect(running)
    finally:
        for job in running:
            job.kill()


def _collect(running: list[_Job]) -> list[Any]:
    results: dict[str, Any] = {}
    with selectors.DefaultSelector() as selector:
        for job in running:
            selector.register(job.pipe, selectors.EVENT_READ, job)
        while selector.get_map():
            for key, _ in selector.select():
                chunk = os.read(key.fd, CHUNK_BYTES)
                key.data.received += chunk
                if not chunk:
                    selector.unregister(key.fd)
                    results[key.data.name] = key.data.result()
    return [results[job.name] for job in running]


def _fork(name: str, work: Callable[[], Any]) -> _Job:
    read_end, write_end = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_job(parent, write_end, work)
    os.close(write_end)
    return _Job(name=name, pid=pid, pipe=read_end)


def _be_job(parent: int, pipe: int, work: Callable[[], Any]) -> None:
    """The whole life of a job, from the fork to its exit. Never returns."""
    code = 1
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before we could ask
            os._exit(code)
        # The parent's own would turn a signal into an exception, and that into a result.
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells the parent, which kills us
        payload = _answer(work)
        with os.fdopen(pipe, "wb") as stream:
            stream.write(payload)
        code = 0
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _answer(work: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(("value", work()))
    except (UserError, KilledError) as error:
        return pickle.dumps(("raise", error))
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        full = no_space(error)
        return pickle.dumps(("raise", full) if full else ("error", traceback.format_exc()))
