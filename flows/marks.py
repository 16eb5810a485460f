"""Files that a process holds while it lives: by them others know whether it does.

The kernel lets go of a lock of flock(2) when the last process that has it is gone, however it went.
So nothing has to be tidied up after a kill -9, and no process number can be taken for another's.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlfoundry.infra.core.files import cannot_write

PATIENCE_S = 0.5
"""longer than `is_held` of others has a file"""
POLL_S = 0.05


@contextmanager
def mark(path: Path, what: str, text: str = "") -> Iterator[int | None]:
    """Hold the file `path`, and write into it what others may read.

    Args:
        path: is made, with its folder, and stays.
        what: it is, for the error.
        text: e.g. who holds it.

    Yields:
        Its descriptor, which children may inherit to hold it too; None if another process has it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, what, error) from error
    with file:
        deadline = time.monotonic() + PATIENCE_S
        while not (taken := _take(file.fileno(), fcntl.LOCK_EX)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if taken:
            file.truncate(0)
            file.write(text)
            file.flush()
        yield file.fileno() if taken else None


def is_held(path: Path) -> bool:
    """Whether a living process has the file; one that is not there nobody has."""
    try:
        with path.open("rb") as file:
            return not _take(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _take(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
