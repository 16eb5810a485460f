"""Our metrics, each a module that `evaluate.load(folder)` reads, without any network.

`evaluate` takes five CPU seconds to import, so it is loaded with the first metric. It copies the
module's one file and checks each of its imports by a regular expression that understands one
module a line, hence the plain imports in these files.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.members import folders

METRICS = tuple(folders(__name__))
"""names of all; each is a folder with a module of its name, and no import names it"""


def compute(name: str, *, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
    """Run one metric: its named means, and under `per_item` the value of every item."""
    result = _load(name).compute(predictions=predictions, references=references, **options)
    assert result is not None, "only the first process computes, and there is only one"
    return result


@cache
def _load(name: str) -> Any:
    assert name in METRICS, f"no metric {name!r}; there are {METRICS}"
    for variable in ("HF_EVALUATE_OFFLINE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    with _as_if_not_installed("transformers"):
        import evaluate

    return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)


@contextmanager
def _as_if_not_installed(package: str) -> Iterator[None]:
    """`evaluate` imports all of transformers (and torch) for evaluators that we do not use: 6 CPU
    seconds in every process."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyrefly: ignore[unsupported-operation]
    try:
        yield
    finally:
        del sys.modules[package]
