"""What makes a project."""

from pathlib import Path
from typing import Annotated

import typer

from vlfoundry.flows.cli import complete

commands = typer.Typer()


@commands.command()
def new(
    folder: Annotated[
        Path,
        typer.Argument(
            help="that is to be the project: none yet, or empty and not where you are; or, before "
            "NAME, what to begin in a checkout: suite, launcher or family"
        ),
    ],
    name: Annotated[
        str | None, typer.Argument(help="of the suite, launcher or family of language models")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="a profile of VLFoundry, merged into params.yaml",
            autocompletion=complete.shipped_profiles,
        ),
    ] = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="do not copy the embedded drawings")
    ] = False,
) -> None:
    """Make a project of your own: parameters, data and runs in a folder, the code as installed.

    `new suite NAME` (or launcher, family) begins an extension in a checkout instead.
    """
    if name is not None:
        from vlfoundry.flows.scaffold import write

        for line in write(str(folder), name, Path.cwd()):
            typer.echo(line)
        return
    from vlfoundry.flows.newproject import NewProject, make_project

    for line in make_project(NewProject(place=folder, profile=profile, data=not no_data)):
        typer.echo(line)
