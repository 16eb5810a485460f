"""Where a step keeps what must outlive a kill: `work/STEP/RUN KEY/`, a folder for each run key.

Nothing here deletes anything: what another run key left stays where it is, and is there again when
parameters, inputs and code are what they were.
"""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.files import write_atomic

KEY_FILE = "run_key"
"""in a work folder: whose it is, in full; as old as its last use"""
LETTERS = 12
"""of a run key that name its folder"""
PART = ".part"
"""ends the name of a folder that is not whole yet"""
GONE = ".gone"
"""ends the name of one that is being deleted, of which anything may be missing"""
SET_ASIDE = ".old-"
"""before a run key's letters, where an older version put the folders of other run keys: beside
`work/STEP`, which held the state of the last one"""
UNBORN = ".new"
"""after `work/STEP`, where an older version made it"""
STAYS = {errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS}
"""errors of renaming that a folder of another run is no reason to fail for"""
FOUND_BY_FSCK = "lost+found"
"""in a folder that is a disk of its own, and root's"""


def home(root: Path, address: str) -> Path:
    """Where all folders of a step lie; of "sft@full" it is `work/sft-full`."""
    return root / "work" / address.replace("@", "-")


def folder(root: Path, address: str, key: str) -> Path:
    """That of one run key."""
    return home(root, address) / key[:LETTERS]


def lock_file(root: Path, address: str) -> Path:
    """What a running step holds locked."""
    return root / ".dvc" / "tmp" / "stages" / f"{address.replace('@', '-')}.lock"


def claim(root: Path, address: str, key: str, say: Callable[[str], None]) -> Path:
    """The folder of a run key, made if there is none. The step's lock must be held.

    Args:
        address: of the step, such as "sft@full".
        say: is told whether there are others.

    Raises:
        DataError: the folder of its name is another run key's, or nobody's.
        OSError: it cannot be made.
    """
    place, own = home(root, address), folder(root, address, key)
    left = _adopt(place)
    if key in left and not own.exists():
        say(
            f"{left[key].relative_to(root)} is of just this run and could not be renamed to "
            f"{own.relative_to(root)}; move it there if this is to go on with it"
        )
    if not own.exists():
        if others := len(folders(place)):
            say(
                f"parameters, inputs or code are others than in {others} earlier "
                f"run{'s' if others > 1 else ''} below {place.relative_to(root)}: it starts anew; "
                "`vlfoundry gc` deletes what nobody needs"
            )
        part = own.with_name(own.name + PART)
        part.mkdir(parents=True, exist_ok=True)
        write_atomic(part / KEY_FILE, key)
        part.rename(own)
    if (held := key_of(own)) != key:
        whose = f"that of {held}" if held else "marked as nobody's"
        raise DataError(
            f"{own} should hold the state of run key {key} and is {whose}; move it away and run "
            "again"
        )
    os.utime(own / KEY_FILE)
    return own


def key_of(folder: Path) -> str | None:
    """The run key whose state lies in a folder; None: it is no such folder."""
    try:
        return (folder / KEY_FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def folders(place: Path) -> list[Path]:
    """The folders of all run keys of a step, the one used last first.

    place: as `home` says.
    """
    used: dict[Path, int] = {}
    for path in place.iterdir() if place.is_dir() else ():
        if path.suffix not in (PART, GONE) and key_of(path):
            with contextlib.suppress(FileNotFoundError):  # `vlfoundry gc` has just taken it
                used[path] = (path / KEY_FILE).stat().st_mtime_ns
    return sorted(used, key=lambda path: used[path], reverse=True)


def set_aside(place: Path) -> list[Path]:
    """What an older version left beside the folder of a step, and no start has taken over."""
    beside = sorted(place.parent.glob(f"{place.name}{SET_ASIDE}*"))
    return [path for path in beside if path.is_dir() and path.suffix != GONE]


def current(root: Path, address: str) -> Path | None:
    """The folder of the run that made what lies in artifacts/ now, else of the last one.

    It is `work/STEP` itself as long as no start has taken over what an older version left there.
    """
    place = home(root, address)
    found = [*([place] if key_of(place) else []), *folders(place)]
    made = made_by(root, address)
    return next((path for path in found if key_of(path) == made), found[0] if found else None)


def made_by(root: Path, address: str) -> str | None:
    """The run key of what a step has in artifacts/; None if there is nothing."""
    path = root / "artifacts" / address.replace("@", "/") / "lineage.json"
    try:
        return str(json.loads(path.read_bytes())["run_key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _adopt(place: Path) -> dict[str, Path]:
    """Take over what an older version left, which kept the last state in `work/STEP` itself.

    Each file is renamed, the key last, so that a kill loses nothing, and the next start goes on.

    Returns:
        Run key -> its folder, of what has to stay where it is: a link, which would lead elsewhere
        from another folder, and what lies on another disk or may not be moved.
    """
    if key := key_of(place):
        os.utime(place / KEY_FILE)  # it was used last, whenever it was begun
        part = place / (key[:LETTERS] + PART)
        part.mkdir(exist_ok=True)
        for path in sorted(place.iterdir(), key=lambda path: path.name == KEY_FILE):
            if path.suffix not in (PART, GONE) and path.name != FOUND_BY_FSCK and not key_of(path):
                path.rename(part / path.name)
    for part in place.glob(f"*{PART}"):
        if held := key_of(part):
            part.rename(_free(place, held))
    left: dict[str, Path] = {}
    for earlier in (place.with_name(place.name + UNBORN), *set_aside(place)):
        # The older version took a folder of folders for one of nobody, if it was run again.
        for path in (*folders(earlier), earlier):
            if (held := key_of(path)) and not _renamed(path, place, held):
                left[held] = path
    return left


def _renamed(path: Path, place: Path, key: str) -> bool:
    if path.is_symlink():
        return False
    place.mkdir(parents=True, exist_ok=True)
    try:
        path.rename(_free(place, key))
    except OSError as error:
        if error.errno not in STAYS:
            raise
        return False
    return True


def _free(place: Path, key: str) -> Path:
    """A name for the folder of a run key; one that has two states keeps both."""
    name = key[:LETTERS]
    names = (f"{name}.{number}" if number else name for number in itertools.count())
    return next(place / name for name in names if not (place / name).exists())
