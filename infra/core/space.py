"""Disks that are full: recognised however the error comes wrapped, and said in one line."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from vlfoundry.infra.core.errors import UserError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
WORDS = re.compile(r"No space left on device|Disk quota exceeded|os error 28|disk is full")
"""What is left of the cause where a library keeps its text alone."""
LEAST_BYTES = 1 << 20
"""A disk with less is full: nothing that we write fits."""


class NoSpaceError(UserError):
    """A disk is full."""


def no_space(error: BaseException, *folders: Path, ask_disks: bool = False) -> NoSpaceError | None:
    """The message for an error that a full disk has caused, directly or not; else None.

    Args:
        error: what was raised, with its causes, contexts and the errors inside of it.
        folders: where it may have been writing, if the error does not say.
        ask_disks: also take it for the cause if a disk of `folders` is full now: for errors of
            writing that no longer tell why (torch's and Megatron's).
    """
    for cause in causes(error):
        if isinstance(cause, NoSpaceError):
            return cause
        if isinstance(cause, OSError) and cause.errno in FULL:
            named = [Path(os.fsdecode(cause.filename)).parent] if cause.filename else []
            return said(_fullest([*named] or [*folders]))
        if not isinstance(cause, UserError) and WORDS.search(str(cause)):
            return said(_fullest([*folders]))
    full = [folder for folder in folders if free_bytes(folder) < LEAST_BYTES]
    return said(full[0]) if ask_disks and full else None


def require_space(*folders: Path) -> None:
    """Raises NoSpaceError if nothing can be written to one of the folders."""
    for folder in folders:
        if free_bytes(folder) < LEAST_BYTES:
            raise said(folder)


def said(folder: Path | None) -> NoSpaceError:
    """The one line."""
    if folder is None:
        return NoSpaceError("no space left on a disk; make room and run again")
    free = free_bytes(folder) / 1e6
    return NoSpaceError(f"no space left on {folder} ({free:.0f} MB free); make room and run again")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        inner = [*cause.args, *(cause.exceptions if isinstance(cause, BaseExceptionGroup) else ())]
        inner += [cause.__cause__, cause.__context__]
        waiting += [other for other in inner if isinstance(other, BaseException)]


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write to the disk that `folder`, or its parent, is on.

    A file system that counts no blocks (/proc, some network ones) is never full.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    facts = os.statvfs(place)
    return facts.f_bavail * facts.f_frsize if facts.f_blocks else sys.maxsize


def _fullest(folders: list[Path]) -> Path | None:
    return min(folders, key=free_bytes, default=None)
