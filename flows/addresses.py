"""The stages' names by dvc.yaml alone: for what is asked before DVC, whose import takes seconds."""

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.project import DEFINITION

ANY = "*"
"""stands for variants that only DVC can tell, for parameters say them"""


def stage_addresses(root: Path) -> tuple[str, ...]:
    """As `dvc repro` takes them, in the order of dvc.yaml: "shard", "sft@full", maybe "x@*".

    Empty where dvc.yaml cannot be read: DVC will say what is wrong with it.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    definition = root / DEFINITION
    text = definition.read_text("utf-8") if definition.is_file() else ""
    try:
        facts = YAML(typ="safe", pure=True).load(io.StringIO(text))
        return tuple(
            address
            for name, entry in facts["stages"].items()
            for address in _addresses(name, entry)
        )
    except (YAMLError, LookupError, TypeError, AttributeError):
        return ()


def check_stages(root: Path, asked: Sequence[str]) -> None:
    """Raises ConfigError for a stage that dvc.yaml does not have; "sft" stands for its variants."""
    known = stage_addresses(root)
    for name in asked if known else ():
        stage = name.partition("@")[0]
        matches = (name, f"{stage}@{ANY}") if "@" in name else (name,)
        there = name in {address.partition("@")[0] for address in known}
        if not (there or name.endswith(".dvc") or any(match in known for match in matches)):
            raise ConfigError(f"no stage {name!r} in dvc.yaml; expected one of {list(known)}")


def _addresses(name: str, entry: Any) -> Iterator[str]:
    """What DVC makes of one entry: itself, or one stage for each item of `foreach` or `matrix`."""
    if "foreach" in entry:
        lists = [entry["foreach"]]
    elif "matrix" in entry:
        lists = list(entry["matrix"].values())
    else:
        yield name
        return
    if any(_open(values) for values in lists):
        yield f"{name}@{ANY}"
        return
    for items in itertools.product(*lists):
        yield f"{name}@{'-'.join(map(str, items))}"


def _open(values: Any) -> bool:
    """Whether a list of variants is a parameter, or has parameters or mappings in it."""
    plain = isinstance(values, dict | list)
    return not plain or any(isinstance(v, dict | list) or "${" in str(v) for v in values)
