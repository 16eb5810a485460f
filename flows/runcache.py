"""DVC's run cache: which stages it knows, and many of them restored in one process.

    python -m vlfoundry.flows.runcache '["a"]' '["b", "a"]'

`dvc repro --single-item` would do the same, a stage a process: a second or more each to start DVC,
and nearly one to write dvc.lock, which DVC reads and writes as a whole. Here the record of many
stages is written at once, and by a rename: whoever is killed leaves the old dvc.lock or the new.

Each argument is a stage and those upstream of it that are out of date, all in the graph's order.
A stage whose upstream is not brought up to date here stays as it is: what it will read is not known
yet. No command of a stage is run. A line of JSON on standard output tells of each stage whose
record is written.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from vlfoundry.flows.restored import drop_damaged_outputs
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.files import write_atomic

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

EXIT_GAVE_UP = 1
RECORD_EVERY_S = 15.0
"""What was restored since the last record is restored again after a kill."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A stage that is up to date now, or one whose objects were damaged."""

    stage: str
    state: Literal["restored", "unchanged", "damaged"]
    seconds: float = 0.0
    """Wall time."""
    damaged: tuple[str, ...] = ()
    """Paths of the outputs that the cache has no more."""

    def line(self) -> str:
        """As it is told to whoever started us."""
        return json.dumps(dataclasses.asdict(self))


def read_line(line: str) -> Restored | None:
    """What `Restored.line` has written; None if it is another line."""
    try:
        facts = json.loads(line)
    except ValueError:
        return None
    names = {field.name for field in dataclasses.fields(Restored)}
    if not isinstance(facts, dict) or set(facts) != names:
        return None
    given: dict[str, Any] = {**facts, "damaged": tuple(facts["damaged"])}
    return Restored(**given)


def command_line(stale: Iterable[Sequence[str]]) -> list[str]:
    """The argv that restores stages.

    stale: a name and those of its stale upstream stages each, in the graph's order.
    """
    return [sys.executable, "-m", __spec__.name, *(json.dumps(list(names)) for names in stale)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What DVC's cache has of a stage."""

    stage: "PipelineStage"
    """As it is after a restore."""
    in_lock: bool
    """Whether dvc.lock says so, or the run cache."""

    @property
    def outs(self) -> list[Any]:
        """DVC's outputs."""
        return self.stage.outs


def known(stage: "PipelineStage", made: Mapping[str, Any] = MappingProxyType({})) -> Known | None:
    """What a stage's outputs would be; None if the cache does not know them, or lacks one.

    As `StageCache.restore` decides it, before it touches anything. Ask `stage.changed()` before:
    afterwards the stage takes its inputs as they are for recorded.

    made: outputs of earlier stages by their absolute path, which count, not what lies there now.
    """
    from dvc.dependency.base import DependencyDoesNotExistError
    from dvc.stage.cache import _can_hash
    from dvc.stage.serialize import to_single_stage_lockfile

    if not stage.cmd or stage.frozen:
        return None
    cache: Any = stage.repo.stage_cache
    recorded = all(bool(out.hash_info) for out in stage.outs)
    in_lock = recorded and not stage.changed_stage()
    try:
        for dep in stage.deps:
            in_lock = _take(dep, made.get(dep.fs_path)) and in_lock
    except DependencyDoesNotExistError:
        return None
    if not _can_hash(stage):
        return None
    entry = to_single_stage_lockfile(stage) if in_lock else cache._load(stage)
    found = _as_in(entry, stage) if entry else None
    return Known(stage=found, in_lock=in_lock) if found and found.outs_cached() else None


def _take(dep: Any, made: Any | None) -> bool:
    """Set an input to what it is, or will be as an output; whether it was recorded as that."""
    if made is None:
        same = not dep.changed()
        dep.save()
        return same
    same = dep.hash_info == made.hash_info
    dep.hash_info, dep.meta = made.hash_info, made.meta
    dep.get_hash = lambda: made.hash_info  # DVC's run cache would read the file, if there is one
    return same


def _as_in(entry: dict[str, Any], stage: "PipelineStage") -> "PipelineStage":
    """`StageCache._create_stage`, wherever the working directory is."""
    from dvc.stage import PipelineStage, create_stage
    from dvc.stage.loader import StageLoader

    outs = [out["path"] for out in entry["outs"]]
    found: Any = create_stage(
        PipelineStage, stage.repo, stage.path, cmd=entry["cmd"], wdir=stage.wdir, outs=outs
    )
    StageLoader.fill_from_lock(found, entry)
    return found


def restore(root: Path, stale: Iterable[Sequence[str]]) -> Iterator[Restored]:
    """Bring up to date what DVC's cache can; yields what dvc.lock already says.

    Raises:
        DvcException: DVC cannot go on.
        OSError: a file cannot be written.
    """
    from dvc.dvcfile import load_file
    from dvc.repo import Repo, lock_repo

    with (
        Repo(str(root), _wait_for_lock=True) as repo,
        lock_repo(repo),
        repo.scm_context(quiet=True),
    ):
        stages: Any = load_file(repo, str(root / "dvc.yaml")).stages
        waiting, record = set[str](), _Record(repo)
        for name, *upstream in stale:
            waiting.add(name)
            if name not in stages or not waiting.isdisjoint(upstream):
                continue
            ended = _restore(repo, stages[name], record)
            if ended and ended.state == "damaged":
                yield ended
            elif ended:
                waiting.discard(name)
                record.ended.append(ended)
            if record.due:
                yield from record.write()
        yield from record.write()


class _Record:
    """What dvc.lock does not say yet."""

    def __init__(self, repo: "Repo") -> None:
        self._repo = repo
        self._written = time.monotonic()
        self.stages: list[PipelineStage] = []
        self.ended: list[Restored] = []

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written > RECORD_EVERY_S

    def write(self) -> list[Restored]:
        """Write it into dvc.lock, as DVC would; what is said there now and was not before."""
        ended, stages = self.ended, self.stages
        self.ended, self.stages = [], []
        if stages:
            _write_lock(self._repo, stages)
        self._written = time.monotonic()
        return ended


def _write_lock(repo: "Repo", stages: list["PipelineStage"]) -> None:
    from dvc.dvcfile import Lockfile

    path, draft = Path(repo.root_dir) / "dvc.lock", Path(repo.tmp_dir or "") / "dvc.lock.new"
    draft.unlink(missing_ok=True)
    if path.exists():
        draft.write_bytes(path.read_bytes())
    Lockfile(repo, str(draft)).dump_stages(stages)
    repo.scm_context.files_to_track.discard(os.path.relpath(draft))
    repo.scm_context.track_file(os.path.relpath(path))
    write_atomic(path, draft.read_bytes())
    draft.unlink()


def _restore(repo: "Repo", stage: Any, record: _Record) -> Restored | None:
    """One stage, without its entry in dvc.lock; None: it must be run."""
    began, name = time.monotonic(), stage.name
    if not stage.changed():
        return Restored(stage=name, state="unchanged")
    found = known(stage)
    if found is None:
        return None
    stage.remove_outs()
    found.stage.checkout()
    root = Path(repo.root_dir)
    got = {os.path.relpath(out.fs_path, root): out.hash_info.value for out in found.outs}
    if damaged := drop_damaged_outputs(root, got):
        return Restored(stage=name, state="damaged", damaged=tuple(damaged))
    # As Stage.run: what DVC does not keep in its cache has no place in the run cache.
    kept = all(out.use_cache or out.is_metric or out.is_plot for out in stage.outs)
    stage.save(run_cache=kept and found.in_lock)
    stage.commit()
    record.stages.append(stage)
    return Restored(stage=name, state="restored", seconds=time.monotonic() - began)


def main(arguments: Sequence[str]) -> int:
    """Restore what the arguments name; the exit status."""
    from dvc.exceptions import DvcException

    try:
        for restored in restore(Path.cwd(), [json.loads(text) for text in arguments]):
            print(restored.line(), flush=True)
    except (DvcException, UserError, OSError) as error:
        print(" ".join(str(error).split()), flush=True)
        return EXIT_GAVE_UP
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
