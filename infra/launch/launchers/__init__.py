"""The registry of launchers: each module of this folder declares one as `LAUNCHER`.

A launcher is about a place and changes no result, so of these modules only `fork`, which is named
here, is part of a step's code.
"""

import importlib
import pkgutil

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.launch.launcher import Launcher
from vlfoundry.infra.launch.launchers import fork


def launcher_names() -> list[str]:
    """Names of all launchers, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def launcher(name: str) -> Launcher:
    """A launcher by the name of its module.

    Raises:
        ConfigError: there is none.
    """
    if name == fork.LAUNCHER.name:
        return fork.LAUNCHER
    if name not in launcher_names():
        raise ConfigError(f"unknown launcher {name!r}; choose from {launcher_names()}")
    return importlib.import_module(f"{__name__}.{name}").LAUNCHER
