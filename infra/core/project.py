"""Where a project is, and which of its files that git does not know yet belong to a run."""

from __future__ import annotations

import importlib.metadata
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vlfoundry.infra.core.errors import ConfigError

DEFINITION = "dvc.yaml"
PROJECT_FORMAT = 2
"""of dvc.yaml and of what it makes; 1, which does not say so, listed source files"""
WRITTEN_BY = re.compile(r"\bproject_format: (\d+)(?:, written_by: ([^}\n]+))?")
"""in dvc.yaml: its format, and which version rendered it"""
OWN_FILES = (
    DEFINITION, "dvc.lock", "params.yaml", "accepted.yaml", "prefect.yaml", "pyproject.toml",
    ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore",
)  # fmt: skip
"""files by which DVC and we know a project"""
PACKAGE = "vlfoundry"
PARAMETERS = ("launchers", "profiles")
"""folders whose files are parameters"""
CODE = ("eval", "flows", "infra", "models", "stages", PACKAGE)
"""folders of a checkout whose files are code"""
SOURCE_TYPES = (".py", ".yaml", ".yml", ".j2", ".css", ".js")
"""a key that somebody left in one of these folders is no source"""


def project_around(place: Path) -> Path | None:
    """The project that a folder lies in, as it is; None outside of one."""
    here = place.resolve()
    for folder in (here, *here.parents):
        if (folder / DEFINITION).is_file() and (folder / ".dvc").is_dir():
            return folder
    return None


def find_root(start: Path | None = None) -> Path:
    """The project that `start` (default: the working directory) lies in: it has a dvc.yaml.

    Raises ConfigError outside of a project, for one that is not the root of its git repository, and
    for one whose files Python would take for ours.
    """
    here = start or Path.cwd()
    folder = project_around(here)
    if folder is None:
        raise ConfigError(
            f"{here.resolve()} is not inside a VLFoundry project: neither it nor a folder above it "
            f"has a {DEFINITION} beside a .dvc; change to one, or make one with `vlfoundry new DIR`"
        )
    _require_own_repository(folder)
    _refuse_shadow(folder)
    check_format(folder)
    return folder


def has_code(root: Path) -> bool:
    """Whether a project is a checkout of VLFoundry: its stages run its own code, for Python looks
    into the working directory first. Else they run what is installed."""
    return (root / PACKAGE / "stages").is_dir()


def source_folders(root: Path) -> tuple[str, ...]:
    """Folders of a project whose files are code or parameters."""
    return (*PARAMETERS, *CODE) if has_code(root) else PARAMETERS


def _refuse_shadow(root: Path) -> None:
    """Raises ConfigError for a project whose stages would import something else than us."""
    for name in (f"{PACKAGE}.py", f"{PACKAGE}/__init__.py"):
        if (root / name).exists() and not has_code(root):
            raise ConfigError(
                f"{root / name}: Python takes it for VLFoundry when a stage starts in {root}; give "
                "it another name"
            )


def check_format(root: Path) -> None:
    """Raises ConfigError if a newer version of this package made the project."""
    found = WRITTEN_BY.search((root / DEFINITION).read_text("utf-8", errors="replace"))
    if found and int(found[1]) > PROJECT_FORMAT:
        own = importlib.metadata.version("vlfoundry")
        by = f" by {found[2].strip()}" if found[2] else ""
        raise ConfigError(
            f"{root / DEFINITION} has project format {found[1]}, written{by}; this is vlfoundry "
            f"{own}, which knows formats up to {PROJECT_FORMAT}: install the newer version"
        )


def _require_own_repository(root: Path) -> None:
    if (root / ".git").exists():
        return
    for folder in root.parents:
        if (folder / ".git").exists():
            raise ConfigError(
                f"{root} is a folder of the git repository {folder}, and a project has to be the "
                "root of its own, for its versions and workspaces are commits; move it out, or "
                f"run `git init` in {root} (the outer repository may ignore it, or have it as a "
                "submodule)"
            )


def belongs(root: Path, untracked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Untracked files of a project, by whether a run is made of them.

    A run is made of what DVC names (dependencies in dvc.yaml, .dvc files), of `source_folders` and
    of the project's own files. Anything else in the working tree, such as a `.env`, is nobody's
    business.

    Args:
        untracked: paths relative to `root`, as git lists them.

    Returns:
        Those that belong to a run, and those that do not.
    """
    wanted = [PurePosixPath(path) for path in _dependencies(root)]
    folders = source_folders(root)
    ours: list[str] = []
    others: list[str] = []
    for name in untracked:
        (ours if _is_ours(PurePosixPath(name), wanted, folders) else others).append(name)
    return ours, others


def _is_ours(
    path: PurePosixPath, dependencies: Sequence[PurePosixPath], folders: Sequence[str]
) -> bool:
    if path in dependencies or str(path) in OWN_FILES or path.suffix == ".dvc":
        return True
    if any(part.startswith(".") for part in path.parts):
        return path.name == ".gitignore"
    if path.parts[0] in folders:
        return path.suffix in SOURCE_TYPES
    return any(path.is_relative_to(dependency) for dependency in dependencies)


def _dependencies(root: Path) -> Iterator[str]:
    """Files and folders under `deps` of dvc.yaml; those whose path parameters complete are made by
    stages, or lie in data/start, which git ignores."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    definition = root / DEFINITION
    text = definition.read_text("utf-8") if definition.is_file() else ""
    try:
        facts = YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError:
        return  # DVC says what is wrong with it
    yield from _deps(facts)


def _deps(facts: Any) -> Iterator[str]:
    if isinstance(facts, list):
        for entry in facts:
            yield from _deps(entry)
    if isinstance(facts, dict):
        for key, value in facts.items():
            if key != "deps":
                yield from _deps(value)
            elif isinstance(value, list):
                names = (next(iter(dep)) if isinstance(dep, dict) else dep for dep in value)
                yield from (n for n in names if isinstance(n, str) and "${" not in n)
