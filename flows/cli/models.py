"""Models in and out, and the registry of those that the pipeline made."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlfoundry.flows.cli import complete
from vlfoundry.flows.cli.common import Json, print_json, root_or_none
from vlfoundry.flows.cli.options import ModelRef
from vlfoundry.infra.core.errors import one_line
from vlfoundry.infra.core.project import find_root

commands = typer.Typer()


@commands.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="a folder with config.json and safetensors or .bin files; or a .pth; or a model "
            "folder of ours, or a registered name",
            autocompletion=complete.models,
        ),
    ],
    target: Annotated[Path, typer.Argument(help="the model folder to make")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="only this of it: vision, or internvl_c of an InternVL-14B",
            autocompletion=complete.kinds,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="of a .pth: the official config.json; default: beside it")
    ] = None,
    tower_config: Annotated[
        Path | None,
        typer.Option(help="of a folder in LLaVA's form: the config.json of its vision tower"),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="of a registered name: what this stage of its run made, pretrain_text",
            autocompletion=complete.stages,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="also write this file of profiles/, to train on from TARGET; of a registered "
            "InternVL-C with the text model of its run (TARGET-text)"
        ),
    ] = None,
) -> None:
    """Make a model folder of official weights, or of a model of ours, to train on from.

    Every tensor is accounted for, and kept in the type it has. Code in a pickle is never run.
    """
    from vlfoundry.flows.start import import_model, import_with_profile, new_profile
    from vlfoundry.infra.core.files import require_writable_folder

    asked: dict[str, Any] = {
        "stage": stage, "kind": kind, "config_file": config, "tower_config": tower_config,
    }  # fmt: skip
    require_writable_folder(target, "the model")
    if profile:
        root = find_root()
        path = new_profile(root, profile, target)
        said = import_with_profile(root, source, target, path, **asked)
    else:
        said = import_model(root_or_none(), source, target, **asked)
    for line in said:
        typer.echo(one_line(line))


@commands.command()
def export(
    model: ModelRef,
    target: Annotated[Path, typer.Argument(help="the folder to make")],
    format: Annotated[
        str,
        typer.Option(
            help="internvit, internvl_14b, internvl_chat, transformers, llava, llava_full, "
            "internvit_pth or internvl_c_pth",
            autocompletion=complete.formats,
        ),
    ],
) -> None:
    """Write a model as official code or transformers reads it."""
    from vlfoundry.infra.core.files import require_writable_folder
    from vlfoundry.infra.registry.gto import resolve_model
    from vlfoundry.models.internvl.convert import check_format, export_model

    require_writable_folder(target, "the model")
    check_format(format)
    done = export_model(resolve_model(model), target, format)
    typer.echo(f"{model} ({done.kind}) is in {target} as {done.format}: {done.summary}")
    if done.note:
        typer.echo(f"mind: {done.note}")


@commands.command()
def merge(
    model: ModelRef,
    target: Annotated[Path, typer.Argument(help="the model folder to make")],
) -> None:
    """Fold a model's LoRA adapters into its weights (export does that too)."""
    from vlfoundry.infra.core.files import require_writable_folder
    from vlfoundry.infra.registry.gto import resolve_model
    from vlfoundry.models.internvl.convert import merge_model

    require_writable_folder(target, "the model")
    changed = merge_model(resolve_model(model), target)
    typer.echo(f"{model} is in {target}, the adapters of {changed} weights folded in")


@commands.command()
def models(json: Json = False) -> None:
    """List the registered models and what stands where."""
    import dataclasses

    from vlfoundry.infra.registry.gto import list_models

    rows = list_models(find_root())
    if json:
        found = [{"ref": row.ref, **dataclasses.asdict(row)} for row in rows]
        print_json("models", {"models": found})
        return
    if not rows:
        typer.echo(
            "no model is registered yet; `vlfoundry run` registers the one that the gate passes"
        )
    for row in rows:
        stages = ", ".join(f"#{name}" for name in row.stages)
        typer.echo(f"{row.name}@{row.version}  {row.commit[:10]}  {row.created}  {stages}")


@commands.command()
def register(
    folder: Annotated[Path, typer.Argument(help="a model folder inside DVC's outputs")],
    promote: Annotated[
        str | None, typer.Option(help="also assign this stage, e.g. champion")
    ] = None,
) -> None:
    """Give a trained model a version."""
    from vlfoundry.infra.registry.gto import register_model

    version = register_model(find_root(), folder, promote=promote)
    typer.echo(f"{version.name}@{version.version} is {version.path} at {version.commit[:10]}")


@commands.command()
def fetch(
    model: Annotated[str, typer.Argument(help="a registered name", autocompletion=complete.models)],
    everything: Annotated[
        bool, typer.Option("--all", help="all that its run made, not the model alone")
    ] = False,
) -> None:
    """Get a registered model from DVC's remote into the cache, e.g. on a second machine."""
    from vlfoundry.flows.fetch import fetch as fetch_model

    typer.echo(fetch_model(find_root(), model, everything=everything))


@commands.command()
def lineage(
    model: ModelRef,
    rows: Annotated[
        Path | None, typer.Option(help="also write the records it was trained on, as Parquet")
    ] = None,
    json: Json = False,
) -> None:
    """Walk back from a model to the rows that it was trained on."""
    from vlfoundry.flows.lineage import lineage_facts, lineage_lines, write_rows
    from vlfoundry.infra.core.files import require_writable

    if rows:
        require_writable(rows, "the rows")
    root = find_root()
    facts = lineage_facts(root, model) if json else None
    if facts is None:
        typer.echo("\n".join(lineage_lines(root, model)))
    count = write_rows(root, model, rows) if rows else None
    if facts is not None:
        print_json("lineage", {**facts, "rows": rows and {"path": rows, "count": count}})
    elif rows:
        typer.echo(f"{count} rows written to {rows}")
