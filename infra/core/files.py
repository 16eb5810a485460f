"""Whether a place can be written, what kind of file a path is, and writing all of it or nothing."""

import errno
import fnmatch
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlfoundry.infra.core.errors import ModelError, UserError

REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENAMETOOLONG: "the name is too long",
}

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)

LITTER = (".DS_Store", "._*", "Thumbs.db", "desktop.ini")
"""what macOS and Windows leave in folders; .dvcignore has the same"""

_NO_PLACE = REASONS.keys() | {errno.ENOTDIR, errno.ENOENT, errno.EFBIG}

REFUSALS = REASONS.keys() | {errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


def require_writable(path: Path, what: str) -> None:
    """Make sure that the file `path` can be written, before the work whose result it takes.

    Parent folders that are missing are fine if they could be made. Nothing is left behind, and a
    file that exists keeps its content.

    Args:
        path: the file to be, which need not exist.
        what: what it takes, for the message ("the scores").

    Raises:
        UserError: `path` is a directory, lies below a file, or may not be written.
    """
    try:
        real = Path(os.path.realpath(path))
        if real.is_dir():
            raise UserError(f"{path} is a directory; name a file for {what}")
        if real.is_file():
            os.close(os.open(real, os.O_WRONLY))
        elif real.is_fifo() or real.is_socket() or real.is_block_device():
            raise UserError(f"{path} is not a plain file; name one for {what}")
        elif not real.exists():  # a terminal or /dev/null takes anything
            _require_creatable(real, path, what)
    except (OSError, ValueError) as error:
        raise cannot_write(path, what, error) from error


def require_writable_folder(path: Path, what: str) -> None:
    """As `require_writable`, for files inside of the folder `path`, which need not exist."""
    try:
        _require_creatable(Path(os.path.realpath(path)) / "x", path, what)
    except (OSError, ValueError) as error:
        raise cannot_write(path, what, error) from error


def cannot_write(path: Path, what: str, error: OSError | ValueError) -> UserError:
    """The one line for a file or folder that the system does not let us write."""
    code = getattr(error, "errno", None) or 0
    reason = REASONS.get(code) or getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot write {what} to {path}: {reason}; name another place")


def refused(error: OSError) -> UserError | None:
    """The one line for a file that the system does not let us read or write; None: a bug of ours.

    For what nobody could ask before: any file of a checkout that lies on a read-only disk, say.
    """
    if error.errno not in REFUSALS or not error.filename:
        return None
    reason = REASONS.get(error.errno) or os.strerror(error.errno).lower()
    return UserError(f"{os.fsdecode(error.filename)}: {reason}")


def files_below(folder: Path) -> Iterator[Path]:
    """The plain files below a folder, sorted, without what file managers leave there (`LITTER`)."""
    for path in sorted(folder.rglob("*")):
        litter = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in LITTER)
        if not litter and path.is_file():
            yield path


def kind_of(mode: int) -> str:
    """What a path that is no plain file is, in words for a message, from its `st_mode`."""
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")


def write_atomic(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a small file whole or not at all: a kill leaves the old one, or a `.NAME.part` beside.

    Args:
        path: the file; its folder exists.
        content: what it takes; text is written as UTF-8.
        mode: permissions of the file, less the umask.
    """
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the one that is to be, whose place it takes when it is complete.

    Raises:
        ModelError: it cannot be made or written there. Nothing is left of it then, nor after any
            other error.
    """
    target = target.resolve()
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(target)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise ModelError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _require_creatable(real: Path, path: Path, what: str) -> None:
    """Try it with a file of another name: nobody may meet an empty one of this name meanwhile."""
    parent = real.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot write {what} to {path}: {parent} is not a directory")
    longest = max(len(os.fsencode(part)) for part in real.relative_to(parent).parts)
    if longest > os.pathconf(parent, "PC_NAME_MAX"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=parent)
    os.close(handle)
    os.unlink(name)
