"""What a model will be given: conversations and pictures, looked at beforehand."""

from pathlib import Path
from typing import Annotated

import typer

from vlfoundry.flows.cli import complete
from vlfoundry.flows.cli.common import Json, print_json, root_or_none
from vlfoundry.flows.verbosity import Verbosity
from vlfoundry.infra.core.project import find_root

commands = typer.Typer()


@commands.command()
def chat_check(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="chat files (.jsonl)")],
    root: Annotated[
        str | None,
        typer.Option(
            help="folder or URL that pictures are relative to, `/` where they are absolute paths; "
            "default: what params.yaml says of the file (sft.sources), or the file's folder"
        ),
    ] = None,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="decode every picture")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(
            help="the chat model that is to be trained; default: the project's",
            autocompletion=complete.models,
        ),
    ] = None,
    variant: Annotated[
        str, typer.Option(help="of stage 3: simple or full", autocompletion=complete.variants)
    ] = "simple",
    most: Annotated[int, typer.Option(min=0, help="problems shown of each file")] = 20,
    json: Json = False,
) -> None:
    """Check chat files as stage 3 will read them: format, pictures, lengths.

    Names file, line and field of whatever training would stop at, and ends with code 1 if there is
    anything.
    """
    if model is not None:  # what is wrong is said before the rest is imported
        from vlfoundry.infra.registry.gto import resolve_model

        resolve_model(model)
    from vlfoundry.flows.chat_check import FileReport, check, check_places, find_limits

    check_places(files, root)
    limits = find_limits(root_or_none(), model=model, variant=variant)
    if context.obj is not Verbosity.QUIET:
        typer.echo(limits.told, err=True)
    reports: list[FileReport] | None = [] if json else None
    good = check(
        files, limits, root=root, pictures=images, most=most, say=typer.echo, reports=reports
    )
    if reports is not None:
        print_json("chat_check", {"good": good, "files": [report.facts() for report in reports]})
    raise typer.Exit(0 if good else 1)


@commands.command()
def pixels(
    image: Annotated[Path, typer.Argument(help="a picture")],
    out: Annotated[Path, typer.Option(help="the folder to make, with one PNG a square")],
    model: Annotated[
        str | None,
        typer.Option(
            help="a registered name or a model folder; default: params.yaml",
            autocompletion=complete.models,
        ),
    ] = None,
    purpose: Annotated[
        str, typer.Option("--for", help="train or evaluate", autocompletion=complete.purposes)
    ] = "evaluate",
    task: Annotated[
        str | None,
        typer.Option(
            help="zero_shot, linear_probe, retrieval, caption or chat",
            autocompletion=complete.tasks,
        ),
    ] = None,
) -> None:
    """Write what a model is given of a picture: its tiles, or its one square."""
    from vlfoundry.flows.pixels import write_pixels

    write_pixels(
        image, out, model=model, purpose=purpose, task=task, root=find_root, say=typer.echo
    )
