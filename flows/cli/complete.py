"""What a shell offers for a value: Typer asks these when somebody presses TAB. No PyTorch."""

from collections.abc import Callable, Iterable
from pathlib import Path

from vlfoundry.flows.cli.common import root_or_none
from vlfoundry.infra.core.errors import UserError

Completion = Callable[[str], list[str]]


def offering(names: Callable[[], Iterable[str]]) -> Completion:
    """Those of the names that go on from what is typed; none where they cannot be told."""

    def complete(incomplete: str) -> list[str]:
        try:
            return [name for name in names() if name.startswith(incomplete)]
        except UserError:
            return []

    return complete


def in_project(names: Callable[[Path], Iterable[str]]) -> Completion:
    """`offering` what a project has."""

    def found() -> Iterable[str]:
        root = root_or_none()
        return names(root) if root else ()

    return offering(found)


@offering
def suites() -> Iterable[str]:
    from vlfoundry.eval.suites import suites

    return suites()


@offering
def formats() -> Iterable[str]:
    from vlfoundry.models.internvl.convert import FORMATS

    return FORMATS


@offering
def kinds() -> Iterable[str]:
    from vlfoundry.models.internvl.convert import SOLO

    return SOLO


@offering
def tasks() -> Iterable[str]:
    from vlfoundry.models.preprocess.geometry import CHAT, TASKS

    return [*(name for name in TASKS if name != "train"), CHAT]


@offering
def purposes() -> Iterable[str]:
    from vlfoundry.flows.pixels import PURPOSES

    return PURPOSES


@offering
def variants() -> Iterable[str]:
    return "simple", "full"


@in_project
def stages(root: Path) -> Iterable[str]:
    from vlfoundry.flows.addresses import ANY, stage_addresses

    return [name for name in stage_addresses(root) if ANY not in name]


@in_project
def profiles(root: Path) -> Iterable[str]:
    from vlfoundry.flows.recipes import profiles

    return profiles(root)


@offering
def shipped_profiles() -> Iterable[str]:
    from vlfoundry.flows.recipes import TEMPLATE, profiles

    return profiles(TEMPLATE)


@in_project
def recipes(root: Path) -> Iterable[str]:
    from vlfoundry.flows.recipes import recipes

    return recipes(root)


@in_project
def plannable(root: Path) -> Iterable[str]:
    from vlfoundry.flows.plan import ADDRESSES
    from vlfoundry.flows.recipes import recipes

    return [*ADDRESSES, *recipes(root)]


@in_project
def parameters(root: Path) -> Iterable[str]:
    """`KEY=` of every parameter that `--set` takes."""
    from vlfoundry.infra.core.config import PARAMS_FILE, load_params

    return [f"{key}=" for key in _leaves(load_params(root / PARAMS_FILE))]


@in_project
def models(root: Path) -> Iterable[str]:
    from vlfoundry.infra.registry.gto import list_models

    versions = list_models(root)
    standing = [f"{v.name}#{stage}" for v in versions for stage in v.stages]
    return [*(version.ref for version in versions), *standing]


def _leaves(params: dict, prefix: str = "") -> Iterable[str]:
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
