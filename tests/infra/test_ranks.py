"""Ranks: results, failures, signals, and that none outlives its parent."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vlfoundry.infra.backend import world
from vlfoundry.infra.backend.world import stop_requests, this_rank
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.launch.launcher import RankError

pytestmark = pytest.mark.slow


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_results_come_back_by_rank(run_ranks):
    def work(base):
        return base + this_rank().index, np.arange(2)

    results = run_ranks(work, 10, ranks=3)
    assert [value for value, _ in results] == [10, 11, 12]
    assert this_rank() is None


def test_collectives_over_gloo(run_ranks):
    def work():
        import torch

        from vlfoundry.infra.backend import Layout
        from vlfoundry.infra.backend.parallel import parallel

        with parallel(Layout(data=2)):
            total = torch.tensor([float(this_rank().index + 1)])
            torch.distributed.all_reduce(total)
        return total.item(), torch.get_num_threads()

    assert run_ranks(work, ranks=2) == [(3.0, 1), (3.0, 1)]


def test_a_rank_joins_and_leaves_as_many_worlds_as_it_likes(run_ranks):
    """Whose groups share one device: their threads would be dozens otherwise."""

    def work():
        import torch

        from vlfoundry.infra.backend import Layout
        from vlfoundry.infra.backend.parallel import parallel

        sums = []
        for layout in (Layout(data=2), Layout(tensor=2), Layout(pipeline=2)) * 2:
            with parallel(layout):
                total = torch.tensor([float(this_rank().index + 1)])
                torch.distributed.all_reduce(total)
                sums.append(total.item())
            assert not torch.distributed.is_initialized()
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        return sums, threads

    for sums, threads in run_ranks(work, ranks=2):
        assert sums == [3.0] * 6
        named_as_the_rank = [name for name in threads if name.startswith("rank")]
        assert len(named_as_the_rank) == 2, threads  # it itself, and the device's


def test_ranks_meet_without_a_resolver(run_ranks):
    """A TCPStore, torch's default, looks up the name of each peer's address."""

    def work():
        from torch.distributed import FileStore, distributed_c10d

        from vlfoundry.infra.backend import Layout
        from vlfoundry.infra.backend.parallel import parallel

        with parallel(Layout(data=2)):
            return isinstance(
                distributed_c10d._get_default_store().underlying_store.underlying_store, FileStore
            )

    assert run_ranks(work, ranks=2) == [True, True]


def test_failure_shows_its_traceback_and_ends_the_others(run_ranks, tmp_path):
    def work():
        if this_rank().index == 1:
            raise ZeroDivisionError("the cause")
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*ZeroDivisionError: the cause"):
        run_ranks(work, ranks=2)
    assert time.monotonic() - started < 30
    pid = tmp_path / "pid"
    assert not pid.exists() or not _is_alive(int(pid.read_text()))


def test_mistake_of_the_user_is_raised_again(run_ranks):
    def work():
        raise DataError("row 3 has no caption")

    with pytest.raises(DataError, match="row 3 has no caption"):
        run_ranks(work, ranks=2)


def test_killed_rank_is_named(run_ranks):
    def work():
        if this_rank().index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankError, match="rank 0 was killed by SIGKILL"):
        run_ranks(work, ranks=2)


def test_time_limit(run_ranks):
    with pytest.raises(RankError, match=r"did not end within 0\.2 s"):
        run_ranks(lambda: time.sleep(60), ranks=2, timeout_s=0.2)


def test_no_rank_outlives_a_killed_parent(run_ranks, tmp_path):
    def work():
        (tmp_path / str(this_rank().index)).write_text(str(os.getpid()))
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        run_ranks(work, ranks=2)
        os._exit(0)
    files = [tmp_path / "0", tmp_path / "1"]
    assert _wait_for(lambda: all(f.exists() and f.read_text() for f in files))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(file.read_text()) for file in files]
    assert _wait_for(lambda: not any(map(_is_alive, pids)))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_ranks_that_can_save(run_ranks, signum, tmp_path):
    def work():
        with stop_requests() as stop:
            (tmp_path / str(this_rank().index)).touch()
            if this_rank().index == 0 and _wait_for((tmp_path / "1").exists):
                os.kill(os.getppid(), signum)
            return _wait_for(lambda: stop.asked)

    assert run_ranks(work, ranks=2) == [True, True]


def test_signal_ends_ranks_that_have_nothing_to_save(run_ranks):
    def work():
        if this_rank().index == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        run_ranks(work, ranks=2)


def test_a_signal_that_another_thread_receives_is_not_waited_on(run_ranks):
    """Nothing interrupts the parent's wait then; so it is too with a signal just before it."""

    def to_myself():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    began = time.monotonic()
    threading.Timer(0.5, to_myself).start()
    with pytest.raises(KeyboardInterrupt):
        run_ranks(lambda: time.sleep(30), ranks=2)
    assert time.monotonic() - began < 20


def test_fork_after_a_process_group_is_refused(run_ranks, monkeypatch):
    monkeypatch.setattr(world, "_may_fork", False)
    with pytest.raises(RankError, match="threads do not survive a fork"):
        run_ranks(lambda: None, ranks=1)
