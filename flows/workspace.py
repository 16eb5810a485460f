"""A place of its own for a run with its own parameters.

Two runs must never share a workspace (DVC's locks know processes, not intentions), and a run with
another profile must not rewrite the params.yaml that somebody is editing. So such a run gets a git
worktree of the working tree as it is now, with the merged params.yaml and the shared DVC cache.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlfoundry.flows.lock import LOCK_FILE, RunLock, run_lock
from vlfoundry.flows.parameters import check_parameters
from vlfoundry.flows.recipes import with_profile
from vlfoundry.infra.core.config import PARAMS_FILE, apply_overrides, canonical_json, load_params
from vlfoundry.infra.core.dvccache import share_settings
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.files import require_writable_folder, write_atomic
from vlfoundry.infra.core.git import GitError, common_folder, git, repository_lock, snapshot
from vlfoundry.infra.core.stage import START_FOLDER

KEPT_FILES = ("dvc.lock",)
"""What a workspace keeps of its own when it is brought up to date."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variation:
    """How a run's parameters differ from params.yaml."""

    profile: str | None = None
    """File of profiles/, without its ending, laid over params.yaml."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE assignments, laid over all."""

    def __bool__(self) -> bool:
        return self != Variation()

    @property
    def name(self) -> str:
        """A folder name: readable, and another one for other parameters."""
        parts = [self.profile or "default"]
        if self.overrides:
            digest = hashlib.sha256(canonical_json(sorted(self.overrides)).encode()).hexdigest()
            parts.append(digest[:8])
        return "-".join(parts)

    def apply(self, root: Path) -> dict[str, Any]:
        """The parameters of the run. Raises ConfigError for what does not exist in params.yaml."""
        params = load_params(root / PARAMS_FILE)
        if self.profile:
            params = with_profile(params, root, self.profile)
        return apply_overrides(params, self.overrides)


@contextlib.contextmanager
def workspace(
    root: Path,
    variation: Variation,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
    *,
    wait: bool = False,
) -> Iterator[RunLock]:
    """Make or bring up to date the workspace of a variation, and hold its lock.

    Its sources are the working tree of `root` as it is, uncommitted changes included, the models of
    data/start and what `dvc add` keeps. Outputs and state of an earlier run in the same workspace
    stay: they are what a second run goes on from. Without the lock nothing in it is changed; with
    `wait` this waits for it.

    Raises:
        BusyError: a run goes on in it.
        ConfigError: there is no such parameter, or `folder` is not a workspace of this project.
    """
    folder = workspace_folder(root, variation, folder)
    if not folder.exists():
        require_writable_folder(folder, "the workspace")
    params = variation.apply(root)
    check_parameters(root, params)  # before anything of it is made
    commit = snapshot(root, say)
    _make_worktree(root, folder, commit)
    with run_lock(folder, say, wait=wait) as lock:
        _check_out(folder, commit, lock)
        share_settings(root, folder)
        _share_inputs(root, folder)
        write_atomic(folder / PARAMS_FILE, yaml_text(params).encode())
        yield lock


def workspace_folder(root: Path, variation: Variation, folder: Path | None = None) -> Path:
    """Where the workspace of a variation is, or would be: `folder`, or one named after it.

    Raises:
        ConfigError: it is among the files of the project.
    """
    folder = (folder or root / "work" / "workspaces" / variation.name).resolve()
    inside = root.resolve() in folder.parents
    if inside and not folder.is_relative_to(root.resolve() / "work"):
        raise ConfigError(
            f"--workspace {folder} is inside of the project; name a folder outside of it, or "
            f"below {root / 'work'}"
        )
    return folder


def _make_worktree(root: Path, folder: Path, commit: str) -> None:
    """A git worktree at `folder`, of which nothing is checked out; one that is there stays."""
    with repository_lock(root):
        if (folder / ".git").exists() and not _is_unborn(folder):
            _require_ours(root, folder)
            return
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--workspace {folder} is not a directory; name a new folder")
        if folder.exists() and any(path.name != ".git" for path in folder.iterdir()):
            raise ConfigError(
                f"--workspace {folder} is neither empty nor a workspace; name a new folder"
            )
        require_writable_folder(folder, "the workspace")
        (folder / ".git").unlink(missing_ok=True)
        git(root, "worktree", "prune")
        # Forced: one whose making was killed is known to git and locked.
        git(root, "worktree", "add", "--quiet", "--force", "--force", "--no-checkout", "--detach",
            str(folder), commit)  # fmt: skip


def _is_unborn(folder: Path) -> bool:
    """Whether the making of this worktree was killed before it was one."""
    if not (folder / ".git").is_file() or [path.name for path in folder.iterdir()] != [".git"]:
        return False
    try:
        git(folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except GitError:
        return True
    return False


def _require_ours(root: Path, folder: Path) -> None:
    """Raises ConfigError for a folder in which a run would overwrite somebody's work."""
    foreign = common_folder(root) != common_folder(folder)
    if folder == root.resolve() or foreign or not (folder / ".git").is_file():
        raise ConfigError(
            f"--workspace {folder} is a checkout, not a workspace made from {root}; "
            "name a new folder"
        )
    branch = git(folder, "branch", "--show-current")
    if branch:
        raise ConfigError(
            f"--workspace {folder} has branch {branch!r} checked out, which a run would overwrite; "
            "name a new folder"
        )


def _check_out(folder: Path, commit: str, lock: RunLock) -> None:
    """Bring the sources up to date. What the workspace keeps survives even a kill meanwhile."""
    aside = folder / LOCK_FILE.parent / "kept"
    for name in KEPT_FILES:
        if (folder / name).is_file() and not (aside / name).is_file():
            aside.mkdir(exist_ok=True)
            write_atomic(aside / name, (folder / name).read_bytes())
    # Git of a run that was killed has ended: it has held the lock too.
    (folder / git(folder, "rev-parse", "--git-path", "index.lock")).unlink(missing_ok=True)
    git(folder, "checkout", "--quiet", "--force", "--detach", commit, held=(lock.descriptor,))
    for name in KEPT_FILES:
        if (aside / name).is_file():
            (aside / name).replace(folder / name)
    _drop_torn_lock(folder)


def _drop_torn_lock(folder: Path) -> None:
    """A dvc.lock that came while somebody was writing it, or was damaged, helps nobody: without
    it DVC finds what earlier runs made in its cache."""
    from vlfoundry.flows.graph import lock_is_whole

    path = folder / "dvc.lock"
    if path.is_file() and not lock_is_whole(path.read_text("utf-8", "replace")):
        path.unlink()


def _share_inputs(root: Path, folder: Path) -> None:
    """Model folders that training starts from, and what `dvc add` keeps, are no part of git: hard
    links to their files."""
    starts = {path.relative_to(root) for path in (root / START_FOLDER).glob("*") if path.is_dir()}
    for path in sorted(starts | _kept_by_dvc(folder)):
        source, target = root / path, folder / path
        if not source.exists() or _listing(target) == _listing(source):
            continue
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link)
        else:
            _link(str(source), str(target))


def _kept_by_dvc(folder: Path) -> set[Path]:
    """What the .dvc files of a workspace stand for, relative to it."""
    found = set()
    for name in filter(None, git(folder, "ls-files", "-z", "--", "*.dvc").split("\0")):
        facts = load_params(folder / name)
        base = Path(name).parent / str(facts.get("wdir", "."))
        paths = (base / str(out["path"]) for out in facts.get("outs") or ())
        found |= {Path(os.path.normpath(path)) for path in paths}
    return {path for path in found if not path.is_absolute() and ".." not in path.parts}


def _listing(path: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of a file, or of each file below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    stats = {file.relative_to(path).as_posix(): file.stat() for file in files}
    return {name: (facts.st_size, facts.st_mtime_ns) for name, facts in stats.items()}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def yaml_text(params: dict[str, Any]) -> str:
    """Parameters as YAML, in their order."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    buffer = io.StringIO()
    yaml.dump(params, buffer)
    return buffer.getvalue()
