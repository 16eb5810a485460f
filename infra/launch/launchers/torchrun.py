"""Ranks that PyTorch's own agent (torchrun) starts, as processes of their own.

    torchrun --nproc-per-node=2 -m vlfoundry.infra.launch.launchers.torchrun FOLDER

Each imports PyTorch and Megatron by itself, which costs seconds; in return nothing is inherited
from this process. What they run travels as a pickle, in a folder that is removed afterwards.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vlfoundry.infra.backend.world import Rank, is_stoppable, on_stop_signal
from vlfoundry.infra.core.files import write_atomic
from vlfoundry.infra.core.interrupts import end_if_orphaned
from vlfoundry.infra.core.process import die_with_parent
from vlfoundry.infra.launch.launcher import (
    EXIT_FAILED,
    STOP_SIGNALS,
    Launcher,
    RankEnd,
    RankError,
    RankKilledError,
    be_rank,
    results_of,
)

WORK = "work.pickle"
STOPPED = "stopped"


def run_ranks(
    fn: Callable[..., Any],
    *args: Any,
    ranks: int,
    threads: int = 1,
    timeout_s: float | None = None,
) -> list[Any]:
    """See `infra.launch.launcher.RunRanks`; `fn` and its arguments are pickled by cloudpickle."""
    import cloudpickle

    with tempfile.TemporaryDirectory(prefix="vlfoundry-ranks-") as place:
        folder = Path(place)
        (folder / WORK).write_bytes(cloudpickle.dumps((partial(fn, *args), threads)))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0",
            f"--nproc-per-node={ranks}", "-m", __name__, place,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        agent = subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(die_with_parent, signal.SIGKILL),
        )
        with _forward_signals(folder) as asked:
            try:
                _, said = agent.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise RankError(
                    f"the ranks did not end within {timeout_s:g} s; killed them"
                ) from None
            finally:
                _end(agent, folder)
        ends = [_end_of(folder, index) for index in range(ranks)]
        if asked and any(end.kind != "value" for end in ends):
            raise KeyboardInterrupt
        if agent.returncode:
            _raise_if_killed(folder, ranks)
        if agent.returncode and not any(end.failed for end in ends):
            raise RankError(f"torchrun ended with {agent.returncode}:\n{said}")
        return results_of(ends, stopped=False)


def _raise_if_killed(folder: Path, ranks: int) -> None:
    """A rank that has begun says how it ended, whatever ends it, unless it is killed."""
    for index in range(ranks):
        begun, ended = ((folder / f"{index}.{end}").is_file() for end in ("pid", "pickle"))
        if begun and not ended:
            raise RankKilledError(f"rank {index} was killed")


def _end_of(folder: Path, index: int) -> RankEnd:
    path = folder / f"{index}.pickle"
    if not path.is_file():  # the agent has not got that far
        return RankEnd(None)
    kind, content = pickle.loads(path.read_bytes())
    codes = {"value": 0, STOPPED: None}  # the agent stops the others when one has failed
    return RankEnd(codes.get(kind, EXIT_FAILED), kind, content)


def _pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("*.pid")]


def _end(agent: subprocess.Popen, folder: Path) -> None:
    if agent.poll() is None:
        for pid in _pids(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.kill()
        agent.wait()


@contextlib.contextmanager
def _forward_signals(folder: Path) -> Iterator[list[int]]:
    """Hand requests to stop to the ranks themselves: the agent would end them after 30 s, saved or
    not. Yields the requests."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set handlers
        return
    parent = os.getppid()

    def forward(signum: int, frame: Any) -> None:
        end_if_orphaned(parent)
        if signum == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(signum)
        for pid in _pids(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    before = {signum: signal.signal(signum, forward) for signum in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


LAUNCHER = Launcher(name="torchrun", run=run_ranks)


def main(place: str) -> None:
    """Be a rank: run what the folder holds, and write there what came of it. Never returns."""
    die_with_parent(signal.SIGKILL)
    folder, index = Path(place), int(os.environ["RANK"])
    result = folder / f"{index}.pickle"

    def send(payload: bytes) -> None:
        part = result.with_suffix(".part")
        part.write_bytes(payload)
        part.rename(result)

    def stop(signum: int, frame: Any) -> None:
        if not is_stoppable():
            send(pickle.dumps((STOPPED, None)))
        on_stop_signal(signum, frame)

    for signum in STOP_SIGNALS:  # before anybody can know whom to send one
        signal.signal(signum, stop)
    write_atomic(folder / f"{index}.pid", str(os.getpid()))
    from vlfoundry.infra.backend import install

    install()
    work, threads = pickle.loads((folder / WORK).read_bytes())
    rank = Rank(
        index=index,
        count=int(os.environ["WORLD_SIZE"]),
        address=(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
    )
    be_rank(rank, threads, work, send, on_stop=stop)


if __name__ == "__main__":
    main(sys.argv[1])
