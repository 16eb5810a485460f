"""Part files that DVC leaves in its cache when it cannot finish one: on a full disk, or killed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

PART_FILES = ("files/md5/??/.*.tmp", "runs/??/*/.*.tmp")
QUIET_S = 2.0
"""A part file that nobody here has open may be another machine's, if it was written just now."""


def clear_part_files(cache: Path) -> None:
    """Remove part files that nobody writes any more. Runs that share the cache go on."""
    found = [path for pattern in PART_FILES for path in cache.glob(pattern)]
    parts = [path for path in found if not path.is_symlink()]
    if not parts:
        return
    opened = set(_open_files())
    for path in parts:
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue  # it has just got its name
        quiet = time.time() - facts.st_mtime > QUIET_S
        if quiet and (facts.st_dev, facts.st_ino) not in opened:
            path.unlink(missing_ok=True)


def _open_files() -> Iterator[tuple[int, int]]:
    """Device and number of every file that a process of ours has open."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            descriptors = list(folder.iterdir())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or is not ours
        for descriptor in descriptors:
            try:
                facts = os.stat(descriptor)
            except OSError:
                continue
            yield facts.st_dev, facts.st_ino
