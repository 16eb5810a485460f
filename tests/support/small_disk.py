"""A disk of a few megabytes: a tmpfs, which only root may mount."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY = 1


@contextlib.contextmanager
def small_disk(place: Path, size_bytes: int, flags: int = 0) -> Iterator[Path]:
    """A disk of that size at `place`; the test is skipped, saying so, where none can be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes}".encode()
    if LIBC.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options):
        pytest.skip(f"no small disk: mount says {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        LIBC.umount2(os.fsencode(place), 2)  # MNT_DETACH


def fill(place: Path, leave_bytes: int = 0) -> Path:
    """Fill the disk of `place` but for so many bytes; the file that does it."""
    facts = os.statvfs(place)
    path = place / "filler"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, facts.f_bavail * facts.f_frsize - leave_bytes)
    return path
