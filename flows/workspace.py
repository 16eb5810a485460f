"""A place of its own for a run with its own parameters.

Two runs must never share a workspace (DVC's locks know processes, not intentions), and a run with
another profile must not rewrite the params.yaml that somebody is editing. So such a run gets a git
worktree of the working tree as it is now, with the merged params.yaml and the shared DVC cache.
"""

import dataclasses
import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

from flows.recipes import with_profile
from infra.config import PARAMS_FILE, apply_overrides, canonical_json, load_params
from infra.errors import ConfigError
from infra.git import git, snapshot
from infra.registry import cache_folder
from infra.stage import START_FOLDER

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


def prepare(root: Path, variation: Variation, folder: Path | None = None) -> Path:
    """Make or bring up to date the workspace of a variation; its path.

    Its sources are the working tree of `root` as it is, uncommitted changes included, and the
    models of data/start. Outputs and state of an earlier run in the same workspace stay: they are
    what a second run goes on from.
    """
    params = variation.apply(root)
    folder = (folder or root / "work" / "workspaces" / variation.name).resolve()
    commit = snapshot(root)
    if (folder / ".git").exists():
        kept = {name: (folder / name).read_bytes() for name in KEPT_FILES if _is_file(folder, name)}
        git(folder, "checkout", "--quiet", "--force", "--detach", commit)
        for name, content in kept.items():
            (folder / name).write_bytes(content)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"--workspace {folder} is neither empty nor a workspace; name a new folder"
        )
    else:
        git(root, "worktree", "prune")
        git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)
    _share_cache(root, folder)
    _share_starts(root, folder)
    (folder / PARAMS_FILE).write_text(yaml_text(params), encoding="utf-8")
    return folder


def _is_file(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _share_cache(root: Path, folder: Path) -> None:
    """DVC's settings that git does not know (credentials), and the cache of `root`."""
    import configparser

    parser = configparser.ConfigParser(interpolation=None)
    parser.read(root / ".dvc" / "config.local", encoding="utf-8")
    if not parser.has_section("cache"):
        parser.add_section("cache")
    parser.set("cache", "dir", str(cache_folder(root).resolve()))
    with (folder / ".dvc" / "config.local").open("w", encoding="utf-8") as file:
        parser.write(file)


def _share_starts(root: Path, folder: Path) -> None:
    """Model folders that training starts from are no part of git: hard links to their files."""
    for start in sorted(path for path in (root / START_FOLDER).glob("*") if path.is_dir()):
        target = folder / START_FOLDER / start.name
        if _listing(target) != _listing(start):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(start, target, copy_function=_link)


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file."""
    files = {p.relative_to(folder).as_posix(): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (facts.st_size, facts.st_mtime_ns) for name, facts in files.items()}


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
