"""The guard ends everything below it before it leaves itself, however the tree has died."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.toy_project import processes_marked, wait_for_the_end, wait_until
from vlfoundry.infra.core.guard import command_line, descendants

pytestmark = pytest.mark.slow

CASE = Path(__file__).parents[1] / "cases" / "guard_leaves_stage"
EXIT = {"x86_64": 60, "aarch64": 93}
# Its main thread ends, another thread and a child stay: a zombie in /proc, and not dead.
HALF_DEAD = f"""
import ctypes, subprocess, sys, threading, time
child = subprocess.Popen(["sleep", "300"])
threading.Thread(target=time.sleep, args=(300,)).start()
print(child.pid, flush=True)
ctypes.CDLL(None).syscall({EXIT.get(platform.machine(), 60)}, 0)
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_the_children_of_a_zombie_are_found() -> None:
    process = subprocess.Popen([sys.executable, "-c", HALF_DEAD], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        wait_until(lambda: state(process.pid) == "Z", "the end of the main thread", limit_s=10)
        found = descendants(os.getpid())
        assert child in found
        assert process.pid not in found
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


@pytest.mark.parametrize("_", range(4))
def test_a_stage_that_does_not_end_when_asked_is_killed(_: int, mark: str) -> None:
    parent = [sys.executable, str(CASE / "parent.py")]
    guard = subprocess.Popen(
        command_line(parent, 1.0), stdin=subprocess.PIPE, start_new_session=True
    )
    # DVC, its stage, a rank that is stopped; the first guard's own are the fourth.
    wait_until(lambda: any("sleep 1000" in line for line in processes_marked(mark)), "the rank")
    assert guard.stdin is not None
    guard.stdin.close()
    began = time.monotonic()
    assert guard.wait(30) == 128 + signal.SIGINT
    assert processes_marked(mark) == []
    assert time.monotonic() - began < 5


DEAF = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
print("deaf", flush=True)
time.sleep(300)
"""


def test_a_command_that_is_deaf_to_sigterm_ends_with_a_killed_guard(mark: str) -> None:
    guard = subprocess.Popen(
        command_line([sys.executable, "-c", DEAF], 1.0),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert guard.stdout is not None
    assert guard.stdout.readline() == b"deaf\n"
    guard.kill()
    wait_for_the_end(mark, limit_s=10)
    guard.communicate()
