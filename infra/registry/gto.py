"""The model registry: git tags that say which commit's weights have which name and standing.

The tags follow GTO (`internvl_c@v0.1.0` is a version, `internvl_c#champion#1` a standing), so
`gto show` and `gto history` read them. A version's commit holds the dvc.lock of the run, and that
names the weights by their hash in DVC's cache: nothing else stores what a model is.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.config import parse_value
from vlfoundry.infra.core.dvccache import cache_folder, md5_of, object_path
from vlfoundry.infra.core.errors import ConfigError, DataError, ModelError
from vlfoundry.infra.core.files import files_below, new_folder, require_writable_folder
from vlfoundry.infra.core.git import common_folder, git, identity, read, snapshot
from vlfoundry.infra.core.project import find_root

CHAMPION = "champion"
STAGE_NAME = re.compile(r"[a-z]+")
GATE_DECISION = "artifacts/gate/gate.json"
REF_PATTERN = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*)(?:@(?P<version>v\d+\.\d+\.\d+)|#(?P<stage>[a-z]+))?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """One registered model."""

    name: str
    """Its kind, e.g. internvl_c."""
    version: str
    """v0.1.0 and so on."""
    commit: str
    """Holds the sources, parameters and dvc.lock of the run that made it."""
    created: str
    """When it was registered, ISO 8601."""
    path: str
    """The model folder, relative to the root, in the run that made it."""
    md5: str
    """Identity of the weights: DVC's hash of the folder."""
    stages: tuple[str, ...] = ()
    """What it stands as now, e.g. ("champion",)."""

    @property
    def ref(self) -> str:
        """As commands take it."""
        return f"{self.name}@{self.version}"


def list_models(root: Path) -> tuple[Version, ...]:
    """All registered versions, oldest first, with what each stands as now. Tags that are not ours,
    or not of GTO's form, are left out."""
    from gto.constants import Action

    tags = _tags(root)
    versions: dict[str, Version] = {}
    by_commit: dict[tuple[str, str], str] = {}
    for tag in tags:
        if tag.action is Action.REGISTER and (facts := _facts(tag.message)):
            version = Version(
                name=tag.name,
                version=tag.version,
                commit=tag.commit,
                created=tag.created,
                path=facts["path"],
                md5=facts["md5"],
            )
            versions[version.ref] = version
            by_commit[tag.name, tag.commit] = version.ref
    for tag in tags:
        if tag.action is Action.DEREGISTER:
            versions.pop(f"{tag.name}@{tag.version}", None)
    standing: dict[tuple[str, str], str] = {}
    # Git's times have whole seconds, so two assignments can be simultaneous: GTO's counter decides.
    for tag in sorted(tags, key=lambda tag: (tag.created, tag.counter)):
        if tag.action is Action.ASSIGN and (ref := by_commit.get((tag.name, tag.commit))):
            if ref in versions:
                standing[tag.name, tag.stage] = ref
        elif tag.action is Action.UNASSIGN:
            standing.pop((tag.name, tag.stage), None)
    return tuple(
        dataclasses.replace(version, stages=tuple(_stages(ref, standing)))
        for ref, version in versions.items()
    )


def register_model(root: Path, folder: Path, *, promote: str | None = None) -> Version:
    """Give the model in `folder`, an output of the pipeline in `root`, a version.

    The same weights are registered once: a second call returns the version that they have.

    Args:
        promote: also assign this stage ("champion") to it, if it does not stand there already.

    Raises ModelError if the folder is no model or the stage's name is none, DataError if it is not
    what dvc.lock says.
    """
    import gto.api

    if promote is not None and not STAGE_NAME.fullmatch(promote):
        raise ModelError(
            f"{promote!r} is not the name of a stage; expected small letters, such as {CHAMPION}"
        )
    require_writable_folder(common_folder(root) / "refs" / "tags", "the tag of a version")
    folder = folder if folder.is_absolute() else root / folder
    name = model_kind(folder)
    path = os.path.relpath(folder.resolve(), root.resolve())
    lock = (root / "dvc.lock").read_text("utf-8") if (root / "dvc.lock").is_file() else ""
    entries, md5 = locked_files(root, lock, path)
    check_files(folder, entries)

    who = identity(root)
    author = {"author": who["name"], "author_email": who["email"]}
    known = [v for v in list_models(root) if v.name == name]
    version = next((v for v in known if v.md5 == md5), None)
    if version is None:
        number, commit = _next_version(known), snapshot(root)
        message = json.dumps({"path": path, "md5": md5}, sort_keys=True)
        gto.api.register(str(root), name, commit, version=number, message=message, **author)
        version = _find(root, name, number)
    if promote and promote not in version.stages:
        gto.api.assign(
            str(root), name, promote, version=version.version, message=f"{promote}: {version.ref}",
            **author,
        )  # fmt: skip
        version = _find(root, name, version.version)
    return version


def register_passed(root: Path) -> tuple[Version, Version | None] | None:
    """Register the model that the gate passed, as champion.

    Returns:
        It, and the champion that it replaces if the gate has not compared the two; None if the gate
        passed none.
    """
    decision = root / GATE_DECISION
    if not decision.is_file():
        return None
    gate = json.loads(decision.read_text("utf-8"))
    if not gate["passed"]:
        return None
    name = model_kind(root / gate["model"])
    before = [v for v in list_models(root) if v.name == name and CHAMPION in v.stages]
    version = register_model(root, Path(gate["model"]), promote=CHAMPION)
    compared = (gate.get("baseline") or {}).get("name")
    return version, next((v for v in before if v.ref not in (version.ref, compared)), None)


def resolve_model(ref: str | Path, root: Path | None = None) -> Path:
    """The folder of a model: a path of one, or a registered name fetched from DVC's cache.

    Args:
        ref: a folder with a config.json; `internvl_c` (its champion, else its newest version),
            `internvl_c@v0.1.0`, `internvl_c#champion`; or a stage alone, `champion`, where one
            model has it.
        root: the project whose registry is asked; default: the working directory.

    Raises ModelError, naming the registered models, if it is neither.
    """
    if (Path(ref) / "config.json").is_file():
        return Path(ref)
    root = root or _project_of(ref)
    version = find_version(root, str(ref))
    folder = root / "work" / "registry" / version.md5.removesuffix(".dir")[:16]
    if not folder.is_dir():
        fetch_version(root, version, folder)
    return folder


def _project_of(ref: str | Path) -> Path:
    try:
        return find_root()
    except ConfigError as error:
        raise ModelError(
            f"{ref} is not a model folder (it has no config.json), and registered names need a "
            f"project: {error}"
        ) from None


def fetch_version(root: Path, version: Version, folder: Path, path: str | None = None) -> str:
    """Copy a registered model out of DVC's cache into a new folder, every file checked.

    Args:
        path: another folder that its run made; None: the model's.

    Returns:
        Identity of what was copied: DVC's hash.

    Raises DataError if the run made no such folder, or the cache lacks a file or has another one.
    """
    lock = read(root, version.commit, "dvc.lock") or ""
    entries, md5 = locked_files(root, lock, path or version.path)
    _fetch(root, version, entries, folder)
    return md5


def find_version(root: Path, ref: str) -> Version:
    """The registered version that `ref` names.

    Raises ModelError, naming those there are; also for a stage alone that several models have.
    """
    versions = list_models(root)
    match = REF_PATTERN.fullmatch(ref)
    found: list[Version] = []
    if match:
        name, number, stage = match["name"], match["version"], match["stage"]
        named = [v for v in versions if v.name == name]
        if number:
            found = [v for v in named if v.version == number]
        elif stage:
            found = [v for v in named if stage in v.stages]
        else:
            found = [v for v in named if CHAMPION in v.stages] or named
            found = found or _only(ref, [v for v in versions if name in v.stages])
    if found:
        return found[-1]
    refs = [v.ref + "".join(f" #{stage}" for stage in v.stages) for v in versions]
    known = (
        ", ".join(refs) or "none is registered yet (`vlfoundry run` registers what its gate passes)"
    )
    raise ModelError(
        f"no model {ref!r}: it is no folder with a config.json and no registered name; "
        f"expected a folder, NAME, NAME@VERSION, NAME#STAGE or a stage; registered: {known}"
    )


def _only(stage: str, standing: list[Version]) -> list[Version]:
    """The one that stands as `stage`. Raises ModelError if models of several kinds do."""
    if len(standing) > 1:
        several = ", ".join(f"{v.name}#{stage} ({v.ref})" for v in standing)
        raise ModelError(f"{stage!r} is several models: {several}; say which")
    return standing


def model_kind(folder: Path) -> str:
    """The kind that a model folder's config.json declares. Raises ModelError."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    kind = json.loads(config.read_text("utf-8")).get("kind")
    if not isinstance(kind, str):
        raise ModelError(f"{config}: expected a text under 'kind', got {kind!r}")
    return kind


def locked_files(root: Path, lock: str, path: str) -> tuple[dict[str, str], str]:
    """The files of an output folder by a dvc.lock: {relative name: md5}, and the folder's identity.

    `path` may also lie inside an output. Raises DataError if no stage of the lock makes it or the
    cache lacks its list of files.
    """
    stages = (parse_value(lock) or {}).get("stages", {})
    for out in (out for stage in stages.values() for out in stage.get("outs", [])):
        if not Path(path).is_relative_to(out["path"]) or not out["md5"].endswith(".dir"):
            continue
        listing = json.loads(_object(root, out["md5"]).read_bytes())
        inside = Path(path).relative_to(out["path"]).as_posix()
        prefix = "" if inside == "." else inside + "/"
        files = {
            entry["relpath"].removeprefix(prefix): entry["md5"]
            for entry in listing
            if entry["relpath"].startswith(prefix)
        }
        return files, out["md5"] if not prefix else _identity(files)
    raise DataError(
        f"{path} is not a folder that dvc.lock knows; register a model that the pipeline made, "
        "after `dvc repro` or `vlfoundry run`"
    )


def locked_file(root: Path, lock: str, path: str) -> Path:
    """The object in DVC's cache of one output file (or a file in an output folder) of a dvc.lock.

    Raises DataError if no stage of the lock makes it or the cache lacks it.
    """
    stages = (parse_value(lock) or {}).get("stages", {})
    for out in (out for stage in stages.values() for out in stage.get("outs", [])):
        if out["path"] == path:
            return _object(root, out["md5"])
    folder, name = os.path.split(path)
    files, _ = locked_files(root, lock, folder)
    if name not in files:
        raise DataError(f"{path} is not a file that dvc.lock knows")
    return _object(root, files[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tag:
    name: str
    action: Any
    version: str
    stage: str
    counter: int
    commit: str
    created: str
    message: str


def _tags(root: Path) -> list[_Tag]:
    """Annotated tags of GTO's form, in the order of their creation."""
    from gto.tag import parse_name

    field_end, tag_end = "\x1f", "\x1e"
    fields = ("refname:short", "*objectname", "creatordate:iso-strict", "contents")
    listing = git(
        root, "for-each-ref", "--sort=creatordate", "refs/tags",
        "--format=" + field_end.join(f"%({field})" for field in fields) + tag_end,
    )  # fmt: skip
    tags = []
    for entry in filter(None, (part.strip() for part in listing.split(tag_end))):
        tag, commit, created, message = entry.split(field_end)
        if commit and (parsed := parse_name(tag, raise_on_fail=False)):
            tags.append(_Tag(
                name=parsed["name"], action=parsed["action"], version=parsed.get("version", ""),
                stage=parsed.get("stage", ""), counter=parsed.get("counter", 0),
                commit=commit, created=created, message=message,
            ))  # fmt: skip
    return tags


def _facts(message: str) -> dict[str, str] | None:
    """Path and hash from a registration's message; None if somebody else made the tag."""
    try:
        facts = json.loads(message)
    except json.JSONDecodeError:
        return None
    if not isinstance(facts, dict) or not {"path", "md5"} <= facts.keys():
        return None
    return {"path": facts["path"], "md5": facts["md5"]}


def _stages(ref: str, standing: dict[tuple[str, str], str]) -> list[str]:
    return sorted(stage for (_, stage), held in standing.items() if held == ref)


def _find(root: Path, name: str, number: str) -> Version:
    return next(v for v in list_models(root) if (v.name, v.version) == (name, number))


def _next_version(known: list[Version]) -> str:
    """A retrained model is a new minor version."""
    minors = [int(version.version.split(".")[1]) for version in known]
    return f"v0.{max(minors, default=0) + 1}.0"


def _identity(files: dict[str, str]) -> str:
    return hashlib.md5(
        json.dumps(sorted(files.items())).encode(), usedforsecurity=False
    ).hexdigest()


def _object(root: Path, md5: str) -> Path:
    """An object of DVC's cache. Raises DataError if it is missing."""
    cache = cache_folder(root)
    path = object_path(cache, md5)
    if not path.is_file():
        raise DataError(
            f"DVC's cache in {cache} lacks {md5}; `vlfoundry fetch MODEL` gets a model from DVC's "
            "remote, if there is one, and with --all whatever else its run made; or run the "
            "pipeline again"
        )
    return path


def check_files(folder: Path, entries: dict[str, str]) -> None:
    """Raises DataError, naming the files, unless the folder has just these, each of its hash."""
    found = {file.relative_to(folder).as_posix(): md5_of(file) for file in files_below(folder)}
    if found != entries:
        differing = sorted(name for name in found | entries if found.get(name) != entries.get(name))
        raise DataError(
            f"{folder} is not what dvc.lock says: {', '.join(differing)} differ; "
            "`vlfoundry run` (or `dvc repro`) makes it again"
        )


def _fetch(root: Path, version: Version, entries: dict[str, str], folder: Path) -> None:
    """Copy a model out of the cache, every file checked; `folder` appears when it is complete."""
    try:
        with new_folder(folder) as part:
            for name, md5 in entries.items():
                target, source = part / name, _object(root, md5)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                if (got := md5_of(target)) != md5:  # DVC itself does not check it at a checkout
                    raise DataError(
                        f"{version.ref}: {name} in DVC's cache is damaged ({source} has hash "
                        f"{got}); `vlfoundry fetch {version.ref}` gets it again from DVC's "
                        "remote, if there is one; else delete that file and run the pipeline again"
                    )
    except OSError:  # somebody else was quicker, if the folder is there
        if not folder.is_dir():
            raise
