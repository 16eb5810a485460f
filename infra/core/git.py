"""What the pipeline needs of git: a commit of the working tree as it is, and files of a commit.

Nothing here touches the user's branch, index or stash.
"""

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.files import cannot_write
from vlfoundry.infra.core.project import belongs

RUN_REFS = "refs/runs"
"""Commits made for runs stay reachable here: no branch, not shown by `git log` or `git branch`."""
ADDED_AT_ONCE = 500
"""paths on one command line"""
FALLBACK_IDENTITY = {"name": "VLFoundry", "email": "vlfoundry@localhost"}


class GitError(UserError):
    """A git command failed."""


def git(
    root: Path, *arguments: str, env: dict[str, str] | None = None, held: tuple[int, ...] = ()
) -> str:
    """Run git in `root`; what it printed, without the last newline. Raises GitError.

    held: file descriptors that it keeps open, such as that of a lock, even if we are killed.
    """
    result = subprocess.run(
        ["git", *arguments],
        cwd=root,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        pass_fds=held,
    )
    if "not a git repository" in result.stderr:
        raise GitError(f"{root} is not a git repository; `git init {root}` makes it one")
    if result.returncode:
        why = result.stderr.strip() or f"exit code {result.returncode}, without a word"
        raise GitError(f"git {' '.join(arguments)} failed in {root}: {why}")
    return result.stdout.rstrip("\n")


def repository_of(folder: Path) -> Path | None:
    """The top of the working tree that a folder lies in, if it does."""
    with contextlib.suppress(GitError):
        return Path(git(folder, "rev-parse", "--show-toplevel"))
    return None


def common_folder(root: Path) -> Path:
    """Where the repository of `root` keeps what all its worktrees share."""
    return (root / git(root, "rev-parse", "--git-common-dir")).resolve()


@contextlib.contextmanager
def repository_lock(root: Path) -> Iterator[None]:
    """Wait for our other processes that write to the same repository (refs, worktrees).

    Git's own locks fail at once and tell people to delete files. Must not be nested.
    """
    path = common_folder(root) / "vlfoundry.lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise cannot_write(path, "the lock of the repository", error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def identity(root: Path) -> dict[str, str]:
    """Name and email that a commit or tag of ours carries: git's own, else a fallback."""
    return FALLBACK_IDENTITY | configured_identity(root)


def configured_identity(root: Path) -> dict[str, str]:
    """Which of `name` and `email` git's settings have."""
    found = {key: _configured(root, f"user.{key}") for key in FALLBACK_IDENTITY}
    return {key: value for key, value in found.items() if value is not None}


def _configured(root: Path, key: str) -> str | None:
    try:
        return git(root, "config", "--get", key) or None
    except GitError:  # exit status 1: not set
        return None


def head(root: Path) -> str | None:
    """The commit that is checked out, or None in a repository without commits."""
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except GitError:
        return None


def snapshot(root: Path, say: Callable[[str], None] = lambda _: None) -> str:
    """A commit that holds the working tree as it is; returns its id.

    Of files that git does not know only those are in it that a run is made of
    (`infra.core.project`): a tag will point to the commit, and be pushed. What was left out is
    said.

    That is HEAD itself where nothing differs. Else a new commit on top of HEAD, kept under
    `refs/runs/<tree>`; the same working tree gives the same commit again.
    """
    with repository_lock(root):
        return _snapshot(root, say)


def _snapshot(root: Path, say: Callable[[str], None]) -> str:
    parent = head(root)
    with tempfile.TemporaryDirectory(prefix="vlfoundry-index-") as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        if parent:
            git(root, "read-tree", parent, env=index)
            git(root, "add", "--update", "--", ":/", env=index)
        listing = git(root, "ls-files", "-z", "--others", "--exclude-standard", env=index)
        ours, others = belongs(root, list(filter(None, listing.split("\0"))))
        for start in range(0, len(ours), ADDED_AT_ONCE):
            some = [f":(literal){path}" for path in ours[start : start + ADDED_AT_ONCE]]
            git(root, "add", "--", *some, env=index)
        if others:
            say(
                f"left out of the run: {len(others)} files that git does not know, and that "
                f"neither dvc.yaml nor the sources name, e.g. {others[0]}; `git add` what belongs "
                "to it"
            )
        tree = git(root, "write-tree", env=index)
    if parent and git(root, "rev-parse", f"{parent}^{{tree}}") == tree:
        return parent
    ref = f"{RUN_REFS}/{tree[:16]}"
    known = git(root, "for-each-ref", "--format=%(objectname) %(parent)", ref).split()
    if known and known[1:] == ([parent] if parent else []):
        return known[0]
    who = identity(root)
    commit = git(
        root, "commit-tree", tree, *(["-p", parent] if parent else []),
        "-m", "Working tree of a run",
        env={
            "GIT_AUTHOR_NAME": who["name"], "GIT_AUTHOR_EMAIL": who["email"],
            "GIT_COMMITTER_NAME": who["name"], "GIT_COMMITTER_EMAIL": who["email"],
        },
    )  # fmt: skip
    git(root, "update-ref", ref, commit)
    return commit


def read(root: Path, commit: str, path: str) -> str | None:
    """The text of a file at a commit, or None if the commit has no such file."""
    if not git(root, "ls-tree", "--full-tree", "--name-only", commit, "--", path):
        return None
    return git(root, "show", f"{commit}:{path}")
