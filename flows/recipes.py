"""Profiles: a project's own, and those that come with VLFoundry. Published runs are among them.

A recipe is a profile with a section `recipe`.

A recipe's model starts from a named flavour, not from params.yaml's, and every section that it
has stands for itself: nothing of params.yaml's shows through but the folders that a stage starts
from (`start`). Other sections are params.yaml's.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.config import build, load_params, merge, to_dict
from vlfoundry.infra.core.errors import ConfigError

PROFILES = "profiles"
"""of a project, and in `TEMPLATE`"""
TEMPLATE = Path(__file__).parents[1] / "template"
"""the parameters, profiles and data that come with VLFoundry"""
SECTION = "recipe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What the memory plan of a recipe is made for."""

    gpus: int
    """devices"""
    memory: float = 80.0
    """GiB of each"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe says of itself."""

    title: str
    """which published run it is"""
    stage: str
    """its address in the pipeline (sft@full), or `retrieval`, which has no stage yet"""
    source: str
    """where the numbers are published; all that `ours` does not name are from there"""
    published_on: str = ""
    """the machines of the published run"""
    flavour: str
    """of models.internvl.config"""
    vision: str | None = None
    """another vision flavour than the flavour's"""
    language: str | None = None
    """another language flavour than the flavour's"""
    machine: Machine
    """what its memory plan is made for"""
    text_tokens: int | None = None
    """length of a conversation, visual tokens included"""
    images: float = 1.0
    """pictures, or tiles, of a conversation"""
    ours: dict[str, str] = dataclasses.field(default_factory=dict)
    """key -> why this value: the numbers that are not published"""
    differs: tuple[str, ...] = ()
    """what the published run did and this one does not"""


def profile_path(root: Path, name: str) -> Path:
    """The file of a profile: the project's, or else the one that comes with VLFoundry.

    Raises ConfigError, naming those there are.
    """
    if path := profiles(root).get(name):
        return path
    known = profiles(root)
    own = [other for other, file in known.items() if file.parent == root / PROFILES]
    shipped = [other for other in known if other not in own]
    places = {f"files of {PROFILES}/": own, "which come with VLFoundry": shipped}
    listed = " or ".join(f"{names} ({what})" for what, names in places.items() if names)
    raise ConfigError(f"no profile {name!r}: expected one of {listed}")


def profiles(root: Path) -> dict[str, Path]:
    """All profiles by name, sorted: files of the project, and the others that VLFoundry has."""
    # Those that are hidden are a file manager's.
    places = [(place / PROFILES).glob("[!.]*.yaml") for place in (TEMPLATE, root)]
    files = {file.stem: file for place in places for file in place}
    return dict(sorted(files.items()))


def recipes(root: Path) -> dict[str, Recipe]:
    """All recipes by name."""
    found = {name: load_params(file) for name, file in profiles(root).items()}
    return {name: _header(name, content) for name, content in found.items() if SECTION in content}


def find_recipe(root: Path, name: str) -> Recipe | None:
    """The recipe of that name, if there is one."""
    path = profiles(root).get(name)
    content = load_params(path) if path else {}
    return _header(name, content) if SECTION in content else None


def with_profile(params: Mapping[str, Any], root: Path, name: str) -> dict[str, Any]:
    """`params` with a profile laid over them.

    Raises:
        ConfigError: there is no such profile, or it names a parameter that does not exist.
    """
    changes = load_params(profile_path(root, name))
    if SECTION not in changes:
        return merge(_with_whole_model(params) if "model" in changes else params, changes)
    recipe = _header(name, changes)
    sections = {
        key: _with_start(value, params.get(key))
        for key, value in changes.items()
        if key not in (SECTION, "model")
    }
    model = merge(_flavour(recipe), changes.get("model", {}), "model")
    return {**params, **sections, "model": model}


def _with_whole_model(params: Mapping[str, Any]) -> dict[str, Any]:
    """A profile may set any field of the model, not only those that params.yaml has."""
    from vlfoundry.models.internvl.config import InternVLConfig

    return {**params, "model": to_dict(build(InternVLConfig, params["model"], "model"))}


def _with_start(section: Any, default: Any) -> Any:
    if isinstance(section, Mapping) and isinstance(default, Mapping) and "start" in default:
        return {"start": default["start"], **section}
    return section


def _header(name: str, content: Mapping[str, Any]) -> Recipe:
    return build(Recipe, content[SECTION], where=f"{PROFILES}/{name}.yaml: {SECTION}")


def _flavour(recipe: Recipe) -> dict[str, Any]:
    from vlfoundry.models.families import flavour
    from vlfoundry.models.internvit.config import internvit
    from vlfoundry.models.internvl.config import internvl

    changes: dict[str, Any] = {}
    if recipe.vision:
        changes["vision"] = internvit(recipe.vision)
    if recipe.language:
        changes["language"] = flavour(recipe.language)
    return to_dict(internvl(recipe.flavour, **changes))
