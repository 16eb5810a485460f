"""`vlfoundry fetch`: a registered model from DVC's remote, as it is configured here and now.

`dvc fetch --all-commits` asks each commit for its own configuration, so that a remote which was
added after the run is never looked at. Here DVC sees the run's dvc.lock beside today's .dvc/config.
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

from infra.config import parse_value
from infra.errors import DataError
from infra.git import git, read, repository_lock
from infra.registry import cache_folder, find_version, locked_file, locked_files

LINEAGE = "lineage.json"


def fetch(root: Path, model: str, *, everything: bool = False) -> str:
    """Fetch a version into DVC's cache; what was done.

    Args:
        root: the project.
        model: a registered name.
        everything: all that its run made, not only the model and what lineage needs.

    Raises:
        ModelError: there is no such version.
        DataError: DVC could not fetch it.
    """
    version = find_version(root, model)
    lock = read(root, version.commit, "dvc.lock") or ""
    stages = (parse_value(lock) or {}).get("stages", {})
    made = [out["path"] for stage in stages.values() for out in stage.get("outs", [])]
    wanted = [p for p in made if p == version.path or Path(p).name in (LINEAGE, "kept.parquet")]
    wanted += [p for p in made if p.endswith("records.parquet")]
    (root / "work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=root / "work") as folder:
        place = Path(folder) / "run"
        with repository_lock(root):
            git(root, "worktree", "add", "--quiet", "--detach", str(place), version.commit)
        try:
            _configure(root, place)
            said = _dvc_fetch(place, [] if everything else wanted)
        finally:
            with repository_lock(root):
                git(root, "worktree", "remove", "--force", str(place))
    if not _is_here(root, lock, version.path):
        raise DataError(
            f"DVC could not fetch {version.ref}{said}; `dvc remote list` shows what is "
            "configured, `dvc remote add -d NAME URL` adds a remote, and `dvc push` where it was "
            "trained fills it"
        )
    return f"{version.ref}: {'all' if everything else 'the model'} of its run is in DVC's cache"


def _configure(root: Path, place: Path) -> None:
    """Today's configuration, and the cache of `root`."""
    for name in ("config", "config.local"):
        if (root / ".dvc" / name).is_file():
            shutil.copy2(root / ".dvc" / name, place / ".dvc" / name)
    parser = ConfigParser(interpolation=None)
    local = place / ".dvc" / "config.local"
    parser.read(local, encoding="utf-8")
    _absolute_remotes(root, place, parser)
    if not parser.has_section("cache"):
        parser.add_section("cache")
    parser.set("cache", "dir", str(cache_folder(root)))
    text = io.StringIO()
    parser.write(text)
    local.unlink(missing_ok=True)
    with os.fdopen(os.open(local, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text.getvalue())


def _absolute_remotes(root: Path, place: Path, local: ConfigParser) -> None:
    """A remote that is a folder may be written relative to .dvc."""
    shared = ConfigParser(interpolation=None)
    shared.read(place / ".dvc" / "config", encoding="utf-8")
    for parser in (shared, local):
        for section in parser.sections():
            url = parser.get(section, "url", fallback="")
            if section.startswith("'remote") and "://" not in url and not Path(url).is_absolute():
                if not local.has_section(section):
                    local.add_section(section)
                local.set(section, "url", str((root / ".dvc" / url).resolve()))


def _dvc_fetch(place: Path, targets: list[str]) -> str:
    """Let DVC fetch; what it complained about, if it did. It does not always fail without a
    remote."""
    ended = subprocess.run(
        [sys.executable, "-m", "dvc", "fetch", *targets],
        cwd=place, capture_output=True, text=True, check=False,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR: ")]
    return f": {errors[0].removeprefix('ERROR: ')}" if errors else ""


def _is_here(root: Path, lock: str, path: str) -> bool:
    try:
        files, _ = locked_files(root, lock, path)
        for name in files:
            locked_file(root, lock, f"{path}/{name}")
    except DataError:
        return False
    return True
