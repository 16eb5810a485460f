"""Moves what is computed with to this machine's device. On a CPU all of it does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlfoundry.infra.backend import install


def to_device(value: Any) -> Any:
    """A model, a tensor, or a mapping of them, where it is computed with."""
    kind = install().kind
    if kind == "cpu":
        return value
    if isinstance(value, Mapping):
        return {name: to_device(part) for name, part in value.items()}
    return value.to(kind) if hasattr(value, "to") else value
