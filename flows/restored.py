"""Whether DVC's cache gave back what it was given: DVC itself does not look.

An object of the cache is named by its MD5, and one that a disk has damaged is handed out all the
same. Here what a stage got back is compared with dvc.lock, and what is damaged is deleted, so that
the stage runs again.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from vlfoundry.infra.core.config import parse_value
from vlfoundry.infra.core.dvccache import cache_folder, md5_of, object_path

DIRECTORY = ".dir"
"""ends the name of an object that lists the files of a folder"""


def drop_damaged(root: Path, stage: str) -> list[str]:
    """Delete the outputs of a stage that are not what dvc.lock says, and the objects at fault.

    Returns their paths, relative to `root`; none if all is as it was made.
    """
    lock = root / "dvc.lock"
    text = lock.read_text("utf-8") if lock.is_file() else ""
    outs = ((parse_value(text) or {}).get("stages", {}).get(stage) or {}).get("outs", [])
    return drop_damaged_outputs(root, {out["path"]: out["md5"] for out in outs})


def drop_damaged_outputs(root: Path, outs: Mapping[str, str]) -> list[str]:
    """The same for outputs whose MD5 is given: by path, relative to `root`."""
    damaged, cache = [], cache_folder(root)
    for path, md5 in outs.items():
        if drop_damaged_objects(cache, md5, root / path):
            _delete(root / path)
            damaged.append(path)
    return damaged


def drop_damaged_objects(cache: Path, md5: str, place: Path | None = None) -> list[Path]:
    """Delete the objects of one output whose content is of another hash; where they were.

    Args:
        md5: of the output, as dvc.lock has it.
        place: where the output is checked out; what differs there counts as damaged too.
    """
    wrong = [object_path(cache, name) for name in _wrong_objects(place, md5, cache)]
    for path in wrong:
        _delete(path)
    return wrong


def _wrong_objects(place: Path | None, md5: str, cache: Path) -> Iterator[str]:
    """An output that is missing has none: DVC sees that itself."""
    thing = object_path(cache, md5)
    if not md5.endswith(DIRECTORY):
        if _differs(thing, md5) or (place and _differs(place, md5)):
            yield md5
    elif _differs(thing, md5.removesuffix(DIRECTORY)):
        yield md5
    elif thing.is_file():
        for entry in json.loads(thing.read_bytes()):
            yield from _wrong_objects(place and place / entry["relpath"], entry["md5"], cache)


def _differs(path: Path, md5: str) -> bool:
    """Whether something is there, and is no file with this hash."""
    return path.exists() and not (path.is_file() and md5_of(path) == md5)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
