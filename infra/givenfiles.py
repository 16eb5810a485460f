"""Files that somebody else wrote: what they really are, where they lie, and JSON from them."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from infra.errors import ModelError

MOST_JSON_BYTES = 512 * 1024 * 1024
"""longest JSON file that is read; the largest published tokenizer.json has some 30 MB"""
_SHOWN = reprlib.Repr(maxlevel=2, maxstring=60, maxother=60, maxlong=30, maxdict=3, maxlist=4)
_LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")


def shown(value: Any) -> str:
    """A value of a file in a message: short, whatever it is."""
    return _SHOWN.repr(value)


def check_file(path: Path, folder: Path | None = None, *, disguised: bool = True) -> Path:
    """The same path, if it is a file with content that may be read.

    Args:
        path: what is to be read.
        folder: the model folder that the file has to lie in; None: wherever it is.
        disguised: also look whether it is empty or something else than its name says.

    Raises:
        ModelError: it is no plain file, leads out of the folder, is empty, or is a git-lfs pointer
            or a web page in place of what its name says.
    """
    if folder is not None:
        check_inside(path, folder)
    try:
        facts = path.stat()
    except OSError as error:
        reason = (
            "does not exist" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        )
        raise ModelError(f"{path} {reason}; download that file again") from None
    if not stat.S_ISREG(facts.st_mode):
        raise ModelError(f"{path} is {_sort(facts.st_mode)}, expected a file")
    found = disguise(path) if disguised else None
    if found:
        raise ModelError(f"{path} {found}")
    return path


def disguise(path: Path) -> str | None:
    """What a file is in place of its content, and what to do; None: nothing of the kind.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        return "is empty; download that file again"
    if start.startswith(_LFS):
        return (
            "is a git-lfs pointer, not the file itself; run `git lfs pull` in the folder it came "
            "from, or download that file again"
        )
    # A template of a model card may begin with markup too, but none of these is one.
    if path.suffix != ".md" and start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return "is a web page (of a login or an error?), not the file itself; download it again"
    return None


def read_mapping(
    path: Path, folder: Path | None = None, *, of: str = "names to values"
) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Args:
        path: the file.
        folder: as for `check_file`.
        of: what it maps to what, in words.

    Raises:
        ModelError: as `check_file`; or it is no JSON, or holds something else.
    """
    facts = read_json(path, folder)
    if not isinstance(facts, dict):
        raise ModelError(
            f"{path} is damaged: it holds {shown(facts)}, expected a mapping of {of}; get that "
            "file again"
        )
    return facts


def read_json(path: Path, folder: Path | None = None) -> Any:
    """A JSON file's content. Raises ModelError as `read_mapping` does, but takes any value."""
    check_file(path, folder)
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ModelError(
            f"{path} has {path.stat().st_size:,} bytes, expected a JSON file of at most "
            f"{MOST_JSON_BYTES:,}"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(
            f"{path} is damaged: it is nested too deeply to be read; get that file again"
        ) from None
    except ValueError as error:  # of JSON, of UTF-8, of a number with too many digits
        raise ModelError(
            f"{path} is damaged: it is not valid JSON ({str(error)[:200]}); get that file again"
        ) from None


def check_inside(path: Path, folder: Path, *others: Path) -> None:
    """Raises ModelError if a file of a folder is no file, or leads out of it and of the others."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} cannot be followed: {error}") from None
    home = folder.resolve()
    allowed = [home, *(other.resolve() for other in others)]
    # Hugging Face's cache: snapshots/REVISION/NAME is a link to blobs/HASH of the same model.
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{path} is a link to {os.readlink(path) if path.is_symlink() else real}, outside of "
            f"{folder}; put the file itself there"
        )
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise ModelError(f"{path} is {_sort(real.stat().st_mode)}, expected a file")


def _sort(mode: int) -> str:
    for is_one, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if is_one(mode):
            return name
    return "no plain file"
