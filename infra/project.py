"""Where a project is, and which of its files that git does not know yet belong to a run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from infra.errors import ConfigError

DEFINITION = "dvc.yaml"
OWN_FILES = (
    DEFINITION, "dvc.lock", "params.yaml", "pyproject.toml", ".gitignore", ".dvcignore",
    ".dvc/config", ".dvc/.gitignore",
)  # fmt: skip
"""files by which DVC and we know a project"""
SOURCES = ("eval", "flows", "infra", "models", "profiles", "stages")
"""folders whose files are code or parameters"""
SOURCE_TYPES = (".py", ".yaml", ".yml", ".j2", ".css", ".js")
"""a key that somebody left in one of these folders is no source"""


def find_root(start: Path | None = None) -> Path:
    """The project that `start` (default: the working directory) lies in: it has a dvc.yaml.

    Raises ConfigError outside of a project, and for one that is not the root of its git repository.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / DEFINITION).is_file() and (folder / ".dvc").is_dir():
            _require_own_repository(folder)
            return folder
    raise ConfigError(
        f"{here} is not inside a VLFoundry checkout: no folder above it has a dvc.yaml; "
        "change to the repository and try again"
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

    A run is made of what DVC names (dependencies in dvc.yaml, .dvc files), of sources and of the
    project's own files. Anything else in the working tree, such as a `.env`, is nobody's business.

    Args:
        untracked: paths relative to `root`, as git lists them.

    Returns:
        Those that belong to a run, and those that do not.
    """
    wanted = [PurePosixPath(path) for path in _dependencies(root)]
    ours: list[str] = []
    others: list[str] = []
    for name in untracked:
        (ours if _is_ours(PurePosixPath(name), wanted) else others).append(name)
    return ours, others


def _is_ours(path: PurePosixPath, dependencies: Sequence[PurePosixPath]) -> bool:
    if path in dependencies or str(path) in OWN_FILES or path.suffix == ".dvc":
        return True
    if any(part.startswith(".") for part in path.parts):
        return path.name == ".gitignore"
    is_source = path.parts[0] in SOURCES and path.suffix in SOURCE_TYPES
    return is_source or any(_is_in(path, dependency) for dependency in dependencies)


def _is_in(path: PurePosixPath, dependency: PurePosixPath) -> bool:
    """Whether a file is in a folder that DVC names; folders of sources have a rule of their own."""
    return path.parts[0] not in SOURCES and path.is_relative_to(dependency)


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
