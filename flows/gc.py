"""`vlfoundry gc`: the one command that deletes training state, and only when told to."""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from vlfoundry.flows.lineage import origin, walk
from vlfoundry.flows.marks import is_held
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.workfolder import (
    GONE,
    KEY_FILE,
    SET_ASIDE,
    UNBORN,
    folders,
    key_of,
    lock_file,
    made_by,
    set_aside,
)
from vlfoundry.infra.registry.gto import list_models

EARLIER = "of other parameters, inputs or code than the last run"
LEFT = "set aside by an older version"
HALF = "half deleted"
BEHIND_A_LINK = "a link leads there; delete it by hand"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needed:
    """What registered models were made with."""

    models: dict[str, str]
    """Run key -> the model that it made, or that was made from it, in words."""
    unread: str | None = None
    """Why others may be needed too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a folder with training state may go."""

    folder: Path
    why: str
    """It may go, or stays."""
    kept: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Training state of one run key, or what an older version or a kill left of it."""

    project: Path
    """The project or workspace that it is of."""
    folder: Path
    step: str
    """As its folder is named: sft-full."""
    size_bytes: int
    """What there is to win: files that have no other name elsewhere."""
    used: datetime.datetime
    """When something in it was last written, or it was last gone on with."""
    kept: str | None
    """Why it stays; None: nobody needs it."""
    why: str
    """The same, or why it may go."""

    def facts(self, root: Path) -> dict[str, Any]:
        """For programs."""
        return {
            "path": self.folder.relative_to(root).as_posix(),
            "step": self.step,
            "run_key": key_of(self.folder),
            "bytes": self.size_bytes,
            "last_written": self.used.astimezone().isoformat(timespec="seconds"),
            "why": self.why,
        }


@dataclasses.dataclass(kw_only=True)
class Deleted:
    """What came of deleting."""

    freed_bytes: int = 0
    needed: list[str] = dataclasses.field(default_factory=list)
    """What somebody began to need meanwhile, in words."""
    failed: list[str] = dataclasses.field(default_factory=list)
    """What could not be deleted, and why."""


def states(root: Path) -> list[State]:
    """All training state of a project and its workspaces, the oldest first. Writes nothing.

    Kept is what was used last of each step, what made the results that lie there, what runs, and
    what a registered model was made with, or before it.

    Raises UserError if the registry cannot be read.
    """
    needed, found = _needed(root), list[State]()
    for project, step in _steps(root):
        runs = is_held(lock_file(project, step))
        verdicts = list(_verdicts(project, step, needed))
        others = {verdict.folder for verdict in verdicts}
        for verdict in verdicts:
            if runs and not verdict.kept and verdict.why != HALF:
                verdict = Verdict(folder=verdict.folder, why="the step runs now", kept=True)
            found.append(_measured(project, step, verdict, others - {verdict.folder}))
    return sorted(found, key=lambda state: (state.used, state.folder))


def table(root: Path, found: list[State]) -> Iterator[str]:
    """A row a state, in columns."""
    rows = [
        (
            state.folder.relative_to(root).as_posix(),
            f"{state.size_bytes / 1e6:,.1f} MB",
            f"last used {state.used:%Y-%m-%d}",
            state.why,
        )
        for state in found
    ]
    path, size = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for row in rows:
        yield f"  {row[0]:{path}s}  {row[1]:>{size}s}  {row[2]}  {row[3]}"


def delete(root: Path, found: list[State]) -> Deleted:
    """Delete those of `found` that are not kept, unless they are needed by now.

    Each is renamed first, with the lock of its step held, so that a kill leaves nothing that looks
    whole; and then deleted without it, for that may take long and a run would have to wait.
    """
    done, needed = Deleted(), _needed(root)
    for state in found:
        if state.kept:
            continue
        try:
            gone = _taken(state, needed)
        except FileNotFoundError:
            continue  # another gc was quicker
        except OSError as error:
            done.failed.append(f"{state.folder}: {error.strerror}")
            continue
        if isinstance(gone, str):
            done.needed.append(f"{state.folder}: {gone}")
            continue
        errors = _remove(gone)
        done.freed_bytes += max(0, state.size_bytes - _size(_files(gone)))
        if errors:
            done.failed.append(f"{gone}: {errors[0].strerror}")
    return done


def _steps(root: Path) -> Iterator[tuple[Path, str]]:
    """Every step of the project and of its workspaces that may have state."""
    workspaces = (root / "work" / "workspaces").glob("*/")
    for project in (root, *(path for path in workspaces if not path.is_symlink())):
        names = (path.name.partition(SET_ASIDE)[0] for path in (project / "work").glob("*/"))
        for step in sorted({name.removesuffix(UNBORN) for name in names}):
            yield project, step


def _verdicts(project: Path, step: str, needed: Needed) -> Iterator[Verdict]:
    """Of all state of a step, whether it runs or not."""
    place = project / "work" / step
    beside = set_aside(place)
    if place.is_symlink():
        linked = [*folders(place), *([place] if key_of(place) else [])]
        yield from (Verdict(folder=path, why=BEHIND_A_LINK, kept=True) for path in linked)
    else:
        runs = folders(place)
        yield from (Verdict(folder=path, why=HALF) for path in sorted(place.glob(f"*{GONE}")))
        if key_of(place):
            why = "the last of its step, as an older version left it"
            yield Verdict(folder=place, why=why, kept=True)
        elif not runs:  # then it is one of those beside
            runs = sorted(filter(key_of, beside), key=_used_ns, reverse=True)[:1]
            beside = [path for path in beside if path not in runs]
        for number, path in enumerate(runs):
            yield _verdict(path, project, step, needed, last=number == 0, otherwise=EARLIER)
    yield from (_verdict(path, project, step, needed, otherwise=LEFT) for path in beside)
    for path in sorted(place.parent.glob(f"{step}{SET_ASIDE}*{GONE}")):
        yield Verdict(folder=path, why=HALF)


def _verdict(
    path: Path,
    project: Path,
    step: str,
    needed: Needed,
    *,
    otherwise: str,
    last: bool = False,
) -> Verdict:
    key = key_of(path)
    kept = (
        (BEHIND_A_LINK if path.is_symlink() else None)
        or ("the last of its step" if last else None)
        or ("made what lies in artifacts/" if key and key == made_by(project, _at(step)) else None)
        or ("has folders of run keys, which its step takes over" if folders(path) else None)
        or (needed.models.get(key) if key else None)
        or (needed.unread if key else None)
    )
    return Verdict(folder=path, why=kept or otherwise, kept=kept is not None)


def _at(step: str) -> str:
    """Of "sft-full" it is "sft@full": no step and no variant has a hyphen in its name."""
    return step.replace("-", "@", 1)


def _used_ns(folder: Path) -> int:
    return (folder / KEY_FILE).stat().st_mtime_ns


def _measured(project: Path, step: str, verdict: Verdict, others: Container[Path]) -> State:
    facts = _files(verdict.folder, others)
    return State(
        project=project,
        folder=verdict.folder,
        step=step,
        size_bytes=_size(facts),
        used=datetime.datetime.fromtimestamp(max((fact.st_mtime for fact in facts), default=0)),
        kept=verdict.why if verdict.kept else None,
        why=verdict.why,
    )


def _files(folder: Path, others: Container[Path] = ()) -> list[os.stat_result]:
    """Of all that is no folder, at any depth, or of the folder if there is nothing in it. Links are
    not followed, and what a run has just deleted is left out.

    others: folders in it that do not count.
    """
    paths: list[Path] = []
    for parent, below, names in os.walk(folder) if not folder.is_symlink() else ():
        below[:] = [name for name in below if Path(parent, name) not in others]
        paths += [Path(parent, name) for name in names]
        paths += [Path(parent, name) for name in below if Path(parent, name).is_symlink()]
    facts = []
    for path in paths or [folder]:
        with contextlib.suppress(FileNotFoundError):
            facts.append(path.lstat())
    return facts


def _size(facts: list[os.stat_result]) -> int:
    """Bytes of the files all of whose names are here: none elsewhere keeps what is in them."""
    names = Counter((fact.st_dev, fact.st_ino) for fact in facts)
    files = {(fact.st_dev, fact.st_ino): fact for fact in facts if not stat.S_ISDIR(fact.st_mode)}
    return sum(fact.st_size for key, fact in files.items() if fact.st_nlink <= names[key])


def _taken(state: State, needed: Needed) -> Path | str:
    """Its folder under a name that says that it is rubbish; or why somebody needs it now."""
    if state.folder.suffix == GONE:
        return state.folder
    with _locked(state.project, state.step) as free:
        if not free:
            return f"{state.step} runs now"
        verdicts = _verdicts(state.project, state.step, needed)
        now = next((found for found in verdicts if found.folder == state.folder), None)
        if now is None:
            raise FileNotFoundError(state.folder)
        if now.kept:
            return now.why
        names = (f"{state.folder.name}{number or ''}{GONE}" for number in itertools.count())
        paths = map(state.folder.with_name, names)
        return state.folder.rename(next(path for path in paths if not path.exists()))


def _remove(folder: Path) -> list[OSError]:
    """Delete a folder; what could not be."""
    errors: list[OSError] = []

    def failed(_function: Any, _path: str, error: BaseException) -> None:
        if not isinstance(error, OSError):
            raise error
        if not isinstance(error, FileNotFoundError):  # another gc deletes it too
            errors.append(error)

    shutil.rmtree(folder, onexc=failed)
    return errors


def _needed(root: Path) -> Needed:
    models: dict[str, str] = {}
    unread = None
    if not (root / ".git").exists():
        return Needed(models=models)
    for version in list_models(root):
        try:
            for step in walk(origin(root, version.ref)):
                models[step.facts["run_key"]] = f"of {version.ref}"
        except (UserError, OSError, json.JSONDecodeError, KeyError):
            unread = f"the lineage of {version.ref} cannot be read here, and may need it"
    return Needed(models=models, unread=unread)


@contextlib.contextmanager
def _locked(project: Path, step: str) -> Iterator[bool]:
    """Hold the lock of a step; False: it runs."""
    path = lock_file(project, step)
    if not path.parents[2].is_dir():
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
