"""Jobs side by side: results in order, and no job that ends unasked is waited for."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from vlfoundry.infra.core.errors import DataError, KilledError
from vlfoundry.infra.core.forked import JobError, run_forked

pytestmark = pytest.mark.slow


def sleeper() -> None:
    time.sleep(60)


def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = {"slow": lambda: time.sleep(0.2) or os.getpid(), "quick": lambda: b"x" * 300_000}
    slow, quick = run_forked(jobs)
    assert slow != os.getpid()
    assert len(quick) == 300_000


@pytest.fixture(autouse=True)
def no_job_is_left(new_children: Callable) -> Iterator[None]:
    yield
    assert new_children() == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_job_that_is_killed_is_named_and_ends_the_others(signum: int, which: int) -> None:
    before = signal.signal(signal.SIGTERM, raise_interrupt)  # as every stage has it
    jobs = {f"fold {i}": sleeper for i in range(3)}

    def killed() -> None:
        if signum != signal.SIGKILL:
            signal.signal(signum, signal.SIG_DFL)  # under nohup SIGHUP is ignored
        os.kill(os.getpid(), signum)
        time.sleep(60)

    jobs[f"fold {which}"] = killed
    began = time.monotonic()
    try:
        with pytest.raises(KilledError, match=f"fold {which} was killed by SIG"):
            run_forked(jobs)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 5


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_job_that_leaves_without_a_word() -> None:
    with pytest.raises(KilledError, match="quiet ended unasked with exit code 7"):
        run_forked({"quiet": lambda: os._exit(7), "other": sleeper})


def test_mistakes_and_faults() -> None:
    def mistake() -> None:
        raise DataError("row 3 has no caption")

    with pytest.raises(DataError, match="row 3 has no caption"):
        run_forked({"a": mistake, "b": sleeper})
    with pytest.raises(JobError, match=r"(?s)a failed:.*ZeroDivisionError"):
        run_forked({"a": lambda: 1 // 0, "b": sleeper})

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{os.getcwd()}/x")

    with pytest.raises(DataError.__base__, match="no space left on"):
        run_forked({"a": full, "b": sleeper})


def test_jobs_end_with_their_parent() -> None:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        run_forked({"a": lambda: os.write(write_end, b".") and time.sleep(60), "b": sleeper})
    assert os.read(read_end, 1) == b"."
    jobs = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(jobs, timeout=5)
    assert not alive
