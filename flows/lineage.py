"""Walks back from a model to what it was made of: stages, run keys, source files and rows.

Every stage leaves a lineage.json with its run key, its parameters and the fingerprints of its
inputs. This follows the inputs from stage to stage, in the run that dvc.lock describes: the
version's own for a registered model, the working tree's for a folder.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlfoundry.flows.start import describe
from vlfoundry.infra.core.config import parse_value
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.files import require_writable
from vlfoundry.infra.core.git import read
from vlfoundry.infra.core.project import source_folders
from vlfoundry.infra.core.stage import read_origin
from vlfoundry.infra.registry.gto import check_files, find_version, locked_file, locked_files

LINEAGE_FILE = "lineage.json"
RECORDS = "artifacts/ingest/records.parquet"
KEPT = "kept.parquet"
SHARD_STAGE = "shard"
SHORT = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One stage on the way back."""

    stage: str
    """Its DVC name."""
    depth: int
    """Stages between it and the model."""
    facts: dict[str, Any]
    """Its lineage.json."""
    sources: dict[str, str]
    """Inputs that no stage made: {path: sha256}."""
    starts: dict[str, str]
    """Those of them that are models which training went on from: {path: their origin in words}."""
    before: tuple[str, ...]
    """Stages that made its other inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a lineage starts: a dvc.lock and a path in its run."""

    root: Path
    """The checkout whose cache holds the run's outputs."""
    title: str
    """What was asked for, in words."""
    lock: str
    """Text of the run's dvc.lock."""
    path: str
    """The model folder in that run."""


def origin(root: Path, model: str) -> Origin:
    """Find the run behind a registered name or a model folder.

    Raises ModelError, DataError; also for a folder that holds another model than dvc.lock says.
    """
    folder = next((f for f in (Path(model), root / model) if (f / "config.json").is_file()), None)
    if folder is not None:
        return _of_folder(root, folder)
    version = find_version(root, model)
    return Origin(
        root=root,
        title=f"{version.ref} (commit {version.commit[:SHORT]}, {version.path})",
        lock=read(root, version.commit, "dvc.lock") or "",
        path=version.path,
    )


def _of_folder(root: Path, folder: Path) -> Origin:
    """A lineage is of weights, not of a path: the folder must hold what the lock says."""
    real, lock = folder.resolve(), root / "dvc.lock"
    if not real.is_relative_to(root.resolve()):
        known = describe(read_origin(folder))
        raise DataError(
            f"{folder} is outside of the project {root}, whose dvc.lock knows nothing of it "
            f"({known}); give a registered name, or a folder that a run here made"
        )
    path = real.relative_to(root.resolve()).as_posix()
    text = lock.read_text("utf-8") if lock.is_file() else ""
    if _maker(_made(text), path) is not None:
        check_files(real, locked_files(root, text, path)[0])
    return Origin(root=root, title=path, lock=text, path=path)


def _made(lock: str) -> dict[str, str]:
    """Output -> the stage that made it, by a dvc.lock."""
    stages = (parse_value(lock) or {}).get("stages", {})
    return {out["path"]: name for name, stage in stages.items() for out in stage.get("outs", [])}


def walk(start: Origin) -> Iterator[Step]:
    """The stage that made the model, then those before it, each once, nearest first."""
    stages = (parse_value(start.lock) or {}).get("stages", {})
    made = _made(start.lock)
    first = _maker(made, start.path)
    if first is None:
        came = read_origin(start.root / start.path)
        known = f"it is {describe(came)}" if came else "so nothing is known of it"
        raise DataError(f"{start.path}: no stage of dvc.lock made it, {known}")
    waiting, seen = [(first, 0)], {first}
    while waiting:
        name, depth = waiting.pop(0)
        facts = _facts(start, stages[name])
        before, sources = [], {}
        for path, digest in facts["inputs"].items():
            maker = _maker(made, path)
            if maker is None:
                sources[path] = digest
            elif maker not in before:
                before.append(maker)
        origins = facts.get("starts", {})
        yield Step(
            stage=name,
            depth=depth,
            facts=facts,
            sources=sources,
            starts={path: describe(origins[path]) for path in sources if path in origins},
            before=tuple(sorted(before)),
        )
        waiting += [(earlier, depth + 1) for earlier in sorted(before) if earlier not in seen]
        seen.update(before)


def lineage_facts(root: Path, model: str) -> dict[str, Any]:
    """The way back for programs: what was asked for, its steps nearest first, and source files.

    Hashes and run keys are whole.
    """
    start = origin(root, model)
    steps = list(walk(start))
    sources = {path: digest for step in steps for path, digest in step.sources.items()}
    return {
        "model": model,
        "title": start.title,
        "path": start.path,
        "steps": [
            {
                "stage": step.stage,
                "depth": step.depth,
                "run_key": step.facts["run_key"],
                "before": step.before,
                "parameters": step.facts["parameters"],
                "inputs": step.facts["inputs"],
                "starts": step.starts,
                "code": step.facts.get("code"),
                "libraries": step.facts.get("libraries"),
                "accepted": step.facts.get("accepted"),
            }
            for step in steps
        ],
        "sources": dict(sorted(sources.items())),
    }


def lineage_lines(root: Path, model: str) -> list[str]:
    """The way back as text."""
    start = origin(root, model)
    lines, sources, starts = [start.title], dict[str, str](), dict[str, str]()
    for step in walk(start):
        before = [*step.before, *sorted(step.starts)]
        after = f"  <- {', '.join(before)}" if before else ""
        lines.append(f"  {step.stage:22s} run key {step.facts['run_key'][:SHORT]}{after}")
        if accepted := step.facts.get("accepted"):
            lines.append(f"      {_declaration(accepted)}")
        sources |= step.sources
        starts |= step.starts
    files = {path: f"sha256 {digest[:SHORT]}" for path, digest in sorted(sources.items())}
    if starts:
        lines.append("models that it went on from (their rows are not among those of this run):")
        lines += [f"  {path:34s} {files.pop(path)}  {starts[path]}" for path in sorted(starts)]
    return [*lines, "source files:", *(f"  {path:34s} {digest}" for path, digest in files.items())]


def _declaration(accepted: dict[str, Any]) -> str:
    changed = ", ".join(accepted["modules"]) or "what changed is not known"
    return (
        f"code {accepted['code'][:SHORT]} counts as {accepted['counts_as'][:SHORT]} ({changed}), "
        f"said {accepted['by']} on {accepted['on']}: {accepted['because']}"
    )


def write_rows(root: Path, model: str, out: Path) -> int:
    """Write the records that the model was trained on as Parquet; their number.

    These are the rows that entered the shards: row, image, caption, language, source, concept.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    _require_own_place(root, out)
    start = origin(root, model)
    shard = next((step for step in walk(start) if step.stage == SHARD_STAGE), None)
    kept = [path for path in (shard.facts["inputs"] if shard else {}) if path.endswith(KEPT)]
    if len(kept) != 1:
        raise DataError(f"{start.title}: expected one {KEPT} among the inputs of its shards")
    rows = pq.read_table(locked_file(root, start.lock, kept[0]), columns=["row"])["row"]
    records = pq.read_table(locked_file(root, start.lock, RECORDS))
    trained = records.filter(pc.is_in(records["row"], value_set=rows.combine_chunks()))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    pq.write_table(trained, part)  # it removes what it could not write
    part.replace(out)
    return trained.num_rows


def _require_own_place(root: Path, out: Path) -> None:
    """Raises UserError for a file that holds something else, or that the project itself makes."""
    require_writable(out, "the rows")
    real = out.resolve()
    taken = [root / name for name in ("artifacts", "data", *source_folders(root))]
    inside = any(real.is_relative_to(folder.resolve()) for folder in taken)
    if inside or (out.exists() and not _is_parquet(out)):
        what = "is a file of the project" if inside else "is not a Parquet file"
        raise DataError(f"{out} {what} and would be overwritten; name another place for the rows")


def _is_parquet(path: Path) -> bool:
    """Whether a file may be replaced by rows: it holds some, or nothing yet."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) in (b"", b"PAR1")


def _maker(made: dict[str, str], path: str) -> str | None:
    """The stage whose output `path` is, lies in, or contains."""
    for out, name in made.items():
        if Path(path).is_relative_to(out) or Path(out).is_relative_to(path):
            return name
    return None


def _facts(start: Origin, stage: dict[str, Any]) -> dict[str, Any]:
    for out in stage.get("outs", []):
        if Path(out["path"]).name == LINEAGE_FILE:
            return json.loads(locked_file(start.root, start.lock, out["path"]).read_text("utf-8"))
    raise DataError(
        f"the stage with the command {stage['cmd']!r} has no {LINEAGE_FILE} among its outputs"
    )
