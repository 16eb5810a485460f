"""What runs the pipeline, and what tells of its state."""

from pathlib import Path
from typing import Annotated

import typer

from vlfoundry.flows.cli.common import Json, print_json
from vlfoundry.flows.cli.options import Overrides, Profile, Stages
from vlfoundry.infra.core.project import find_root

commands = typer.Typer()


@commands.command()
def run(
    context: typer.Context,
    stage: Stages = None,
    profile: Profile = None,
    set_: Overrides = None,
    workspace: Annotated[
        Path | None,
        typer.Option(help="where a run with its own parameters lives; named after them by default"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run, and why; change nothing")
    ] = False,
) -> None:
    """Run what changed, from the raw pairs to the report.

    With --profile, --set or --workspace the run gets a copy of the sources of its
    own with its own params.yaml, and shares DVC's cache; params.yaml here stays as it is.
    """
    from vlfoundry.flows.launch import run_pipeline
    from vlfoundry.flows.terminal import Terminal
    from vlfoundry.flows.workspace import Variation

    root, stages = find_root(), tuple(stage or ())
    variation = Variation(profile=profile, overrides=tuple(set_ or ()))
    if dry_run:
        from vlfoundry.flows.dryrun import dry_run_lines

        for line in dry_run_lines(root, stages, variation, workspace):
            typer.echo(line)
        return
    terminal = Terminal(verbosity=context.obj)
    raise typer.Exit(
        run_pipeline(
            root, stages=stages, variation=variation, workspace=workspace, terminal=terminal
        )
    )


@commands.command()
def status(json: Json = False) -> None:
    """Say which stages would run, and why."""
    from vlfoundry.flows.graph import load_graph
    from vlfoundry.flows.stamps import libraries

    root = find_root()
    graph = load_graph(root, lambda line: typer.echo(line, err=True), beside=True)
    kept = [node.name for node in graph.nodes if node.name not in graph.stale]
    if json:
        stages = [
            {
                "name": node.name,
                "state": graph.state(node.name),
                "reason": graph.reason(node.name),
                "upstream": node.upstream,
                "outputs": node.outs,
            }
            for node in graph.nodes
        ]
        print_json("status", {"stages": stages, "libraries": libraries(root, kept)})
        return
    for node in graph.nodes:
        typer.echo(f"{node.name:28s} {graph.reason(node.name) or 'up to date'}")
    for difference, names in libraries(root, kept).items():
        typer.echo(f"made with another version: {difference} ({', '.join(names)})")


@commands.command()
def report(
    out: Annotated[Path | None, typer.Option(help="where; default work/report/index.html")] = None,
) -> None:
    """Draw the report of the last run again, as one page that works offline."""
    from vlfoundry.eval.report.page import PAGE, render
    from vlfoundry.infra.core.files import require_writable

    require_writable(out or find_root() / PAGE, "the report")
    typer.echo(render(find_root(), out))


@commands.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="delete it; without: only list")] = False,
    json: Json = False,
) -> None:
    """List training state by run key, and delete what nobody needs.

    Nothing else deletes a checkpoint. Kept is what each step used last, what made the results that
    lie there, what runs, and what a registered model was made with.
    """
    from vlfoundry.flows.gc import delete as delete_all
    from vlfoundry.flows.gc import states, table

    root = find_root()
    found = states(root)
    free, kept = ([s for s in found if bool(s.kept) == keeps] for keeps in (False, True))
    size_bytes = sum(state.size_bytes for state in free)
    if not json:
        for title, rows in (("nobody needs", free), ("kept", kept)):
            for line in (f"{title}:", *table(root, rows)) if rows else ():
                typer.echo(line)
    done = delete_all(root, free) if delete else None
    for line in (*done.needed, *done.failed) if done else ():
        typer.echo(f"left: {line}", err=True)
    if json:
        folders, others = ([state.facts(root) for state in rows] for rows in (free, kept))
        facts = {"folders": folders, "kept": others, "bytes": size_bytes}
        print_json("gc", facts | {"freed_bytes": done.freed_bytes if done else None})
    elif done:
        typer.echo(f"{done.freed_bytes / 1e6:,.1f} MB freed")
    else:
        typer.echo(
            f"{len(free)} of {len(found)} folders would be deleted, {size_bytes / 1e6:,.1f} MB"
            + ("; `vlfoundry gc --delete` does it" if free else "")
        )
    if done and done.failed:
        raise typer.Exit(1)
