"""Retrains InternVL-class vision-language models.

    model = vlfoundry.load("champion")

The five packages in here are links to the folders at the top of the tree: one import package for
whoever installs it, five layers for whoever works on it. Nothing is imported here: what `api.py`
offers is imported when it is asked for, and in a way that does not make it part of every stage.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    api = importlib.import_module("vlfoundry.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'vlfoundry' has no attribute {name!r}")
