"""Which rank of how many this process is, and where it finds the others.

The launcher says it (`infra.launch.launcher.be_rank`); `infra.backend.parallel` joins them. In a
process that no launcher has started there is no rank, and the world is this process alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

EXIT_STOPPED = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of the ranks this process is, and the store in which they meet."""

    index: int
    """0 .. count-1"""
    count: int
    """how many there are"""
    file: str = ""
    """path of a file that is the same on all; on one machine"""
    address: tuple[str, int] | None = None
    """or host and port of a TCP store that runs already"""


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


def may_fork() -> bool:
    """Whether this process may still fork ranks."""
    return _may_fork


def this_rank() -> Rank | None:
    """Which rank this process is; None in a process that no launcher has started."""
    return _this_rank


def become(rank: Rank) -> None:
    """From now on this process is that rank."""
    global _this_rank
    _this_rank = rank


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Inside, a request to stop (`infra.launch.launcher.STOP_SIGNALS`) sets `.asked` and does not
    end this rank."""
    global _stop
    outer, _stop = _stop, StopRequests()
    try:
        yield _stop
    finally:
        _stop = outer


def is_stoppable() -> bool:
    """Whether this process is inside `stop_requests`."""
    return _stop is not None


def on_stop_signal(signum: int, frame: Any) -> None:
    """What a rank does about a request to stop: it is noted, or, outside of `stop_requests`, the
    rank ends."""
    if _stop is None:
        os._exit(EXIT_STOPPED)
    _stop.asked = True
