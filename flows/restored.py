"""Whether DVC's cache gave back what it was given: DVC itself does not look.

An object of the cache is named by its MD5, and one that a disk has damaged is handed out all the
same. Here what a stage got back is compared with dvc.lock, and what is damaged is deleted, so that
the stage runs again.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.config import parse_value
from infra.registry import cache_folder

DIRECTORY = ".dir"
"""ends the name of an object that lists the files of a folder"""


def drop_damaged(root: Path, stage: str) -> list[str]:
    """Delete the outputs of a stage that are not what dvc.lock says, and the objects at fault.

    Returns their paths, relative to `root`; none if all is as it was made.
    """
    lock = root / "dvc.lock"
    text = lock.read_text("utf-8") if lock.is_file() else ""
    outs = ((parse_value(text) or {}).get("stages", {}).get(stage) or {}).get("outs", [])
    damaged = []
    for out in outs:
        wrong = list(_wrong_objects(root, out))
        for md5 in wrong:
            _delete(_object(root, md5))
        if wrong:
            _delete(root / out["path"])
            damaged.append(out["path"])
    return damaged


def _wrong_objects(root: Path, out: dict[str, Any]) -> Iterator[str]:
    """Names of the objects of one output whose content, in the workspace or in the cache, is of
    another hash. An output that is missing has none: DVC sees that itself."""
    md5, place = out["md5"], root / out["path"]
    if not md5.endswith(DIRECTORY):
        yield from [md5] if _differs(place, md5) or _differs(_object(root, md5), md5) else []
        return
    listing = _object(root, md5)
    if not listing.is_file():
        return
    if _differs(listing, md5.removesuffix(DIRECTORY)):
        yield md5
        return
    for entry in json.loads(listing.read_bytes()):
        expected = entry["md5"]
        if _differs(place / entry["relpath"], expected) or _differs(
            _object(root, expected), expected
        ):
            yield expected


def _differs(path: Path, md5: str) -> bool:
    """Whether a file is there and has another hash."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() != md5


def _object(root: Path, md5: str) -> Path:
    return cache_folder(root) / "files" / "md5" / md5[:2] / md5[2:]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
