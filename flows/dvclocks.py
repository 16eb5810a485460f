"""DVC's own locks: waited for where somebody holds them, cleared where nobody can.

`.dvc/tmp/rwlock` is a JSON file that says which process works on which path. A kill can leave it
half written, or with a process that is gone and whose number another one has by now; DVC then
refuses for good and tells people to delete the file.
"""

import json
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.files import write_atomic

RWLOCK = Path(".dvc/tmp/rwlock")
DVC_FILE = "dvc/__main__.py"
PATIENCE_S = 60.0
POLL_S = 0.2
HALF_WRITTEN_S = 1.0


def clear_stale(root: Path) -> None:
    """Drop from DVC's file what no living DVC process can have written.

    Call it with the lock of the run held: then no DVC of ours is at work.
    """
    path = root / RWLOCK
    known = _read(path)
    if known is None:
        _drop_damaged(path)
        return
    kept = {
        "write": {p: info for p, info in known.get("write", {}).items() if _is_dvc(info)},
        "read": {
            p: alive
            for p, infos in known.get("read", {}).items()
            if (alive := [info for info in infos if _is_dvc(info)])
        },
    }
    if kept != {"write": known.get("write", {}), "read": known.get("read", {})}:
        write_atomic(path, json.dumps(kept))


def _drop_damaged(path: Path) -> None:
    """Delete it, unless some `dvc` was only writing it just now."""
    time.sleep(HALF_WRITTEN_S)
    if _read(path) is None:
        path.unlink(missing_ok=True)


def at_work(root: Path) -> dict[Path, int]:
    """What living DVC processes write at present, and the process of each."""
    known = _read(root / RWLOCK) or {}
    return {Path(p): info["pid"] for p, info in known.get("write", {}).items() if _is_dvc(info)}


def patiently[T](
    work: Callable[[], T], busy: tuple[type[Exception], ...], root: Path, say: Callable[[str], None]
) -> T:
    """`work()`, tried again while another DVC process holds a lock.

    Args:
        work: what needs DVC's locks.
        busy: what it raises then.
        root: the checkout.
        say: is told once that this waits.

    Raises:
        DataError: it holds the lock for too long.
    """
    deadline, waiting = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            return work()
        except busy as error:
            if time.monotonic() > deadline:
                raise DataError(
                    f"{_holders(root)} still works in {root} after {PATIENCE_S:.0f} s; "
                    "run again when it has ended"
                ) from error
        if _read(root / RWLOCK) is None:
            _drop_damaged(root / RWLOCK)
            continue
        if not waiting:
            waiting = True
            say(f"waiting for {_holders(root)} to end")
        time.sleep(POLL_S)


def _holders(root: Path) -> str:
    known = _read(root / RWLOCK) or {}
    infos = [*known.get("write", {}).values(), *chain(*known.get("read", {}).values())]
    pids = sorted({info["pid"] for info in infos if _is_dvc(info)})
    if not pids:
        return "another DVC process"
    return f"DVC (process {', '.join(map(str, pids))})"


def _read(path: Path) -> dict[str, Any] | None:
    """What the file says; None if it is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return None
    return known if isinstance(known, dict) else None


def _is_dvc(info: dict[str, Any]) -> bool:
    """Whether the process of an entry still runs and is a DVC: others get its number later."""
    folder = Path(f"/proc/{info['pid']}")
    try:
        state = (folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return state not in "ZX" and any(Path(w).name == "dvc" or DVC_FILE in w for w in words)
    except (FileNotFoundError, ProcessLookupError):
        return False
