"""The pipeline's definition, and what its code means."""

from typing import Annotated

import typer

from vlfoundry.flows.cli.common import Json, print_json
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.project import find_root

commands = typer.Typer()


@commands.command()
def graph(
    write: Annotated[
        bool, typer.Option("--write", help="render dvc.yaml again, in a checkout of VLFoundry")
    ] = False,
    json: Json = False,
) -> None:
    """Show which stage reads from which."""
    root = find_root()
    if write:
        from vlfoundry.flows import definition
        from vlfoundry.infra.core.code import PACKAGE_FOLDER, package_of

        if PACKAGE_FOLDER.resolve().parent != root:
            own = package_of(root) != PACKAGE_FOLDER
            raise ConfigError(
                f"this is not the vlfoundry of {root}; there, `python -m vlfoundry graph --write`"
                if own
                else f"{root} has no stages to render dvc.yaml from; `vlfoundry upgrade` writes it"
            )
        changed = definition.write(root)
        typer.echo("dvc.yaml is rendered again" if changed else "dvc.yaml is up to date")
        return
    from vlfoundry.flows.graph import load_graph

    found = load_graph(root, lambda line: typer.echo(line, err=True), beside=True)
    if json:
        stages = [{"name": node.name, "upstream": node.upstream} for node in found.nodes]
        print_json("graph", {"stages": stages})
        return
    for node in found.nodes:
        typer.echo(f"{node.name:28s} {'<- ' if node.upstream else ''}{', '.join(node.upstream)}")


@commands.command()
def accept(
    steps: Annotated[list[str], typer.Argument(metavar="STEP...", help="such as contrastive")],
    because: Annotated[str, typer.Option(help="why the change cannot change a result")],
) -> None:
    """Declare that a change of code is harmless: what a step made stays up to date.

    Also what it has not finished yet goes on where it was. accepted.yaml and lineage tell it ever
    after.
    """
    from vlfoundry.flows.accept import accept as declare

    for line in declare(find_root(), tuple(steps), because):
        typer.echo(line)


@commands.command()
def upgrade() -> None:
    """Render dvc.yaml as this version does, and say which steps mean something else now."""
    from vlfoundry.flows.upgrade import upgrade as render

    for line in render(find_root()):
        typer.echo(line)
