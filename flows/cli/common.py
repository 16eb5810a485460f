"""What several commands share: where the project is, and facts for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vlfoundry.flows.verbosity import Verbosity
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.project import find_root

Json = Annotated[
    bool, typer.Option("--json", help="print one JSON object, for programs, and nothing else")
]


def root_or_none() -> Path | None:
    """The project that the working directory is in, if it is in one."""
    try:
        return find_root()
    except ConfigError:
        return None


def print_json(name: str, facts: Mapping[str, Any]) -> None:
    """Print facts as one JSON object on stdout.

    Args:
        name: of the shape: `format` is "vlfoundry.NAME.v1". A field that is new keeps the number;
            one that goes, or means something else, raises it.
        facts: paths become texts.
    """
    whole = {"format": f"vlfoundry.{name}.v1", **facts}
    typer.echo(json.dumps(whole, indent=2, ensure_ascii=False, default=str))


def note(context: typer.Context, text: str) -> None:
    """Say how it goes on, which --quiet leaves out."""
    if context.obj is not Verbosity.QUIET:
        typer.echo(text)
