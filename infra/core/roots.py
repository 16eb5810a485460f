"""Where the files that a data set names are: one check of a name for everything from outside.

A chat file or a Parquet file names pictures. What it names is read only if it is below the root of
the data set, a plain file and of a bounded size: never a device, a pipe, another scheme, or
something that a `..` or a link leads to.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.files import kind_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_FILE_BYTES = 256 << 20
"""largest file that is read at once; pictures are far smaller"""
MAX_NAME = 4096
"""longest name, in characters"""
EVERYTHING = "/"
"""the root that says that names are absolute paths"""


def what_is_wrong(name: object, *, absolute: bool = False) -> str | None:
    """Why a name cannot be that of a file below a root, as "expected ..." text; None: it can be.

    absolute: whether names are absolute paths, because the root is `/`.
    """
    if not isinstance(name, str) or not name:
        return "a path"
    if not is_text(name) or "\0" in name:
        return "a path: text without NUL and without halves of surrogate pairs"
    if len(name) > MAX_NAME:
        return f"a path of at most {MAX_NAME} characters"
    if "://" in name or name.startswith("data:"):
        return "a path below the data set's root, which alone may be a URL (`root`)"
    if name.startswith("/") and not absolute:
        return (
            "a path relative to the data set's root; where all are absolute, say so with `root: /`"
        )
    if ".." in name.split("/"):
        return "a path below the data set's root, without `..`"
    return None


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: JSON lets halves of surrogate pairs through."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_plain(place: str | Path) -> BinaryIO:
    """Open a plain file to read; never blocks on a pipe.

    Raises OSError if it cannot be opened, DataError if it is a pipe, a device or a directory.
    """
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise DataError(f"is {kind_of(mode)}, expected a plain file")
    return os.fdopen(descriptor, "rb")


class Root:
    """A folder or URL, and the files below it.

    Args:
        place: a local folder, or a URL that fsspec reads (s3://bucket/folder).

    Raises:
        ConfigError: there is no such kind of URL, or what it needs is not installed.
    """

    def __init__(self, place: str | Path) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.place = str(place)
        self.absolute = self.place == EVERYTHING
        try:
            fs, path = fsspec.url_to_fs(self.place)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"root {self.place!r} cannot be opened ({error}); expected a folder, or a URL of "
                "a kind that fsspec reads, such as s3://bucket/folder"
            ) from error
        self._fs: AbstractFileSystem | None = None if isinstance(fs, LocalFileSystem) else fs
        self._path = str(path)

    def __str__(self) -> str:
        return self.place

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self._fs is None

    def read(self, name: object, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The content of the file `name`. Raises DataError saying what is wrong with it."""
        checked = self._checked(name)
        with self._explained(self._cannot_read()), self._open(checked) as stream:
            data = stream.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise DataError(f"more than {limit_bytes >> 20} MiB; expected a smaller file")
        return data

    def names(self, folder: str = "") -> list[str]:
        """Names of what is in a folder below the root, sorted, hidden ones left out: macOS puts a
        ._x.parquet beside each x.parquet on a disk that is not its own. Raises DataError."""
        if folder:
            self._checked(folder)
        place = self._below(folder)
        with self._explained(f"{folder or self.place} cannot be listed as a folder"):
            if self._fs is None:
                found = os.listdir(place)
            else:
                paths = self._fs.ls(place, detail=False)
                found = [path.rstrip("/").rpartition("/")[2] for path in paths]
        return sorted(name for name in found if not name.startswith("."))

    def open(self, name: str) -> BinaryIO:
        """The file `name`, to be read in parts. Raises DataError as `read` does."""
        checked = self._checked(name)
        with self._explained(self._cannot_read()):
            return self._open(checked)

    def _cannot_read(self) -> str:
        return f"cannot be read below {self.place}"

    def _checked(self, name: object) -> str:
        expected = what_is_wrong(name, absolute=self.absolute)
        if expected is not None:
            raise DataError(f"got {str(name)[:80]!r}, expected {expected}")
        assert isinstance(name, str)
        return name

    def _below(self, name: str) -> str:
        if self._fs is not None:
            spelled = posixpath.normpath(name) if name else ""  # as the local file system reads it
            return f"{self._path.rstrip('/')}/{spelled}".rstrip("/")
        place = os.path.join(self._path, name)
        if not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(self._path)):
            raise DataError(f"leads out of {self.place}, through a link; expected a file below it")
        return place

    def _open(self, name: str) -> BinaryIO:
        place = self._below(name)
        return open_plain(place) if self._fs is None else cast("BinaryIO", self._fs.open(place))

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except _failures() as error:
            raise DataError(f"{what}: {_reason(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What file systems raise; those of servers have roots of their own beside OSError."""
    known: list[type[Exception]] = [OSError]
    for module, name in (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")):
        if module in sys.modules:  # else nothing can have raised it
            known.append(getattr(sys.modules[module], name))
    return tuple(known)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
