"""The database of Prefect's embedded server: only a record, so a damaged one is moved aside."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

NAME = "prefect.db"
COMPANIONS = ("-wal", "-shm", "-journal")


def check_database(home: Path, say: Callable[[str], None]) -> None:
    """Move the database in `home` aside if Prefect could not use it, and say so in one line.

    Raises OSError if it cannot be moved.
    """
    if why := fault(home / NAME):
        set_aside(home, why, say)


def set_aside(home: Path, why: str, say: Callable[[str], None]) -> None:
    """Give the database another name, so that the server makes a new one."""
    path = home / NAME
    aside = path.with_name(f"{NAME}.damaged")
    _remove(aside)
    os.replace(path, aside)
    for ending in COMPANIONS:
        _remove(Path(f"{path}{ending}"))
    say(
        f"Prefect's record work/prefect/{NAME} cannot be used ({why}): "
        f"it is now {aside.name}, and a new one is begun"
    )


def fault(path: Path) -> str | None:
    """Why the database cannot be read and written; None: it can, or there is none yet."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        return "not a file"
    if not os.access(path, os.W_OK):
        return "read-only"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=1)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        return None if "locked" in str(error) or "full" in str(error) else str(error)
    return None if said == "ok" else said.replace("\n", " ")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
