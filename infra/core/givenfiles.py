"""Files that somebody else wrote: what they really are, where they lie, and JSON from them."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.files import kind_of

MIB = 1024 * 1024
MOST_BYTES = 256 * MIB
"""largest file beside the weights; the largest published tokenizer.json has some 30 MB"""
MOST_JSON_BYTES = 16 * MIB
"""largest JSON file that is not a vocabulary; indexes of the largest models have 1 MB"""
VOCABULARIES = ("tokenizer.json", "vocab.json")
"""JSON files that may have `MOST_BYTES`"""
_LONGEST_NAME = 255
"""bytes of a file's name, of every file system that models are stored on"""
_SHOWN = reprlib.Repr(maxlevel=2, maxstring=60, maxother=60, maxlong=30, maxdict=3, maxlist=4)
_LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")


def shown(value: Any) -> str:
    """A value of a file in a message: short, whatever it is."""
    return _SHOWN.repr(value)


def brief(text: str, most: int = 120) -> str:
    """A name of a file in a message: its beginning and end, if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def is_file_name(name: object) -> bool:
    """Whether a value of a file can be the name of another in the same folder."""
    if not isinstance(name, str) or not name.isprintable() or Path(name).name != name:
        return False
    return len(name.encode()) <= _LONGEST_NAME


def check_file(
    path: Path, folder: Path | None = None, *, disguised: bool = True, most: int | None = None
) -> Path:
    """The same path, if it is a file with content that may be read.

    Args:
        path: what is to be read.
        folder: the model folder that the file has to lie in; None: wherever it is.
        disguised: also look whether it is empty or something else than its name says.
        most: bytes that it may have; None: any number.

    Raises:
        ModelError: it is no plain file, leads out of the folder, is empty or too large, or is a
            git-lfs pointer or a web page in place of what its name says.
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
        raise ModelError(f"{path} is {kind_of(facts.st_mode)}, expected a file")
    if most is not None and facts.st_size > most:
        raise ModelError(
            f"{path} has {facts.st_size:,} bytes, expected at most {most:,} ({most // MIB} MiB) of "
            "such a file; download it again, or take it out of the folder if it is something else"
        )
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
    large = path.name in VOCABULARIES
    check_file(path, folder, most=MOST_BYTES if large else MOST_JSON_BYTES)
    hook = None if large else _unique
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except RecursionError:
        raise ModelError(
            f"{path} is damaged: it is nested too deeply to be read; get that file again"
        ) from None
    except ValueError as error:  # of JSON, of UTF-8, of a number with too many digits
        raise ModelError(
            f"{path} is damaged: it is not valid JSON ({str(error)[:200]}); get that file again"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON mapping. Programs differ in which of two values of one name they take."""
    facts = dict(pairs)
    if len(facts) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} comes twice in one mapping, expected once")
    return facts


def check_inside(path: Path, folder: Path, *others: Path) -> None:
    """Raises ModelError if a file of a folder is no file, or leads out of it and of the others."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} cannot be followed: {error}") from None
    home = folder.resolve()
    allowed = [home, *(other.resolve() for other in others)]
    # Hugging Face's cache: snapshots/REVISION/NAME is a link to blobs/HASH of the same model.
    for place in home.parents:
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            allowed.append((place.parent / "blobs").resolve())
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{path} is a link to {os.readlink(path) if path.is_symlink() else real}, outside of "
            f"{folder}; put the file itself there: `cp -rL {folder} NEW` makes a folder of files, "
            "also of a Hugging Face cache whose links lead elsewhere"
        )
    try:
        mode = real.stat().st_mode
    except OSError:
        return  # whoever opens it says so
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(f"{path} is {kind_of(mode)}, expected a file")
