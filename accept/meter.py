"""Runs a command, and measures it from outside (wall time, CPU time, peak memory) or kills it."""

import dataclasses
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

SAMPLE_S = (1.0, 10.0)
"""between two looks at memory: at first, and in the long run, where each second would cost 8 % of a
core of what is measured"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What a command cost."""

    code: int
    """Exit status."""
    output: str
    """What it printed, errors included."""
    wall_s: float
    """Elapsed seconds."""
    cpu_s: float
    """User and system seconds of all its processes."""
    peak_mib: float
    """Largest sum of the private and shared-in-proportion memory (PSS) of its processes."""


def measure(command: Sequence[str], cwd: Path, limit_s: float) -> Measured:
    """Run `command` in `cwd`, whose own environment goes first on the PATH.

    Raises TimeoutExpired after `limit_s` seconds.
    """
    path = os.pathsep.join([str(cwd / ".venv" / "bin"), os.environ["PATH"]])
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, "PATH": path}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    peak, done = [0.0], threading.Event()

    def sample() -> None:
        soon, late = SAMPLE_S
        while not done.wait(min(late, max(soon, (time.monotonic() - began) / 30))):
            peak[0] = max(peak[0], _tree_mib(process.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        output, _ = process.communicate(timeout=limit_s)
    finally:
        done.set()
        process.kill()
    sampler.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Measured(
        code=process.returncode,
        output=output,
        wall_s=round(time.monotonic() - began, 1),
        cpu_s=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        peak_mib=round(peak[0], 1),
    )


def kill_after(command: Sequence[str], cwd: Path, after_s: float) -> bool:
    """Run `command` and kill its process group with -9 after `after_s` seconds.

    Returns False if it had ended by itself. Raises AssertionError for a process that outlives it.
    """
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(after_s)
        return False
    except subprocess.TimeoutExpired:
        tree = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive, f"outlived a kill -9: {alive}"
    return True


def _tree_mib(pid: int) -> float:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return 0.0
    return total / 2**20
