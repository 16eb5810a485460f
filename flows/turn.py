"""Deployed runs of one project take turns: they share its processors, and a GPU does not hold two.

Runs in the same workspace keep each other out anyway (`flows/lock.py`), whoever starts them.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vlfoundry.flows.lock import BusyError
from vlfoundry.flows.marks import mark
from vlfoundry.infra.core.config import canonical_json

POLL_S = 1.0


@contextlib.contextmanager
def turn(
    root: Path, name: str, asked: object, say: Callable[[str], None], *, wait: bool
) -> Iterator[Callable[[], None]]:
    """Hold the project `root` against its other deployed runs.

    Args:
        root: the project.
        name: of the flow run, for others to say.
        asked: its parameters. Of runs with the same only one waits: a second one would find nothing
            to do, and ticks that come faster than runs end would pile up.
        say: is told if this waits, and for whom.
        wait: until the other one has ended.

    Yields:
        What to call when the run begins, and waits no more.

    Raises:
        BusyError: there is another one, and this must not wait or need not.
    """
    path = root / "work" / "deployed.lock"
    with contextlib.ExitStack() as held, contextlib.ExitStack() as place:
        if wait:
            _queue(path, asked, place)
        if not _take(path, name, held):
            other = path.read_text("utf-8") or "another one"
            if not wait:
                raise BusyError(f"the run {other} of this project is at work")
            say(f"the run {other} of this project is at work; waiting for its end")
            while not _take(path, name, held):
                time.sleep(POLL_S)
        yield place.close


def _take(path: Path, name: str, held: contextlib.ExitStack) -> bool:
    with contextlib.ExitStack() as attempt:
        if attempt.enter_context(mark(path, "the lock of deployed runs", name)) is None:
            return False
        held.enter_context(attempt.pop_all())
    return True


def _queue(path: Path, asked: object, place: contextlib.ExitStack) -> None:
    key = hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:16]
    waiting = mark(path.with_name(f"deployed-{key}.waiting"), "the queue of deployed runs")
    if place.enter_context(waiting) is None:
        raise BusyError("a run with the same parameters is waiting already")
