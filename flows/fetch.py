"""`vlfoundry fetch`: a registered model from DVC's remote, as it is configured here and now.

`dvc fetch --all-commits` asks each commit for its own configuration, so that a remote which was
added after the run is never looked at. Here DVC sees the run's dvc.lock beside today's .dvc/config.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vlfoundry.flows.restored import drop_damaged_objects
from vlfoundry.infra.core.config import parse_value
from vlfoundry.infra.core.dvccache import cache_folder, share_settings
from vlfoundry.infra.core.errors import DataError, ModelError
from vlfoundry.infra.core.git import GitError, git, read, repository_lock
from vlfoundry.infra.registry.gto import find_version, locked_file, locked_files

SHARED = Path(".dvc/config")
NEEDED = ("lineage.json", "records.parquet", "kept.parquet")
"""what tells a model's rows"""


def fetch(root: Path, model: str, *, everything: bool = False) -> str:
    """Fetch a version into DVC's cache; what was done.

    Args:
        root: the project.
        model: a registered name.
        everything: all that its run made, not only the model and what lineage needs.

    Raises:
        ModelError: there is no such version, or it is a folder.
        DataError: DVC could not fetch it.
    """
    try:
        version = find_version(root, model)
    except ModelError:
        if not Path(model).is_dir():
            raise
        raise ModelError(
            f"{model} is a folder, which is here already; expected a registered name: "
            "`vlfoundry models` lists them"
        ) from None
    lock = read(root, version.commit, "dvc.lock") or ""
    stages = (parse_value(lock) or {}).get("stages", {})
    made = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    wanted = [
        path for path in made if everything or path == version.path or Path(path).name in NEEDED
    ]
    cache = cache_folder(root)
    for path in wanted:  # what is there is not fetched again
        drop_damaged_objects(cache, made[path])
    with _worktree(root, version.commit) as place:
        if (root / SHARED).is_file():  # as it is now
            shutil.copy2(root / SHARED, place / SHARED)
        share_settings(root, place)
        said = _dvc_fetch(place, [] if everything else wanted)
    damaged = [str(thing) for path in wanted for thing in drop_damaged_objects(cache, made[path])]
    if damaged:
        raise DataError(
            f"DVC's remote has other bytes of {version.ref} than its run made (seen in "
            f"{', '.join(damaged)}, and deleted there); delete them in the remote, and `dvc push` "
            "where it was trained"
        )
    if not _is_here(root, lock, version.path):
        raise DataError(
            f"DVC could not fetch {version.ref}: {said or 'no remote has all of it'}; "
            "`dvc remote list` shows what is configured, `dvc remote add -d NAME URL` adds a "
            "remote, and `dvc push` in the project or workspace where it was trained fills it"
        )
    return f"{version.ref}: {'all' if everything else 'the model'} of its run is in DVC's cache"


@contextlib.contextmanager
def _worktree(root: Path, commit: str) -> Iterator[Path]:
    """A commit in a worktree of its own, for one fetch at a time: what a fetch that was killed has
    left there goes first."""
    place, lock = root / "work" / "fetch", root / "work" / "fetch.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _remove(root, place)
        try:
            with repository_lock(root):
                git(root, "worktree", "add", "--quiet", "--detach", str(place), commit)
            yield place
        finally:
            _remove(root, place)


def _remove(root: Path, place: Path) -> None:
    """A worktree, whole or not, and what git knows of it."""
    shutil.rmtree(place, ignore_errors=True)
    with repository_lock(root), contextlib.suppress(GitError):  # git knows none
        git(root, "worktree", "remove", "--force", str(place))


def _dvc_fetch(place: Path, targets: list[str]) -> str:
    """Let DVC fetch; the first error that it told. It does not always fail without a remote."""
    ended = subprocess.run(
        [sys.executable, "-m", "dvc", "fetch", *targets],
        cwd=place, capture_output=True, text=True, check=False,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[0].removeprefix("ERROR: ") if errors else ""


def _is_here(root: Path, lock: str, path: str) -> bool:
    try:
        files, _ = locked_files(root, lock, path)
        for name in files:
            locked_file(root, lock, f"{path}/{name}")
    except DataError:
        return False
    return True
