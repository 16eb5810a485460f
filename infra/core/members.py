"""Registries: a folder of which every module declares one thing. To add one is to add a file.

    SUITES = members(__name__, "SUITE")      # in the folder's __init__.py

Who calls this reaches every module of its folder, though no import names them: `infra.core.meaning`
knows it, so that such a module is part of the code of the steps that reach the folder.
"""

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import ConfigError


def folders(package: str) -> list[str]:
    """Names of the folders of a package that hold a module of their own name, sorted.

    For what others load by its path: such modules are reached as well.
    """
    (place,) = sys.modules[package].__path__
    return sorted(path.stem for path in Path(place).glob("*/*.py") if path.stem == path.parent.name)


def members(package: str, attribute: str) -> list[Any]:
    """What each module of a package assigns to `attribute`, in the order of their names.

    Args:
        package: `__name__` of the package, which must be imported.
        attribute: e.g. "SUITE".

    Raises:
        ConfigError: a module does not declare it.
    """
    found = []
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        name = f"{package}.{module.name}"
        loaded = importlib.import_module(name)
        if not hasattr(loaded, attribute):
            raise ConfigError(
                f"{loaded.__file__} declares no {attribute}; every module of {package} declares one"
            )
        found.append(getattr(loaded, attribute))
    return found
