"""What a launcher is: a way to start ranks that each run the same function. A file of
`infra/launch/launchers/` assigns one to `LAUNCHER`."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlfoundry.infra.backend.world import EXIT_STOPPED, Rank, become, on_stop_signal
from vlfoundry.infra.core.errors import KilledError, UserError, ending
from vlfoundry.infra.core.space import no_space

EXIT_FAILED = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_NAME = 15


class RunRanks(Protocol):
    """Runs `fn(*args)` on each of `ranks` ranks; returns what each returned, by rank.

    What it returns and raises is plain data; it may be pickled.

    Raises:
        UserError: a rank raised one.
        KilledError: a rank, or a process that a rank had started, was killed.
        RankError: a rank failed otherwise, or did not end within `timeout_s` (None: no limit).
        KeyboardInterrupt: it was asked to stop, and the ranks had nothing to save.
    """

    def __call__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        ranks: int,
        threads: int = 1,
        timeout_s: float | None = None,
    ) -> list[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A way to start ranks."""

    name: str
    """in `launcher` of an execution profile"""
    run: RunRanks
    """starts them, and waits for their end"""


class RankError(RuntimeError):
    """A rank failed or did not end in time. The message holds its traceback."""


class RankKilledError(RankError, KilledError):
    """A rank was killed."""


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended."""

    exit_code: int | None
    """None: it was ended, because another one had failed"""
    kind: str = ""
    """"value", "user" or "error"; empty: it said nothing"""
    content: Any = None

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, and not well."""
        return self.exit_code is not None and (self.exit_code != 0 or self.kind != "value")


def results_of(ends: Sequence[RankEnd], *, stopped: bool) -> list[Any]:
    """What the ranks returned.

    Args:
        ends: by rank.
        stopped: whether they were asked to stop.

    Raises:
        As `RunRanks` says.
    """
    failed = {index: end for index, end in enumerate(ends) if end.failed}
    if not failed:
        return [end.content for end in ends]
    if stopped or any(end.exit_code == EXIT_STOPPED for end in failed.values()):
        raise KeyboardInterrupt
    for end in failed.values():
        if end.kind == "user":
            raise end.content
    for index, end in failed.items():
        if end.exit_code is not None and end.exit_code < 0:
            raise RankKilledError(f"rank {index} {ending(end.exit_code)}")
    index, end = next(iter(failed.items()))
    text = end.content or f"it said nothing; exit code {end.exit_code}"
    raise RankError(f"rank {index} of {len(ends)} failed:\n{text}")


def be_rank(
    rank: Rank,
    threads: int,
    work: Callable[[], Any],
    send: Callable[[bytes], None],
    *,
    prepare: Callable[[], object] = tuple,
    mask: set | None = None,
    on_stop: Callable[[int, Any], None] = on_stop_signal,
) -> None:
    """Be a rank until the end of this process. Never returns.

    Args:
        rank: which.
        threads: computing threads.
        work: what it does.
        send: takes the pickle of (kind, content), as `RankEnd` has them.
        prepare: what comes first, where a failure is told as one of `work` is.
        mask: of signals, once the handlers are there; None: as it is.
        on_stop: handler of requests to stop.
    """
    code = EXIT_FAILED
    try:
        prepare()
        become(rank)
        for signum in STOP_SIGNALS:
            signal.signal(signum, on_stop)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _name_process(f"rank {rank.index}/{rank.count}")
        import torch

        torch.set_num_threads(threads)
        payload = pickle.dumps(("value", work()))
        code = 0
    except (UserError, KilledError) as error:
        payload = pickle.dumps(("user", error))
    except BaseException as error:  # noqa: BLE001 - who started the rank raises it
        full = no_space(error, Path("work"), Path("artifacts"))
        said = ("user", full) if full else ("error", traceback.format_exc())
        payload = pickle.dumps(said)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        send(payload)
    finally:
        # Not sys.exit: what a parent registered to run at its exit is not ours to run.
        os._exit(code)


def _name_process(name: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
