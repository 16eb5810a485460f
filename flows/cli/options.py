"""Arguments and options that several commands have."""

from typing import Annotated

import typer

from vlfoundry.flows.cli import complete

MODEL = (
    "a registered name (internvl_c, internvl_c@v0.1.0, internvl_c#champion, champion) "
    "or the path of a model folder"
)

ModelRef = Annotated[str, typer.Argument(help=MODEL, autocompletion=complete.models)]

Stages = Annotated[
    list[str] | None,
    typer.Option(
        "--stage", help="run this stage and what it needs, not all", autocompletion=complete.stages
    ),
]

Profile = Annotated[
    str | None,
    typer.Option(
        help="a file of profiles/, or one that VLFoundry has, merged over params.yaml",
        autocompletion=complete.profiles,
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE: another value for a parameter; params.yaml stays as it is",
        autocompletion=complete.parameters,
    ),
]
